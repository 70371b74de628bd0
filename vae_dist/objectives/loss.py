"""From a config and a forward's output to what is minimised."""

from __future__ import annotations

from torch import Tensor

from vae_dist.config.schema import ObjectiveConfig
from vae_dist.models.vae import VAEOutput
from vae_dist.objectives.elbo import LossTerms, elbo_terms
from vae_dist.objectives.importance import importance_terms


def noise_shape(
    config: ObjectiveConfig, num_images: int, latent: tuple[int, ...]
) -> tuple[int, ...]:
    """Of the noise that the forward of `num_images` images is given."""
    draws = () if config.importance_samples == 1 else (config.importance_samples,)
    return (num_images, *draws, *latent)


def loss_terms(
    output: VAEOutput,
    config: ObjectiveConfig,
    *,
    beta: float | Tensor,
    half_size: Tensor | None = None,
) -> LossTerms:
    """Of a forward on noise of `noise_shape`; `half_size` is its second output, log p (B,)."""
    if config.importance_samples == 1:
        terms = elbo_terms(output, beta=beta, free_bits=config.free_bits)
        if half_size is None:
            return terms
        distortion = -half_size.sum()
        return terms._replace(loss_sum=terms.loss_sum + config.scale_equivariance * distortion)
    return importance_terms(
        output,
        beta=beta,
        free_bits=config.free_bits,
        doubly_reparameterized=config.gradient == "doubly_reparameterized",
    )
