"""A mixture of Gaussians fitted to the aggregate posterior of a trained model, as its prior p(z).

    q(z) = 1/N sum_i q(z|x_i) over training images
    p(z) = sum_m pi_m N(z; mu_m, S_m),   S_m diagonal or full, fitted by EM to draws of q(z)

The decoder was trained on draws of q(z), so latents of the mixture lie where it has seen any;
N(0, I) also covers the rest. One draw of each image, which belongs to (run seed, image).
scikit-learn fits, from k-means, in float64. The fit is a function of checkpoint, images and K, and
is kept in the run folder under `priors/`: safetensors that name the checkpoint step and the data
that they belong to. Vector latents only: the latent of a spatial model has thousands of dimensions
whose correlations no K Gaussians hold.

Legend: N latents, d dimensions, M components.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from vae_dist.config.checks import mixture_prior
from vae_dist.config.commands import EvaluateCommand, SampleCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.evaluation import EvaluationBatch, EvaluationStream
from vae_dist.evaluation.run import inputs_of
from vae_dist.files import write_durably
from vae_dist.inference.load import LoadedModel, open_images, weights_digest
from vae_dist.models.latent import sample_posterior
from vae_dist.models.vae import VAE
from vae_dist.randomness import derive_seed, draws

FULL_UP_TO = 64  # latents; above, a full covariance has more numbers than most data sets determine
MAX_ITERATIONS = 500
TOLERANCE_NATS = 1e-5  # per latent and iteration; EM ends when it gains less
FLOOR = 1e-4  # added to each variance, part of the mean variance of the latents


@dataclass(frozen=True)
class GaussianMixture:
    log_weights: Tensor  # (M,)
    means: Tensor  # (M, d)
    factors: Tensor  # S_m = L L': the diagonals (M, d) of L, or lower triangular L (M, d, d)

    def to(self, device: torch.device) -> GaussianMixture:
        moved = (self.log_weights, self.means, self.factors)
        return GaussianMixture(*(tensor.to(device) for tensor in moved))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats for latents (N, d), float64 (N,)."""
        components: Distribution
        if self.factors.ndim == 2:
            components = Independent(Normal(self.means, self.factors), 1)
        else:
            components = MultivariateNormal(self.means, scale_tril=self.factors)
        weights = Categorical(logits=self.log_weights)
        log_prob: Tensor = MixtureSameFamily(weights, components).log_prob(z.double())
        return log_prob

    def sample(self, noise: Tensor, uniform: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Draws from normal noise (N, d) and uniform draws (N,) in [0, 1), float32 (N, d).

        `temperature` scales the standard deviations of the components, not the distance of their
        means.
        """
        steps = self.log_weights.exp().cumsum(0)
        chosen = torch.searchsorted(steps, uniform.double() * steps[-1], right=True)
        chosen = chosen.clamp(max=len(steps) - 1)
        noise, factors = temperature * noise.double(), self.factors[chosen]
        moved = factors * noise if factors.ndim == 2 else (factors @ noise.unsqueeze(2)).squeeze(2)
        return (self.means[chosen] + moved).float()


def fit_mixture(
    z: Tensor, *, num_components: int, covariance: str, seed: int
) -> tuple[GaussianMixture, dict[str, float]]:
    """The mixture of `covariance` diagonal or full that EM finds for latents (N, d), and what is
    known of the fit. Raises ConfigError without scikit-learn."""
    estimator_class = find_estimator()
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    z = z.double().cpu()
    floor = FLOOR * max(float(z.var(0, correction=0).mean()), torch.finfo(torch.float32).tiny)
    estimator = estimator_class(
        num_components,
        covariance_type="full" if covariance == "full" else "diag",
        tol=TOLERANCE_NATS,
        reg_covar=floor,
        max_iter=MAX_ITERATIONS,
        random_state=derive_seed(seed, "mixture") % 2**32,
    )
    # k-means adds up in the order in which its threads end
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(z.numpy())
    spread = torch.from_numpy(estimator.covariances_)
    mixture = GaussianMixture(
        torch.from_numpy(estimator.weights_).log(),
        torch.from_numpy(estimator.means_),
        torch.linalg.cholesky(spread) if covariance == "full" else spread.sqrt(),
    )
    normal = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    return mixture, {
        "latents": len(z),
        "iterations": estimator.n_iter_,
        "cross_entropy_nats": -float(mixture.log_prob(z).mean()),
        "cross_entropy_normal_nats": -float(normal.log_prob(z).sum(1).mean()),
    }


def find_estimator() -> Any:
    """scikit-learn's class. Raises ConfigError where it is not installed."""
    try:
        from sklearn.mixture import GaussianMixture as Estimator
    except ImportError:
        raise ConfigError(
            "prior=gmm:K needs scikit-learn: pip install 'vae_dist[metrics]'"
        ) from None
    return Estimator


@dataclass(frozen=True)
class FittedPrior:
    mixture: GaussianMixture  # on the CPU
    description: str  # in a sentence, for people


def fitted_prior(loaded: LoadedModel, command: SampleCommand | EvaluateCommand) -> FittedPrior:
    """The mixture that `command.prior` asks for, read from the run folder or fitted; for one
    process only.

    Raises ConfigError for a model or data that it cannot be fitted to.
    """
    num_components, covariance = mixture_prior(command.prior)
    model, num_latents = loaded.model, loaded.model.latent_channels
    if model.image_size is None:
        raise ConfigError(
            f"prior={command.prior}: a mixture is fitted to vector latents, and this model has a "
            "spatial one; train with model.latent=vector, or use prior=normal"
        )
    chosen = covariance or ("full" if num_latents <= FULL_UP_TO else "diagonal")
    config = loaded.config
    images = open_images(config, config.data.train, create=True, key="data.train")
    num_images = min(command.prior_images or images.index.num_samples, images.index.num_samples)
    belongs_to = {
        "step": loaded.step,
        "weights": command.weights,
        "weights_digest": weights_digest(model),
        "train_data": images.index.fingerprint,
        "num_images": num_images,
        "components": num_components,
        "covariance": chosen,
    }
    name = f"gmm{num_components}_{chosen}_{command.weights}_step_{loaded.step:08d}"
    file = Path(command.run) / "priors" / f"{name}.safetensors"
    known, kept = _read(file, belongs_to), f"from {file}"
    if known is None:
        find_estimator()  # before all images are encoded
        stream = EvaluationStream(
            images.index, images.settings, batch_size=command.batch_size, max_images=num_images
        )
        z = aggregate_posterior(model, stream, seed=config.seed)
        if len(z) < num_components:
            raise ConfigError(
                f"prior={command.prior}: {len(z)} training images could be read, fewer than "
                "components; ask for fewer"
            )
        known = fit_mixture(z, num_components=num_components, covariance=chosen, seed=config.seed)
        kept = _write(file, *known, belongs_to)
    mixture, facts = known
    description = (
        f"prior {num_components} Gaussians, {chosen} covariance, fitted to "
        f"{facts['latents']} training images of step {loaded.step} in {facts['iterations']} "
        f"iterations: {facts['cross_entropy_nats']:.2f} nats per latent vector, N(0, I) "
        f"{facts['cross_entropy_normal_nats']:.2f} ({kept})"
    )
    return FittedPrior(mixture, description)


@torch.inference_mode()
def aggregate_posterior(model: VAE, batches: Iterable[EvaluationBatch], *, seed: int) -> Tensor:
    """One draw of q(z|x) for each readable image, float32 (N, d) on CPU."""
    device = next(model.parameters()).device
    latents = []
    for batch in batches:
        if not (batch.weights > 0).any():
            continue
        inputs = inputs_of(model, batch, seed=seed, device=device, purpose="aggregate-levels")
        mean, log_variance = model.encode(inputs.images, inputs.labels, inputs.mask)
        shape = tuple(mean.shape[1:])
        noise = draws(torch.randn, seed, "aggregate-posterior", inputs.samples, shape).to(device)
        latents.append(sample_posterior(mean, log_variance, noise).cpu())
    return torch.cat(latents) if latents else torch.empty(0, model.latent_channels)


def _read(
    file: Path, belongs_to: Mapping[str, object]
) -> tuple[GaussianMixture, dict[str, float]] | None:
    """What the file holds if it was fitted for the same; a damaged one is fitted again."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if json.loads(metadata["belongs_to"]) != belongs_to:
                return None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            facts: dict[str, float] = json.loads(metadata["facts"])
            return GaussianMixture(**tensors), facts
    except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError):
        return None


def _write(
    file: Path,
    mixture: GaussianMixture,
    facts: dict[str, float],
    belongs_to: Mapping[str, object],
) -> str:
    """What became of it, as a sentence: with a read-only run folder the next command fits again."""
    tensors = {
        "log_weights": mixture.log_weights,
        "means": mixture.means,
        "factors": mixture.factors,
    }
    metadata = {"belongs_to": json.dumps(belongs_to), "facts": json.dumps(facts)}
    data = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, data)
    except OSError as error:
        return f"not kept: {error.strerror}"
    return f"kept in {file}"
