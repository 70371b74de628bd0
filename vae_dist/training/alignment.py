"""The alignment of a run: its frozen vision model, and the weight of its term.

In: the forward of each microbatch. Out: what to add to its loss, and one weight per step, from the
norms of two gradients with respect to z: that of the term is known outside of the forward, as

    p = projected z, a leaf;   g = d term / dp;   loss += w sum(p * g);   d term / dz = W^T g

and that of the decoder's loss is the gradient of `probe`, which the forward adds to z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.schema import TrainConfig
from vae_dist.distributed import Runtime, full_value
from vae_dist.models.vae import VAE, VAEOutput
from vae_dist.objectives.alignment import (
    VisionFeatures,
    alignment_distance,
    load_features,
    weight_at,
)
from vae_dist.training.adversarial import Sums, adaptive_weight

MAX_RATIO = 1e4  # of the two gradients, where the term's is nearly zero


class Alignment:
    """Each step: `start_step`; a call and `record_main` for each microbatch; then `update`."""

    def __init__(
        self, config: TrainConfig, runtime: Runtime, vae: VAE, *, has_features: bool
    ) -> None:
        """has_features: they come with the images, so the vision model is not needed."""
        self.runtime, self.objective = runtime, config.objective
        self._num_steps = config.training.steps
        assert isinstance(vae.projection, nn.Conv2d)
        self._projection, self._levels = vae.projection, vae.likelihood.levels
        self._model: VisionFeatures | None = None
        if not has_features:
            self._model = load_features(self.objective.alignment, runtime.device)
        self.ratio = torch.zeros((), device=runtime.device)  # lambda, of the next step
        self.start_step(0, Sums())

    @staticmethod
    def probe(latent_noise: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor:
        """What the forward adds to z, as a leaf."""
        noise = torch.zeros(tuple(shape), device=device) if latent_noise is None else latent_noise
        return noise.requires_grad_()

    def start_step(self, step: int, sums: Sums) -> None:
        """`sums`: where this step's are added, by the name of their mean."""
        weights = self.objective.alignment_weight, self.objective.alignment_final_weight
        self.weight = self.ratio * weight_at(*weights, step=step, num_steps=self._num_steps)
        self._sums = sums
        self._squares = torch.zeros(2, device=self.runtime.device)  # of main, of the term

    def __call__(
        self, output: VAEOutput, stored: Tensor, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(what to add to the loss for its gradient, what it adds to the loss as a number), sums
        over the images, nats. stored: these (b, C, H, W); features (b, W, h, w) that came with
        them, if they did."""
        assert output.projected is not None
        leaf = output.projected.detach().requires_grad_()
        cosine_margin, distance_margin = self.objective.alignment_margins
        with torch.autocast(leaf.device.type, enabled=False):
            if features is None:
                assert self._model is not None
                features = self._model(self._levels.centers(stored))
            distance = alignment_distance(
                leaf,
                features.to(leaf.device, non_blocking=True),
                cosine_margin=cosine_margin,
                distance_margin=distance_margin,
            )
        term = distance.sum() * stored[0].numel()
        (gradient,) = torch.autograd.grad(term, leaf)
        at_z = F.conv_transpose2d(gradient, full_value(self._projection.weight.detach()))
        self._squares[1] += at_z.square().sum()
        self._sums.add("train/alignment", distance.sum())
        weight = self.weight
        return (output.projected * (weight * gradient)).sum(), weight * term.detach()

    def record_main(self, probe: Tensor, scale: Tensor) -> None:
        """After the backward of the loss times `scale`."""
        assert probe.grad is not None
        self._squares[0] += (probe.grad / scale).square().sum()

    def update(self, *, skip: Tensor) -> None:
        """The next step's weight; `skip` = 1 leaves it."""
        main, term = self.runtime.sum_over_ranks(self._squares).sqrt()
        ratio = adaptive_weight(main, term, largest=MAX_RATIO)
        self.ratio = torch.where(torch.isfinite(ratio) & (skip == 0), ratio, self.ratio)
