"""A VAE whose evidence is known in closed form, to hold bounds and estimates against.

    z ~ N(0, I_L),  x | z ~ N(W z + b, s^2 I_D),  so  x ~ N(b, W W' + s^2 I)

The columns of W are orthogonal, so the exact posterior N(S W'(x - b) / s^2, S) has the diagonal
covariance S = (I + W'W / s^2)^-1 and lies in the family of `VAE`: the encoder is linear and exact.
`encoder_error` moves it away: every posterior mean by that many posterior standard deviations,
every log-variance by that number of nats. The gap of the ELBO is then known too.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods import build_likelihood
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator

NUM_LATENTS, NUM_DIMS = 3, 12
IMAGE_SIZE = (3, 4)
SCALES = (0.5, 0.3, 0.05)  # norms of the columns of W: two latents that matter, one that hardly
SIGMA = 0.15


class Linear(nn.Module):
    """Images to mean and log-variance (B, 2L) of q(z|x), or z to means of p(x|z) (B, 1, H, W)."""

    def __init__(self, weight, bias, **log_variance):
        super().__init__()
        for name, tensor in {"weight": weight, "bias": bias, **log_variance}.items():
            self.register_parameter(name, nn.Parameter(tensor.float()))

    def forward(self, inputs, _):
        mean = inputs.flatten(1) @ self.weight.T + self.bias
        if not hasattr(self, "log_variance"):
            return mean.unflatten(1, (1, *IMAGE_SIZE))
        return torch.cat([mean, self.log_variance.expand_as(mean)], 1)


@dataclass(frozen=True)
class LinearGaussian:
    model: VAE
    weight: Tensor  # W, float64 (D, L)
    bias: Tensor  # b, float64 (D,)
    marginal: MultivariateNormal  # p(x), over flattened images
    elbo_gap_nats: float  # log p(x) - ELBO = KL(q(z|x) || p(z|x)), the same for every x

    def log_evidence(self, x):
        """log p(x) in nats of prepared images (B, 1, H, W), float64 (B,)."""
        return self.marginal.log_prob(x.double().flatten(1))

    def images(self, num_images):
        """Draws of p(x) cut to 8 bits, uint8 (N, 1, H, W)."""
        generator = torch_generator(0, "linear-gaussian")
        z = torch.randn(num_images, NUM_LATENTS, dtype=torch.float64, generator=generator)
        noise = torch.randn(num_images, NUM_DIMS, dtype=torch.float64, generator=generator)
        levels = (127.5 * (z @ self.weight.T + self.bias + SIGMA * noise + 1)).round()
        return levels.clamp(0, 255).to(torch.uint8).unflatten(1, (1, *IMAGE_SIZE))

    def prepared(self, num_images):
        """The same, float32 in [-1, 1]."""
        return self.model.likelihood.prepare(self.images(num_images), None)


def linear_gaussian(*, encoder_error=0.0):
    generator = torch_generator(0, "linear-gaussian-weights")
    random = torch.randn(NUM_DIMS, NUM_LATENTS, dtype=torch.float64, generator=generator)
    weight = torch.linalg.qr(random)[0] * torch.tensor(SCALES, dtype=torch.float64)  # (D, L)
    bias = 0.1 * torch.randn(NUM_DIMS, dtype=torch.float64, generator=generator)
    variance = 1 / (1 + weight.square().sum(0) / SIGMA**2)  # S, the exact posterior's
    to_mean = variance.unsqueeze(1) * weight.T / SIGMA**2  # (L, D)
    offset = -to_mean @ bias + encoder_error * variance.sqrt()
    encoder = Linear(to_mean, offset, log_variance=variance.log() + encoder_error)
    knobs = LikelihoodConfig(kind="gaussian", variance="fixed", sigma=SIGMA)
    likelihood = build_likelihood(knobs, DataConfig(channels=1, dequantize=False))
    sizes = {"latent_channels": NUM_LATENTS, "stride": 1, "image_size": IMAGE_SIZE}
    model = VAE(encoder, Linear(weight, bias), likelihood, **sizes)
    noise = SIGMA**2 * torch.eye(NUM_DIMS, dtype=torch.float64)
    marginal = MultivariateNormal(bias, weight @ weight.T + noise)
    gap = NUM_LATENTS * 0.5 * (encoder_error**2 + math.expm1(encoder_error) - encoder_error)
    return LinearGaussian(model, weight, bias, marginal, gap)
