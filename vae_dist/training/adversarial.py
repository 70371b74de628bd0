"""Losses of a step that compare reconstructions with images: perceptual and adversarial.

In: the forward of a microbatch. Out: what to add to its loss, and one update of the discriminator
per step, beside the generator's and skipped with it. Reconstructions are means of p(x|z), compared
with images without the noise of dequantisation. For each image, with r = mean of p(x|z):

    discriminator   1/2 mean relu(1 - D(x)) + 1/2 mean relu(1 + D(r))          means over logits
    generator       w(k) * C*H*W * (-mean D(r))         w(k) = weight * ramp(k) * lambda(k)
    lambda(k + 1) = min(|G_main(k)| / |G_adv(k)|, max_weight)

G_main and G_adv are the gradients of distortion and perceptual term, and of the generator's term at
w = 1, at the weights of the decoder's last layer (Esser et al. 2021), each summed over all images
of step k and all ranks. The ratio is used from the next step on, so that microbatches and ranks do
not change it. The wrapped forward stays that of a VAE:

    r is a leaf;   g = d (perceptual + w adversarial) / dr;   loss += sum(r * g)

so the backward of these networks is done, and their memory free, before the VAE's backward begins,
and each graph is walked once. Both updates use what both networks were at the start of the step.

Generator's side: the discriminator's weights are constants. Discriminator's side: reconstructions
are constants, and the forward is the wrapped one: its last backward of a step sums over the ranks.
It comes after all passes of the VAE: ranks may have different numbers of microbatches, and both
wrapped modules send messages in their forward too, whose order must be the same on all ranks.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

from vae_dist.config.schema import AdversarialConfig, OptimizerConfig, TrainConfig
from vae_dist.distributed import Runtime, full_value, load_full
from vae_dist.models.discriminator import build_discriminator
from vae_dist.models.towers import Decoder
from vae_dist.models.vae import VAE, VAEOutput
from vae_dist.objectives.perceptual import PerceptualTerm
from vae_dist.training.compile import exact_float32
from vae_dist.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    scale_and_clip,
    update,
)

Tensors = dict[str, Tensor]


class Sums(dict[str, Tensor]):
    """Sums over a rank's images of a step, by the name of their mean."""

    def add(self, name: str, value: Tensor) -> None:
        self[name] = self[name] + value.detach() if name in self else value.detach()


def first_step_of_generator(config: AdversarialConfig) -> int:
    """The step from which the generator's term counts."""
    return config.start_step + config.warmup_steps


def ramp_at(config: AdversarialConfig, step: int) -> float:
    """Part of the weight that counts at step `step`: 0, then a linear rise, then 1."""
    since = step - first_step_of_generator(config)
    if since < 0:
        return 0.0
    return min(1.0, (since + 1) / max(config.ramp_steps, 1))


def mean_logits(logits: Tensor) -> Tensor:
    """(B, 1, H', W') -> (B,)."""
    return logits.flatten(1).mean(1)


def hinge_loss(on_real: Tensor, on_fake: Tensor) -> Tensor:
    """Of the discriminator, for each pair of a picture and its reconstruction, (B,)."""
    return 0.5 * (mean_logits(F.relu(1.0 - on_real)) + mean_logits(F.relu(1.0 + on_fake)))


def adaptive_weight(main: Tensor, adversarial: Tensor, *, largest: float) -> Tensor:
    """Ratio of the norms of two gradients, 0-dim; not finite where they are not."""
    tiny = torch.finfo(torch.float32).tiny
    ratio = torch.linalg.vector_norm(main) / (torch.linalg.vector_norm(adversarial) + tiny)
    # a comparison, not clamp: an infinite ratio of finite gradients is the largest one
    return torch.where(ratio > largest, largest, ratio)


