"""Losses of a step that compare reconstructions with images: perceptual and adversarial.

In: the forward of a microbatch. Out: what to add to its loss. Reconstructions are means of p(x|z);
they are compared with images without the noise of dequantisation. All of this is outside the
wrapped forward, which stays that of a VAE:

    r = mean of p(x|z), a leaf;  g = d (perceptual + w adversarial) / dr;   loss += sum(r * g)

so the backward of these networks is done, and their memory free, before the VAE's backward begins,
and each graph is walked once.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from vae_dist.models.vae import VAE, VAEOutput
from vae_dist.objectives.perceptual import PerceptualTerm
from vae_dist.training.adversarial import Adversary, Sums
from vae_dist.training.compile import exact_float32


class ReconstructionLosses:
    """Perceptual loss, adversarial loss, or both. Each step: `start_step`, then a call for each
    microbatch."""

    def __init__(
        self, vae: VAE, perceptual: PerceptualTerm | None, adversary: Adversary | None
    ) -> None:
        self.vae, self.perceptual, self.adversary = vae, perceptual, adversary

    def start_step(self, step: int, sums: Sums) -> None:
        """`sums`: where this step's are added, by the name of their mean."""
        self._sums = sums
        if self.adversary is not None:
            self.adversary.start_step(step, sums)

    def __call__(
        self, output: VAEOutput, images: Tensor, stored: Tensor, loss_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(what to add to the loss for its gradient, what it adds to the loss as a number), sums
        over the images, nats. `images`: those of the forward, as `prepare` made them of `stored`.
        """
        clean = self.vae.likelihood.without_noise(stored, images).detach()
        reconstructions = self.vae.likelihood.mean(output.params)
        leaf = reconstructions.detach().requires_grad_()
        value = torch.zeros((), device=leaf.device)
        gradient = main = torch.zeros_like(leaf)
        if self.perceptual is not None:
            is_exact = self.perceptual.needs_exact_float32
            with exact_float32(leaf.device) if is_exact else nullcontext():
                distance_sum = self.perceptual(leaf, clean).sum()
                term = distance_sum * (self.perceptual.weight * leaf[0].numel())
                (main,) = torch.autograd.grad(term, leaf)
            gradient, value = main, value + term.detach()
            self._sums.add("train/perceptual", distance_sum)
        adversary = self.adversary
        if adversary is not None and adversary.is_measuring:
            term, of_adversary = adversary.generator_loss(leaf, loss_scale)
            if adversary.weight_now is not None:
                gradient = gradient + adversary.weight_now * of_adversary
                value = value + adversary.weight_now * term
            adversary.record_gradients(*self._at_params(output, images, main, of_adversary))
        if adversary is not None and adversary.is_learning:
            adversary.keep_pair(clean, leaf.detach())
        return (reconstructions * gradient).sum(), value

    def _at_params(
        self, output: VAEOutput, images: Tensor, main: Tensor, adversarial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients at reconstructions -> at the decoder's output; that of the distortion joins the
        main one."""
        params, likelihood = output.params.detach().requires_grad_(), self.vae.likelihood
        means = likelihood.mean(params)
        loss = (means * main).sum() - likelihood.log_prob(params, images).sum()
        (of_main,) = torch.autograd.grad(loss, params, retain_graph=True)
        (of_adversary,) = torch.autograd.grad((means * adversarial).sum(), params)
        return of_main, of_adversary
