"""What is minimised, and how its weight and the learning rate move with the step."""

from vae_dist.objectives.elbo import LossTerms, loss_terms, noise_shape
from vae_dist.objectives.schedules import beta_at, lr_at

__all__ = ["LossTerms", "beta_at", "loss_terms", "lr_at", "noise_shape"]
