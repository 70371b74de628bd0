"""The discriminator of a run: its weights, its optimizer, and the weight of its loss.

In: images and reconstructions of each microbatch. Out: gradients for the reconstructions, and one
update of the discriminator per step, beside the generator's and skipped with it. Both updates use
what both networks were at the start of the step, so a reconstruction is computed once.

Generator's side: the discriminator's weights are constants. Discriminator's side: reconstructions
are constants, and the forward is the wrapped one: its last backward of a step sums over the ranks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

from vae_dist.config.schema import OptimizerConfig, TrainConfig
from vae_dist.distributed import Runtime, full_value, load_full
from vae_dist.models.conv import Decoder
from vae_dist.models.discriminator import PatchDiscriminator
from vae_dist.models.vae import VAE
from vae_dist.objectives.adversarial import (
    adaptive_weight,
    first_step_of_generator,
    hinge_loss,
    mean_logits,
    r1_penalty,
    ramp_at,
)
from vae_dist.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    scale_and_clip,
)

Tensors = dict[str, Tensor]


class Adversary:
    """Each step: `start_step`, `generator_loss` and `record_gradients` for each microbatch, then
    `discriminator_backward` for each, then `clip` and `update`."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        *,
        network: PatchDiscriminator,
        vae: VAE,
    ) -> None:
        self.config, self.runtime = config.adversarial, runtime
        self.network = network
        # DDP also where the VAE is sharded: it is small, and its weights are constants
        # of the VAE's loss. Not compiled: such a graph has no second derivatives, which R1 takes.
        self.wrapped = runtime.replicated.wrap(network)
        self.optimizer = build_optimizer(network, optimizer_config(config))
        self._parameters = list(network.parameters())
        self._constants = {name: p.detach() for name, p in network.named_parameters()}
        self._last_layer = LastLayer(vae)
        self.weight = torch.zeros((), device=runtime.device)  # lambda, of the next step
        self.sums: dict[str, Tensor] = {}  # of this rank's images, by the name of their mean
        self._gradients: list[Tensor] = []  # at the last layer, of main and adversarial terms
        self.start_step(0)
        self.reset()

    def start_step(self, step: int) -> None:
        self.is_learning = step >= self.config.start_step
        # from one step before the ratio is first used
        self.is_measuring = self.is_learning and step + 1 >= first_step_of_generator(self.config)
        self._uses_r1 = self.config.r1 > 0 and step % self.config.r1_every == 0
        ramp = ramp_at(self.config, step)
        self.weight_now = self.weight * (self.config.weight * ramp) if ramp else None
        self._gradients = []
        self.sums = {}
        self._last_layer.watch(wanted=self.is_measuring)

    def reset(self) -> None:
        """Drop what forwards, such as those of a trial, have left."""
        self._gradients, self.sums = [], {}
        self._last_layer.watch(wanted=False)

    def generator_loss(self, reconstructions: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(C*H*W * -mean logit summed over the images, its gradient) of reconstructions that are a
        leaf. `scale` keeps the gradients of an fp16 backward above zero."""
        logits = functional_call(self.network, self._constants, (reconstructions,))
        term = -mean_logits(logits).sum()
        (gradient,) = torch.autograd.grad(term * scale, reconstructions)
        dims = reconstructions[0].numel()  # outside the fp16 backward, which would overflow
        return term.detach() * dims, gradient * (dims / scale)

    def record_gradients(self, main: Tensor, adversarial: Tensor) -> None:
        """Gradients with respect to the decoder's output (b, P, H, W), of this microbatch."""
        found = self._last_layer.gradients([main, adversarial])
        if self._gradients:
            torch._foreach_add_(self._gradients, found)
        else:
            self._gradients = found

    def discriminator_backward(
        self, images: Tensor, reconstructions: Tensor, scale: Tensor, *, is_last: bool
    ) -> None:
        """Backward of the discriminator's loss on a microbatch, both without a graph."""
        with self.runtime.replicated.accumulate(self.wrapped, is_last=is_last):
            real = images.requires_grad_(self._uses_r1)
            on_real, on_fake = self.wrapped(torch.cat([real, reconstructions])).chunk(2)
            loss = hinge_loss(on_real, on_fake).sum()
            total = loss
            if self._uses_r1:
                factor = self.config.r1 * self.config.r1_every
                total = loss + factor * r1_penalty(on_real, real).sum()
            (total * scale).backward()
        self._add("train/discriminator_loss", loss)
        self._add("train/logits_real", mean_logits(on_real).sum())
        self._add("train/logits_fake", mean_logits(on_fake).sum())

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def clip(self, loss_scale: Tensor, *, is_scaled: bool) -> Tensor:
        """Norm of the gradient over all ranks, before it is clipped; not finite where it is not."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        largest = self.config.clip_grad_norm
        return scale_and_clip(gradients, loss_scale, largest=largest, is_scaled=is_scaled)

    def update(self, lr_factor: float, *, skip: Tensor) -> None:
        """One step of the optimizer, and the next step's weight; `skip` = 1 leaves both."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.is_measuring:
            self._update_weight(skip)

    def _update_weight(self, skip: Tensor) -> None:
        both = torch.stack([gradient.flatten() for gradient in self._gradients])
        main, adversarial = self.runtime.sum_over_ranks(both)
        ratio = adaptive_weight(main, adversarial, largest=self.config.max_weight)
        self.weight = torch.where(torch.isfinite(ratio) & (skip == 0), ratio, self.weight)

    # what a checkpoint holds

    def tensors(self) -> dict[str, Tensors]:
        return {
            "discriminator": self.network.state_dict(),
            "discriminator_optimizer": optimizer_tensors(self.optimizer, self.network),
        }

    def scalars(self) -> dict[str, float]:
        return {"adversarial_weight": float(self.weight)}

    def load(self, tensors: dict[str, Tensors], scalars: dict[str, float]) -> None:
        """A checkpoint without a discriminator, of a run that goes on with one, gives nothing."""
        if "discriminator" not in tensors:
            return
        load_full(self.network, tensors["discriminator"])
        optimizer_state = tensors["discriminator_optimizer"]
        load_optimizer_tensors(self.optimizer, self.network, optimizer_state)
        self.weight.fill_(scalars["adversarial_weight"])


def optimizer_config(config: TrainConfig) -> OptimizerConfig:
    """Of the discriminator: no weight decay, which would pull its logits to zero."""
    adversarial = config.adversarial
    return OptimizerConfig(
        lr=adversarial.lr, betas=adversarial.betas, eps=config.optimizer.eps, weight_decay=0.0
    )


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
        self.is_watching = False  # for the next pass
        self._kept: Tensor | None = None
        vae.decoder.up_blocks[-1].register_forward_hook(self._keep)

    def watch(self, *, wanted: bool) -> None:
        """Whether to keep the next output; drops the one before."""
        self.is_watching, self._kept = wanted, None

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        # the first pass of a forward is the one of its params: another may follow at half size
        if self.is_watching:
            self.is_watching, self._kept = False, output.detach()

    def gradients(self, of_params: list[Tensor]) -> list[Tensor]:
        """Of sums over the images, float32, given the gradients of the decoder's cropped output.
        The next pass is watched."""
        assert self._kept is not None, "no forward has been watched"
        features = self._features(self._kept)
        self.watch(wanted=True)
        channels = of_params[0].shape[1]
        patch = math.isqrt(self._shape[0] // channels)  # pixels that one position stands for
        bottom = features.shape[-2] * patch - of_params[0].shape[-2]
        right = features.shape[-1] * patch - of_params[0].shape[-1]
        return [
            conv2d_weight(
                features,
                self._shape,
                F.pixel_unshuffle(F.pad(gradient, (0, right, 0, bottom)), patch),
                padding=self._layer.padding,
            )
            for gradient in of_params
        ]

    @torch.no_grad()
    def _features(self, kept: Tensor) -> Tensor:
        norm = self._norm
        weight, bias = full_value(norm.weight), full_value(norm.bias)
        return F.silu(F.group_norm(kept.float(), norm.num_groups, weight, bias, norm.eps))
