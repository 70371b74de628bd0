"""Grey images as black and white: log p = sum log sigmoid(image * logit), images -1 or +1.

How a grey level becomes black or white is `likelihood.binarization`:

    dynamic     white with probability level/255, drawn anew at each use (Salakhutdinov & Murray
                2008; Burda et al. 2016)
    static      the same draw, once for each image (as Larochelle & Murray 2011 fixed one in a
                file): its noise is a hash of the image; a flipped image is another image
    threshold   white from half intensity on
    soft        not at all: the intensity t stays a target, sum t log p + (1 - t) log (1 - p): a
                cross-entropy, the log-probability of no data, without bits/dim
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods.base import Likelihood, widened


class Bernoulli(Likelihood):
    """`params` are logits."""

    def __init__(self, config: LikelihoodConfig, data: DataConfig) -> None:
        super().__init__(config, data)
        self.binarization = config.binarization
        self.needs_uniform = self.binarization == "dynamic"
        self.has_levels = self.binarization != "soft"

    def prepare(self, stored: Tensor, uniform: Tensor | None) -> Tensor:
        intensity = self.levels.intensity(stored)
        if self.binarization == "soft":
            return 2.0 * intensity - 1.0
        if self.binarization == "threshold":
            return torch.where(intensity < 0.5, -1.0, 1.0)
        if self.binarization == "static":
            uniform = uniform_of_content(stored)
        assert uniform is not None
        return torch.where(uniform < intensity, 1.0, -1.0)

    def log_prob_of_values(self, params: Tensor, images: Tensor) -> Tensor:
        if self.binarization == "soft":
            target = (images + 1.0) / 2.0
            return target * params - F.softplus(params)
        return F.logsigmoid(images * params)

    def mean(self, params: Tensor) -> Tensor:
        return torch.tanh(0.5 * widened(params))  # 2 sigmoid(logit) - 1

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(params.shape, generator=generator, device=params.device)
        return torch.where(uniform < torch.sigmoid(widened(params)), 1.0, -1.0)


def uniform_of_content(stored: Tensor) -> Tensor:
    """Uniform noise in [0, 1), float32 of the shape of `stored` (B, C, H, W), that is a function of
    each image alone: the same at every use of an image, in every batch and process.

    A polynomial hash of an image's values, mixed with the place of each value (splitmix64).
    """
    values = stored.flatten(1)
    if values.dtype.is_floating_point:
        values = (values * 32767.0).round()
    values = values.long() + 1  # so that black pixels count
    place = torch.arange(values.shape[1], device=values.device)  # of a value in its image
    image_hash = (values * _mixed(place)).sum(1, keepdim=True)  # (B, 1), modulo 2^64
    mixed = _mixed(_mixed(image_hash) + place)  # (B, D)
    return ((mixed >> 40) & (2**24 - 1)).float().view(stored.shape) / 2.0**24


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, which wraps around as uint64 does."""
    x = x * -7046029254386353131 + 1442695040888963407
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))