class Adversary:
    """The discriminator of a run: its weights, its optimizer, and the weight of its loss.

    Each step: `start_step`; for each microbatch `generator_loss` and `record_gradients`, and a pair
    to learn from, as the flags of the step say; then `discriminator_step`, `clip` and `update`.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, vae: VAE) -> None:
        self.config, self.runtime = config.adversarial, runtime
        network = build_discriminator(
            self.config, image_channels=config.data.channels, seed=config.seed
        )
        self.network = network.to(runtime.device)
        # DDP also where the VAE is sharded: it is small, and its weights are constants
        # of the VAE's loss
        self.wrapped = runtime.replicated.wrap(self.network)
        # no weight decay, which would pull its logits to zero
        options = OptimizerConfig(
            lr=self.config.lr, betas=self.config.betas, eps=config.optimizer.eps, weight_decay=0.0
        )
        self.optimizer = build_optimizer(self.network, options)
        self._constants = {name: p.detach() for name, p in self.network.named_parameters()}
        self._last_layer = LastLayer(vae)
        self.weight = torch.zeros((), device=runtime.device)  # lambda, of the next step
        self.start_step(0, Sums())

    def start_step(self, step: int, sums: Sums) -> None:
        """`sums`: where this step's are added. What an earlier step has left is dropped."""
        self.is_learning = step >= self.config.start_step
        # from one step before the ratio is first used
        self.is_measuring = self.is_learning and step + 1 >= first_step_of_generator(self.config)
        ramp = ramp_at(self.config, step)
        self.weight_now = self.weight * (self.config.weight * ramp) if ramp else None
        self._sums = sums
        self._gradients: list[Tensor] = []  # at the last layer, of main and adversarial terms
        self.pairs: list[tuple[Tensor, Tensor]] = []  # images, reconstructions without a graph
        self._last_layer.watch(wanted=self.is_measuring)

    def generator_loss(self, reconstructions: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(C*H*W * -mean logit summed over the images, its gradient) of reconstructions that are a
        leaf. `scale` keeps the gradients of an fp16 backward above zero."""
        logits = functional_call(self.network, self._constants, (reconstructions,))
        term = -mean_logits(logits).sum()
        (gradient,) = torch.autograd.grad(term * scale, reconstructions)
        dims = reconstructions[0].numel()  # outside the fp16 backward, which would overflow
        value = term.detach() * dims
        self._sums.add("train/adversarial", value / dims)
        return value, gradient * (dims / scale)

    def record_gradients(self, main: Tensor, adversarial: Tensor) -> None:
        """Gradients with respect to the decoder's output (b, P, H, W), of this microbatch."""
        found = self._last_layer.gradients([main, adversarial])
        if self._gradients:
            torch._foreach_add_(self._gradients, found)
        else:
            self._gradients = found

    def discriminator_step(self, scale: Tensor) -> None:
        """Backward of the discriminator's loss times `scale` on all pairs of the step."""
        while self.pairs:
            images, reconstructions = self.pairs.pop(0)
            with self.runtime.replicated.accumulate(self.wrapped, is_last=not self.pairs):
                on_real, on_fake = self.wrapped(torch.cat([images, reconstructions])).chunk(2)
                loss = hinge_loss(on_real, on_fake).sum()
                (loss * scale).backward()
            self._sums.add("train/discriminator_loss", loss)
            self._sums.add("train/logits_real", mean_logits(on_real).sum())
            self._sums.add("train/logits_fake", mean_logits(on_fake).sum())

    def clip(self, loss_scale: Tensor) -> Tensor:
        """Norm of the gradient over all ranks, before it is clipped; not finite where it is not."""
        largest = self.config.clip_grad_norm
        return scale_and_clip(self.network.parameters(), loss_scale, largest=largest)

    def update(self, lr_factor: float, *, skip: Tensor) -> None:
        """One step of the optimizer, and the next step's weight; `skip` = 1 leaves both."""
        update(self.optimizer, self.config.lr * lr_factor, skip=skip)
        if self.is_measuring:
            both = torch.stack([gradient.flatten() for gradient in self._gradients])
            main, adversarial = self.runtime.sum_over_ranks(both)
            ratio = adaptive_weight(main, adversarial, largest=self.config.max_weight)
            self.weight = torch.where(torch.isfinite(ratio) & (skip == 0), ratio, self.weight)

    def tensors(self) -> dict[str, Tensors]:
        """What a checkpoint holds beside the VAE's."""
        return {
            "discriminator": self.network.state_dict(),
            "discriminator_optimizer": optimizer_tensors(self.optimizer, self.network),
        }

    def load(self, tensors: dict[str, Tensors], weight: float) -> None:
        """A checkpoint without a discriminator, of a run that goes on with one, gives nothing."""
        if "discriminator" in tensors:
            load_full(self.network, tensors["discriminator"])
            state = tensors["discriminator_optimizer"]
            load_optimizer_tensors(self.optimizer, self.network, state)
            self.weight.fill_(weight)


class LastLayer:
    """Gradients at the weights of the decoder's last convolution, without its backward.

    A hook keeps the output of the last level, so that no graph is walked twice. The features that
    enter the convolution are computed from it again: where gradient checkpointing is on, what lies
    between runs once more in the backward and holds its inputs until then.
    """

    def __init__(self, vae: VAE) -> None:
        assert isinstance(vae.decoder, Decoder), "the checks refuse adversarial.* with dense towers"
        self._layer, self._norm = vae.decoder.conv_out, vae.decoder.conv_norm_out
        self._shape = self._layer.weight.shape
        self.watch(wanted=False)
        vae.decoder.up_blocks[-1].register_forward_hook(self._keep)

    def watch(self, *, wanted: bool) -> None:
        """Whether to keep the next output; drops the one before."""
        self.is_watching, self._kept = wanted, torch.empty(0)

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        # the first pass of a forward is the one of its params: another may follow at half size
        if self.is_watching:
            self.is_watching, self._kept = False, output.detach()

    @torch.no_grad()
    def gradients(self, of_params: list[Tensor]) -> list[Tensor]:
        """Of sums over the images, float32, given the gradients of the decoder's cropped output.
        The next pass is watched."""
        norm, kept = self._norm, self._kept.float()
        weight, bias = full_value(norm.weight), full_value(norm.bias)
        features = F.silu(F.group_norm(kept, norm.num_groups, weight, bias, norm.eps))
        self.watch(wanted=True)
        *_, channels, height, width = of_params[0].shape
        patch = math.isqrt(self._shape[0] // channels)  # pixels that one position stands for
        bottom = features.shape[-2] * patch - height
        right = features.shape[-1] * patch - width
        padding = self._layer.padding
        whole = [F.pixel_unshuffle(F.pad(g, (0, right, 0, bottom)), patch) for g in of_params]
        return [conv2d_weight(features, self._shape, one, padding=padding) for one in whole]


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
            with exact_float32() if is_exact else nullcontext():
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
            adversary.pairs.append((clean, leaf.detach()))
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
