"""A mixture of Gaussians fitted to the aggregate posterior of a trained model, as its prior p(z).

    q(z) = 1/N sum_i q(z|x_i) over training images
    p(z) = sum_m pi_m N(z; mu_m, S_m),   S_m diagonal or full, fitted by EM to draws of q(z)

The decoder was trained on draws of q(z), so latents of the mixture lie where it has seen any;
N(0, I) also covers the rest. One draw of each image, which belongs to (run seed, image).
scikit-learn fits, from k-means, in float64. The fit, which may take minutes, is a function of
weights, images and K; `priors/` of the run folder keeps it. Vector latents only: a spatial latent
has thousands of dimensions whose correlations no K Gaussians hold.

Legend: N latents, d dimensions, M components.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, distributions

from vae_dist.config.checks import mixture_prior
from vae_dist.config.commands import EvaluateCommand, SampleCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.loader import EvaluationBatch
from vae_dist.evaluation.run import inputs_of
from vae_dist.files import read_bounded, write_durably
from vae_dist.inference.load import LoadedModel, open_images, weights_digest
from vae_dist.models.latent import sample_posterior
from vae_dist.models.vae import VAE
from vae_dist.randomness import derive_seed, draws

FULL_UP_TO = 64  # latents; above, a full covariance has more numbers than most data sets determine
MAX_ITERATIONS = 500
TOLERANCE_NATS = 1e-5  # per latent and iteration; EM ends when it gains less
MAX_BYTES = 2**28  # of a file that keeps a fit
FLOOR = 1e-4  # added to each variance, part of the mean variance of the latents


@dataclass(frozen=True)
class GaussianMixture:
    log_weights: Tensor  # (M,)
    means: Tensor  # (M, d)
    factors: Tensor  # S_m = L L': the diagonals (M, d) of L, or lower triangular L (M, d, d)
    description: str = ""  # in a sentence, for people

    def to(self, device: torch.device) -> GaussianMixture:
        weights, means = self.log_weights.to(device), self.means.to(device)
        return replace(self, log_weights=weights, means=means, factors=self.factors.to(device))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats for latents (N, d), float64 (N,)."""
        if self.factors.ndim == 2:
            components: Any = distributions.Normal(self.means, self.factors)
            components = distributions.Independent(components, 1)
        else:
            components = distributions.MultivariateNormal(self.means, scale_tril=self.factors)
        weights = distributions.Categorical(logits=self.log_weights)
        mixture = distributions.MixtureSameFamily(weights, components)
        log_prob: Tensor = mixture.log_prob(z.double())
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


def fit_mixture(z: Tensor, num_components: int, covariance: str, *, seed: int) -> GaussianMixture:
    """The mixture of `covariance` diagonal or full that EM finds for latents (N, d), on the CPU."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Estimator
    from threadpoolctl import threadpool_limits

    z = z.double().cpu()
    floor = FLOOR * max(float(z.var(0, correction=0).mean()), torch.finfo(torch.float32).tiny)
    estimator = Estimator(
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
    return GaussianMixture(
        torch.from_numpy(estimator.weights_).log(),
        torch.from_numpy(estimator.means_),
        torch.linalg.cholesky(spread) if covariance == "full" else spread.sqrt(),
    )


def fitted_prior(loaded: LoadedModel, command: SampleCommand | EvaluateCommand) -> GaussianMixture:
    """The mixture that `command.prior` asks for, read from the run folder or fitted; for one
    process only. Raises ConfigError for a model or data that it cannot be fitted to."""
    num_components, covariance = mixture_prior(command.prior)
    model, config, dims = loaded.model, loaded.config, loaded.model.latent_channels
    if model.image_size is None:
        raise ConfigError(
            f"prior={command.prior}: a mixture is fitted to vector latents, and this model has a "
            "spatial one; train with model.latent=vector, or use prior=normal"
        )
    if not find_spec("sklearn"):  # before all images are encoded
        raise ConfigError("prior=gmm:K needs scikit-learn: pip install 'vae_dist[metrics]'")
    covariance = covariance or ("full" if dims <= FULL_UP_TO else "diagonal")
    images = open_images(config, config.data.train, create=False, key="data.train")
    count = min(command.prior_images or images.index.num_samples, images.index.num_samples)
    said = f"{num_components} Gaussians, {covariance} covariance, of the first {count} images"
    of = f"{said} {weights_digest(model)} {images.index.fingerprint} {config.seed}"
    digest = hashlib.blake2b(of.encode(), digest_size=8).hexdigest()
    file = Path(command.run) / "priors" / f"gmm{num_components}_{covariance}_{digest}.safetensors"
    spread = (dims, dims) if covariance == "full" else (dims,)
    shapes = {"log_weights": (), "means": (dims,), "factors": spread}
    if kept := _read(file, {name: (num_components, *shape) for name, shape in shapes.items()}):
        return replace(kept, description=f"{said} ({file})")
    stream = images.stream(batch_size=command.batch_size, max_images=count)
    z = aggregate_posterior(model, stream, seed=config.seed)
    if len(z) < num_components:
        raise ConfigError(
            f"prior={command.prior}: {len(z)} training images could be read, fewer than "
            "components; ask for fewer"
        )
    fitted = fit_mixture(z, num_components, covariance, seed=config.seed)
    tensors = {name: getattr(fitted, name).contiguous() for name in shapes}
    with suppress(OSError):  # a folder that cannot be written: the next command fits again
        file.parent.mkdir(exist_ok=True)
        write_durably(file, safetensors.torch.save(tensors))
    return replace(fitted, description=said)


def _read(file: Path, shapes: dict[str, tuple[int, ...]]) -> GaussianMixture | None:
    """What is kept in the file; None where there is none, or another."""
    try:
        tensors = safetensors.torch.load(read_bounded(file, MAX_BYTES))
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        return None
    weights, means, factors = (tensors[name].double() for name in shapes)
    return GaussianMixture(weights, means, factors)


@torch.inference_mode()
def aggregate_posterior(model: VAE, batches: Iterable[EvaluationBatch], *, seed: int) -> Tensor:
    """One draw of q(z|x) for each readable image, float32 (N, d) on CPU."""
    device = next(model.parameters()).device
    latents = [torch.empty(0, model.latent_channels)]
    for batch in batches:
        if (batch.weights > 0).any():
            inputs = inputs_of(model, batch, seed=seed, device=device, purpose="aggregate-levels")
            mean, log_variance = model.encode(inputs.images, inputs.labels, inputs.mask)
            shape = tuple(mean.shape[1:])
            noise = draws(torch.randn, seed, "aggregate-posterior", inputs.samples, shape)
            latents.append(sample_posterior(mean, log_variance, noise.to(device)).cpu())
    return torch.cat(latents)
