"""Grey images as black and white: log p = sum log sigmoid(image * logit), images -1 or +1.

How a grey level becomes black or white is `likelihood.binarization`:

    dynamic     white with probability level/255, drawn anew at each use (Salakhutdinov & Murray
                2008; Burda et al. 2016)
    threshold   white from half intensity on: that of data that are binarised in their files too
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

    def num_params(self, channels: int) -> int:
        return channels

    def prepare(self, stored: Tensor, uniform: Tensor | None) -> Tensor:
        intensity = self.levels.intensity(stored)
        if self.binarization == "soft":
            return 2.0 * intensity - 1.0
        if self.binarization == "threshold":
            return torch.where(intensity < 0.5, -1.0, 1.0)
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
