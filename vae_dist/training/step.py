"""One optimizer step: draws, microbatches, clipping, agreement on finiteness, updates, average.

In: a rank's share of batch k. Out: device tensors to log. What is minimised is
`sum over images of their loss / batch_size` (vae_dist.objectives); DDP and FSDP average gradients
over ranks, so each rank backpropagates `world * sum over its images / batch_size`. All draws are
functions of (seed, purpose, k, slot), so neither the number of ranks nor the microbatch changes
them. A microbatch holds slots of one shape; ranks may have different numbers of microbatches, but
each has one backward that sums gradients over the ranks, its last.
With a discriminator (`adversary`) there are two networks and two updates: a gradient of either that
is not finite leaves both as they are.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Batch, Group
from vae_dist.distributed import Runtime, load_full
from vae_dist.models.vae import NO_LABEL, VAE
from vae_dist.objectives.elbo import loss_terms, noise_shape
from vae_dist.objectives.schedules import beta_at, lr_at
from vae_dist.randomness import derive_seed
from vae_dist.training.adversarial import Adversary
from vae_dist.training.guards import SpikeGuard
from vae_dist.training.losses import ReconstructionLosses
from vae_dist.training.optimizer import (
    Ema,
    load_optimizer_tensors,
    optimizer_tensors,
    scale_and_clip,
)


class StepReport(NamedTuple):
    """Sums over this rank's images (0-dim tensors, nats), and what all ranks share."""

    loss_sum: torch.Tensor
    distortion_sum: torch.Tensor
    rate_sum: torch.Tensor
    neg_bound_sum: torch.Tensor
    num_dims: torch.Tensor  # values that the likelihood counts, int64
    grad_norm: torch.Tensor  # before clipping, over all ranks
    found_inf: torch.Tensor  # 1.0 where the norm was not finite, so that nothing was updated
    spike: torch.Tensor  # 1.0 where it was a spike, likewise
    lr: float
    beta: float
    more_sums: Mapping[str, torch.Tensor] = MappingProxyType({})  # local too, by name of the mean
    shared: Mapping[str, torch.Tensor] = MappingProxyType({})  # by name


