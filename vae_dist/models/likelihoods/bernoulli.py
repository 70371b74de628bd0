"""Grey images as black and white: log p = sum log sigmoid(image * logit), images -1 or +1.

How a grey level becomes black or white is `likelihood.binarization`:

    dynamic     white with probability level/255, drawn anew at each use (Salakhutdinov & Murray
                2008; Burda et al. 2016)
    static      the same draw, made once for each image (as Larochelle & Murray 2011 fixed one in a
                file): its noise is a hash of the image, so every use of an image gets the same.
                A flipped or moved image is another image
    threshold   white from half intensity on
    soft        not at all: the intensity t stays a target, sum t log p + (1 - t) log (1 - p). A
                cross-entropy, common in code, but the log-probability of no data: nats of it are no
                bound on a likelihood, and bits/dim are not defined
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_dist.models.likelihoods.base import Likelihood, widened
from vae_dist.models.likelihoods.levels import Levels, uniform_of_content


class Bernoulli(Likelihood):
    """`params` are logits."""

    def __init__(self, *, binarization: str, levels: Levels) -> None:
        super().__init__()
        self.binarization, self.levels = binarization, levels
        self.needs_uniform = binarization == "dynamic"
        self.has_levels = binarization != "soft"

    def num_params(self, channels: int) -> int:
        return channels

    def prepare(self, stored: Tensor, uniform: Tensor | None) -> Tensor:
        intensity = self.levels.intensity(stored)
        if self.binarization == "soft":
            return 2.0 * intensity - 1.0
        if self.binarization == "threshold":
            return torch.where(intensity < 0.5, -1.0, 1.0)
        if self.binarization == "static":
            uniform = uniform_of_content(stored)
        elif uniform is None:
            raise ValueError("a Bernoulli likelihood binarises with uniform noise: pass uniform=")
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

    def nats_to_level_nats(self, nll_nats: float, num_dims: int) -> float:
        if not self.has_levels:
            raise ValueError("soft targets have no likelihood, so no bits/dim")
        return nll_nats
