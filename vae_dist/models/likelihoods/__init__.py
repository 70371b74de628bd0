"""The likelihoods p(x|z): how decoder outputs become a distribution over images."""

from __future__ import annotations

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods.base import Levels, Likelihood
from vae_dist.models.likelihoods.bernoulli import Bernoulli
from vae_dist.models.likelihoods.gaussian import DiscretizedGaussian, Gaussian, Laplace
from vae_dist.models.likelihoods.logistic import DiscretizedLogisticMixture

__all__ = ["KINDS", "Levels", "Likelihood", "build_likelihood"]

KINDS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "discretized_gaussian": DiscretizedGaussian,
    "discretized_logistic_mixture": DiscretizedLogisticMixture,
}


def build_likelihood(config: LikelihoodConfig, data: DataConfig) -> Likelihood:
    return KINDS[config.kind](config, data)
