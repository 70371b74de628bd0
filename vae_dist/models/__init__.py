"""The model: convolutional towers, diagonal Gaussian posterior, likelihoods, one forward."""

from vae_dist.models.build import build_vae
from vae_dist.models.likelihoods import Likelihood, build_likelihood
from vae_dist.models.vae import VAE, VAEOutput

__all__ = ["VAE", "Likelihood", "VAEOutput", "build_likelihood", "build_vae"]
