"""Losses of a step that compare reconstructions with images: perceptual and adversarial.

In: the forward of a microbatch. Out: what to add to its loss, the sums to log, and the backward of
the discriminator. Reconstructions are means of p(x|z); they are compared with images without the
noise of dequantisation. All of this is outside the wrapped forward, which stays that of a VAE:

    r = mean of p(x|z), a leaf;  g = d (perceptual + w adversarial) / dr;   loss += sum(r * g)

so the backward of these networks is done, and their memory free, before the VAE's backward begins,
and each graph is walked once.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Group
from vae_dist.distributed import Runtime
from vae_dist.models.vae import VAE, VAEOutput
from vae_dist.objectives.perceptual import PerceptualTerm
from vae_dist.training.adversarial import Adversary
from vae_dist.training.compile import exact_float32


class ReconstructionLosses:
    """Perceptual loss, adversarial loss, or both. Each step: `start_step`, `forward` for each
    microbatch, then `discriminator_step`.

    The discriminator's passes come after all of the VAE's: ranks may have different numbers of
    microbatches, and both wrapped modules send messages in their forward too, whose order must be
    the same on all ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        *,
        vae: VAE,
        perceptual: PerceptualTerm | None,
        adversary: Adversary | None,
    ) -> None:
        self.config, self.runtime, self.vae = config, runtime, vae
        self.perceptual, self.adversary = perceptual, adversary
        self._sums: dict[str, Tensor] = {}
        # images and reconstructions of each microbatch, no graph
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def start_step(self, step: int) -> None:
        self._sums, self._pairs = {}, []
        if self.adversary is not None:
            self.adversary.start_step(step)

    def reset(self) -> None:
        """Drop what a trial has left."""
        self._sums, self._pairs = {}, []
        if self.adversary is not None:
            self.adversary.reset()

    def forward(
        self, output: VAEOutput, images: Tensor, group: Group, loss_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(what to add to the loss for its gradient, what it adds to the loss as a number), sums
        over the images, nats."""
        stored = group.images.to(self.runtime.device, non_blocking=True)
        clean = self.vae.likelihood.without_noise(stored, images).detach()
        reconstructions = self.vae.likelihood.mean(output.params)
        leaf = reconstructions.detach().requires_grad_()
        value = torch.zeros((), device=leaf.device)
        gradient = main_gradient = torch.zeros_like(leaf)
        if self.perceptual is not None:
            is_exact = self.perceptual.needs_exact_float32
            with exact_float32(leaf.device) if is_exact else nullcontext():
                distance_sum = self.perceptual(leaf, clean).sum()
                term = distance_sum * (self.perceptual.weight * leaf[0].numel())
                (main_gradient,) = torch.autograd.grad(term, leaf)
            gradient, value = main_gradient, value + term.detach()
            self._add("train/perceptual", distance_sum.detach())
        adversary = self.adversary
        if adversary is not None and adversary.is_measuring:
            term, of_adversary = adversary.generator_loss(leaf, loss_scale)
            if adversary.weight_now is not None:
                gradient = gradient + adversary.weight_now * of_adversary
                value = value + adversary.weight_now * term
            self._add("train/adversarial", term / leaf[0].numel())
            adversary.record_gradients(
                *self._at_params(output, images, main_gradient, of_adversary)
            )
        if adversary is not None and adversary.is_learning:
            self._pairs.append((clean, leaf.detach()))
        return (reconstructions * gradient).sum(), value

    def _at_params(
        self, output: VAEOutput, images: Tensor, main: Tensor, adversarial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients at reconstructions -> at the decoder's output; that of the distortion joins the
        main one."""
        params = output.params.detach().requires_grad_()
        likelihood = self.vae.likelihood
        distortion = -likelihood.log_prob(params, images).sum()
        means = likelihood.mean(params)
        (of_main,) = torch.autograd.grad(
            distortion + (means * main).sum(), params, retain_graph=True
        )
        (of_adversary,) = torch.autograd.grad((means * adversarial).sum(), params)
        return of_main, of_adversary

    def discriminator_step(self, scale: Tensor) -> None:
        """The discriminator's backward on all microbatches."""
        pairs, self._pairs = self._pairs, []
        if self.adversary is not None:
            for number, pair in enumerate(pairs):
                self.adversary.discriminator_backward(
                    *pair, scale, is_last=number == len(pairs) - 1
                )

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    @property
    def sums(self) -> dict[str, Tensor]:
        """Over this rank's images, by the name of their mean."""
        return self._sums | (self.adversary.sums if self.adversary is not None else {})
