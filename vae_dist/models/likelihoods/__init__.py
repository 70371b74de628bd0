"""The likelihoods p(x|z): how decoder outputs become a distribution over images."""

from __future__ import annotations

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods.base import Levels, Likelihood, bits_per_dim
from vae_dist.models.likelihoods.bernoulli import Bernoulli
from vae_dist.models.likelihoods.gaussian import DiscretizedGaussian, Gaussian, Laplace
from vae_dist.models.likelihoods.logistic import DiscretizedLogisticMixture

__all__ = [
    "Bernoulli",
    "DiscretizedGaussian",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "Laplace",
    "Levels",
    "Likelihood",
    "bits_per_dim",
    "build_likelihood",
]


def build_likelihood(config: LikelihoodConfig, data: DataConfig) -> Likelihood:
    levels = Levels(data.bits)
    if config.kind == "bernoulli":
        return Bernoulli(binarization=config.binarization, levels=levels)
    if config.kind == "discretized_gaussian":
        return DiscretizedGaussian(config, channels=data.channels, levels=levels)
    if config.kind == "discretized_logistic_mixture":
        return DiscretizedLogisticMixture(config, channels=data.channels, levels=levels)
    density = Laplace if config.kind == "laplace" else Gaussian
    return density(config, channels=data.channels, levels=levels, dequantize=data.dequantize)