class LossScale:
    """Dynamic scale of an fp16 loss, on the device: halved by an overflow, doubled in time."""

    GROWTH_INTERVAL = 2000  # steps, as torch.amp.GradScaler

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, found_inf: torch.Tensor) -> None:
        if not self.enabled:
            return
        self.good_steps = (self.good_steps + 1) * (1 - found_inf)
        grow = self.good_steps >= self.GROWTH_INTERVAL
        self.good_steps = torch.where(grow, 0.0, self.good_steps)
        factor = torch.where(found_inf > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale = self.scale * factor

    def state(self) -> dict[str, float]:
        return {"loss_scale": float(self.scale), "good_steps": float(self.good_steps)}

    def load_state(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["loss_scale"])
        self.good_steps.fill_(state["good_steps"])


class Transfer:
    """Callable: `batch -> batch`, whose tensors may be used on the current stream at once.

    A batch in pinned memory is copied beside the computation of the step before. The host runs
    ahead of a CUDA device: the copy goes on a stream of its own, which the copy engine serves
    meanwhile, and the computing stream waits for it on the device. Pinned memory is not given out
    again before the copy is done: torch's caching allocator of pinned memory sees to that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            groups = tuple(self._moved(group) for group in batch.groups)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for group in groups:
            for tensor in (group.images, group.masks):
                if tensor is not None:
                    # its memory belongs to the copying stream and is used on the other one
                    tensor.record_stream(computing)
        return batch._replace(groups=groups)

    def _moved(self, group: Group) -> Group:
        """Labels stay: some of them may be hidden, by draws on the host."""
        images = group.images.to(self._device, non_blocking=True)
        masks = group.masks
        if masks is not None:
            masks = masks.to(self._device, non_blocking=True)
        return group._replace(images=images, masks=masks)


def _scaled_normal(part: torch.Tensor, *, generator: torch.Generator) -> None:
    """Normal noise, for each image (dimension 0) times the size of another normal draw."""
    sizes = torch.randn(len(part), generator=generator).abs()
    part.normal_(generator=generator).mul_(sizes.view(-1, *[1] * (part.ndim - 1)))


class TrainingStep:
    """Callable: `(batch, step) -> StepReport`, and the model is one step further."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        *,
        wrapped: nn.Module,
        vae: VAE,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        losses: ReconstructionLosses | None = None,
    ) -> None:
        self.config, self.runtime = config, runtime
        self.wrapped, self.vae, self.optimizer, self.ema = wrapped, vae, optimizer, ema
        # images of one forward, 0: all of a rank; `auto` is found by vae_dist.training.memory
        asked = config.training.microbatch_size
        self.microbatch_size = 0 if asked == "auto" else int(asked)
        self.losses = losses  # None: the bound alone
        self.adversary: Adversary | None = losses.adversary if losses is not None else None
        self.loss_scale = LossScale(runtime.device, enabled=config.training.precision == "fp16")
        self.spikes = SpikeGuard(runtime.device, factor=config.training.spike_factor)
        self.is_whole = True  # weights, moments and average are of one step
        self._transfer = Transfer(runtime.device)
        self._generator = torch.Generator()
        self._device_generator = torch.Generator(runtime.device)
        self._parameters = [p for p in vae.parameters() if p.requires_grad]

    def __call__(self, batch: Batch, step: int) -> StepReport:
        lr = lr_at(self.config.optimizer, self.config.training.steps, step)
        if self.losses is not None:
            self.losses.start_step(step)
        sums = torch.zeros(5, device=self.runtime.device)
        num_dims = torch.zeros((), dtype=torch.int64, device=self.runtime.device)
        microbatches = self._microbatches(self._transfer(batch))
        for number, microbatch in enumerate(microbatches):
            found = self._backward(microbatch, step, is_last=number == len(microbatches) - 1)
            sums, num_dims = sums + found[0], num_dims + found[1]
        if self.losses is not None:
            self.losses.discriminator_step(self._scale())
        self.is_whole = False  # until the trainer has counted the step
        grad_norm, found_inf, shared = self._clip()
        spike = self.spikes(grad_norm) * (1 - found_inf)  # which may be the other network's
        self._update(step, lr, skip=found_inf + spike)
        self.loss_scale.update(found_inf)
        more_sums = dict(self.losses.sums) if self.losses is not None else {}
        loss, distortion, rate, neg_bound, half_size = sums.unbind()
        if self.config.objective.scale_equivariance:
            more_sums["train/half_size_distortion_nats"] = half_size
        return StepReport(
            loss,
            distortion,
            rate,
            neg_bound,
            num_dims,
            grad_norm,
            found_inf,
            spike,
            lr=lr,
            beta=beta_at(self.config.objective, step),
            more_sums=more_sums,
            shared=shared,
        )

    def _scale(self) -> torch.Tensor:
        """Of a sum over this rank's images: DDP and FSDP average gradients over the ranks."""
        return self.loss_scale.scale * (self.runtime.world / self.config.training.batch_size)

    def _backward(
        self, group: Group, step: int, *, is_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Forward and backward of one microbatch; the last one sums gradients over the ranks.

        Out: sums over its images of loss, distortion, rate, negative bound and half-size
        distortion, (5,), and the number of values that the likelihood counts.
        """
        images, noise = self._inputs(group, step)
        labels, mask = self._labels(group, step), self._mask(group)
        with self.runtime.strategy.accumulate(self.wrapped, is_last=is_last):
            more = self._more_inputs(group, noise.shape, step)
            result = self.wrapped(images, noise, labels, mask, **more)
            output, half_size = result if "half_size" in more else (result, None)
            beta = beta_at(self.config.objective, step)
            terms = loss_terms(output, self.config.objective, beta=beta, half_size=half_size)
            loss_sum = terms.loss_sum
            if self.losses is not None:
                surrogate, value = self.losses.forward(output, images, group, self.loss_scale.scale)
                terms = terms._replace(loss_sum=loss_sum + value)
                loss_sum = loss_sum + surrogate
            (loss_sum * self._scale()).backward()
        half_size_sum = torch.zeros_like(loss_sum) if half_size is None else -half_size.sum()
        sums = torch.stack([term.detach() for term in (*terms, half_size_sum)])
        return sums, images.numel() if mask is None else images.shape[1] * mask.sum()

    def _update(self, step: int, lr: float, *, skip: torch.Tensor) -> None:
        """Of weights, discriminator and average; skip = 1 leaves all of them as they are."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # the fused update does nothing, not even count, where found_inf is 1
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary is not None and self.adversary.is_learning:
            self.adversary.update(lr / self.config.optimizer.lr, skip=skip)
        self.ema.update(step, found_inf=skip)

    def rehearse(self, group: Group) -> None:
        """What needs most memory: the backward of a microbatch with all terms of the last step,
        beside the optimizer's moments. Nothing is updated, and no rank waits for another."""
        moments = [torch.empty_like(p) for p in self._parameters for _ in range(2)]
        last = self.config.training.steps - 1
        if self.losses is not None:
            self.losses.start_step(last)
        self._backward(group, last, is_last=False)
        del moments

    def forget(self) -> None:
        """Let go of what a rehearsal has left, also one that ran out of memory."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.losses is not None:
            self.losses.reset()

    def _microbatches(self, batch: Batch) -> list[Group]:
        """Parts of the batch that go through the model together: slots of one shape."""
        images_per_slot = self.config.training.batch_size // self.config.data.slots
        num_slots = self.microbatch_size // images_per_slot
        return [
            group.part(start, start + (num_slots or len(group.slots)))
            for group in batch.groups
            for start in range(0, len(group.slots), num_slots or len(group.slots))
        ]

    def _inputs(self, group: Group, step: int) -> tuple[torch.Tensor, ...]:
        """Images in [-1, 1] (b, C, H, W), and noise of the latents."""
        likelihood, objective = self.vae.likelihood, self.config.objective
        levels = group.images.to(self.runtime.device, non_blocking=True).contiguous()
        latent = self.vae.latent_shape(*levels.shape[-2:])
        # latents are small: drawn on the CPU, the same on every device
        shape = noise_shape(objective, len(levels), latent)
        noise = self._drawn("posterior", group, step, shape, torch.Tensor.normal_)
        uniform = None
        if likelihood.needs_uniform:
            draw = torch.Tensor.uniform_
            uniform = self._drawn("levels", group, step, levels.shape, draw, on_host=False)
        return likelihood.prepare(levels, uniform), self._sent(noise)

    def _drawn(
        self,
        purpose: str,
        group: Group,
        step: int,
        shape: Sequence[int],
        draw: Callable[..., object],
        *,
        on_host: bool = True,
    ) -> torch.Tensor:
        """(b, ...) for the images of a group; draw(part, generator=...) fills each slot's part."""
        generator = self._generator if on_host else self._device_generator
        values = torch.empty(tuple(shape), device=generator.device)
        parts = values.split(len(values) // len(group.slots))
        for slot, part in zip(group.slots, parts, strict=True):
            generator.manual_seed(derive_seed(self.config.seed, purpose, step, slot))
            draw(part, generator=generator)
        return values

    def _sent(self, drawn: torch.Tensor) -> torch.Tensor:
        """From host to device; CUDA is waited for unless memory is pinned."""
        if self.runtime.device.type == "cuda":
            drawn = drawn.pin_memory()
        return drawn.to(self.runtime.device, non_blocking=True)

    def _labels(self, group: Group, step: int) -> torch.Tensor | None:
        """int64 (b,), -1 where there is none or where it is hidden in this step; None for a model
        without labels."""
        if not self.vae.num_classes:
            return None
        labels, dropout = group.labels, self.config.model.label_dropout
        if dropout:
            shape, draw = labels.shape, torch.Tensor.uniform_
            hidden = self._drawn("label-dropout", group, step, shape, draw) < dropout
            labels = torch.where(hidden, NO_LABEL, labels)
        return self._sent(labels)

    def _mask(self, group: Group) -> torch.Tensor | None:
        """uint8 (b, 1, H, W), 1 where a pixel was observed; None: everywhere."""
        if group.masks is None:
            return None
        return group.masks.to(self.runtime.device, non_blocking=True)

    def _more_inputs(self, group: Group, shape: Sequence[int], step: int) -> dict[str, Any]:
        """What the forward is asked for beside the bound; nothing by default. Noise of latents,
        `shape`, has a size that is drawn for each image."""
        objective = self.config.objective
        more: dict[str, Any] = {"half_size": True} if objective.scale_equivariance else {}
        if objective.latent_noise:
            noise = self._drawn("latent-noise", group, step, shape, _scaled_normal)
            more["latent_noise"] = self._sent(noise * objective.latent_noise)
        return more

    def _clip(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The gradient's norm before clipping, 1.0 where it or the discriminator's is not finite,
        and what else all ranks share."""
        scale, is_scaled = self.loss_scale.scale, self.loss_scale.enabled
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        largest = self.config.optimizer.clip_grad_norm
        norm = scale_and_clip(gradients, scale, largest=largest, is_scaled=is_scaled)
        is_finite = torch.isfinite(norm)
        shared = {}
        if self.adversary is not None and self.adversary.is_learning:
            other_norm = self.adversary.clip(scale, is_scaled=is_scaled)
            is_finite = is_finite & torch.isfinite(other_norm)
            shared["optim/discriminator_grad_norm"] = other_norm
            shared["optim/adversarial_weight"] = self.adversary.weight  # of this step
        return norm, (~is_finite).to(torch.float32), shared

    # what a checkpoint holds, and ranks have in common

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Groups of named tensors; those of FSDP are this rank's part."""
        groups = {
            "model": self.vae.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.vae),
        }
        return groups | (self.adversary.tensors() if self.adversary is not None else {})

    def scalars(self) -> dict[str, Any]:
        own = {**self.spikes.state(), **self.loss_scale.state()}
        return own | (self.adversary.scalars() if self.adversary is not None else {})

    def load(self, tensors: dict[str, dict[str, torch.Tensor]], scalars: dict[str, Any]) -> None:
        load_full(self.vae, tensors["model"])
        self.ema.load(tensors["ema"])
        load_optimizer_tensors(self.optimizer, self.vae, tensors["optimizer"])
        self.spikes.load_state(scalars)
        self.loss_scale.load_state(scalars)
        if self.adversary is not None:
            self.adversary.load(tensors, scalars)

    def weights_of_every_rank(self) -> dict[str, torch.Tensor]:
        """What all ranks hold alike, bit for bit, where it is not sharded."""
        weights: dict[str, torch.Tensor] = dict(self.vae.named_parameters())
        weights |= {f"ema/{k}": v for k, v in self.ema.averages.items()}
        if self.adversary is not None:
            network = self.adversary.network
            weights |= {f"discriminator/{k}": v for k, v in network.named_parameters()}
        return weights
