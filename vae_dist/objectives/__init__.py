"""What is minimised, and how its weight and the learning rate move with the step."""

from vae_dist.objectives.elbo import LossTerms, elbo_terms
from vae_dist.objectives.schedules import beta_at, lr_at

__all__ = ["LossTerms", "beta_at", "elbo_terms", "lr_at"]
