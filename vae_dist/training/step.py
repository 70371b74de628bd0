"""One optimizer step: draws, microbatches, clipping, agreement on finiteness, updates, average.

In: a rank's share of batch k. Out: device tensors to log. What is minimised is
`sum over images of their loss / batch_size` (vae_dist.objectives); DDP and FSDP average gradients
over ranks, so each rank backpropagates `world * sum over its images / batch_size`. All draws are
functions of (seed, purpose, k, slot), so neither the number of ranks nor the microbatch changes
them. A microbatch holds slots of one shape; ranks may have different numbers of microbatches, but
each has one backward that sums gradients over the ranks, its last.
With a discriminator there are two networks and two updates: a gradient of either that is not finite
leaves both as they are.
Nothing here waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Batch, Group
from vae_dist.distributed import Runtime, load_full
from vae_dist.models.build import build_vae
from vae_dist.models.vae import NO_LABEL
from vae_dist.objectives.elbo import beta_at, loss_terms, noise_shape
from vae_dist.objectives.perceptual import build_perceptual, fetch_weights
from vae_dist.randomness import derive_seed
from vae_dist.training.adversarial import Adversary, ReconstructionLosses, Sums
from vae_dist.training.alignment import Alignment
from vae_dist.training.compile import use_tensor_float_32
from vae_dist.training.guards import SpikeGuard
from vae_dist.training.optimizer import (
    Ema,
    build_optimizer,
    freeze_encoder,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    scale_and_clip,
    update,
)


class StepReport(NamedTuple):
    """0-dim tensors on the device, and two numbers; `shared` and what follows is of all ranks."""

    sums: Sums  # over this rank's images; "num_dims": values that the likelihood counts
    shared: dict[str, Tensor]
    grad_norm: Tensor  # before clipping
    found_inf: Tensor  # 1.0 where the norm was not finite, so that nothing was updated
    spike: Tensor  # 1.0 where it was a spike, likewise
    lr: float
    beta: float


class LossScale:
    """Dynamic scale of an fp16 loss, on the device: halved by an overflow, doubled after 2000 good
    steps, as torch.amp.GradScaler does, which waits for the device before each update."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        if self.enabled:
            torch._amp_update_scale_(self.scale, self.good_steps, found_inf, 2.0, 0.5, 2000)


def _scaled_normal(part: Tensor, *, generator: torch.Generator) -> None:
    """Normal noise, for each image (dimension 0) times the size of another normal draw."""
    sizes = torch.randn(len(part), generator=generator).abs()
    part.normal_(generator=generator).mul_(sizes.view(-1, *[1] * (part.ndim - 1)))


DRAWS: dict[str, Callable[..., object]] = {  # by purpose: fills a tensor from a generator
    "posterior": torch.Tensor.normal_,
    "levels": torch.Tensor.uniform_,
    "label-dropout": torch.Tensor.uniform_,
    "latent-noise": _scaled_normal,
    "channel-masking": torch.Tensor.uniform_,
}


class TrainingStep:
    """Callable: `(batch, step) -> StepReport`, and the model is one step further.

    Holds model, optimizer, average and losses on the device, not compiled yet; weights are those
    of the config's seed. Raises ConfigError on every rank where those of LPIPS are missing on one.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        image_size: tuple[int, int],
        *,
        has_features: bool = False,
    ) -> None:
        """has_features: those of its alignment come with each image."""
        self.config, self.runtime = config, runtime
        self.device = device = runtime.device
        self.vae = build_vae(config, image_size).to(device)
        if config.training.train_only == "decoder":
            freeze_encoder(self.vae)
        use_tensor_float_32(device, config.training.precision)
        if config.runtime.channels_last == "true":
            self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        replica = copy.deepcopy(self.vae)  # before these weights are sharded
        self.wrapped = runtime.strategy.wrap(self.vae)
        self.optimizer = build_optimizer(self.vae, config.optimizer)
        self.ema = Ema(self.vae, replica, decay=config.training.ema_decay)
        runtime.on_main(lambda: fetch_weights(config.perceptual))
        perceptual = runtime.on_all_ranks(lambda: build_perceptual(config.perceptual, device))
        has_adversary = config.adversarial.weight > 0
        self.adversary = Adversary(config, runtime, self.vae) if has_adversary else None
        self.losses: ReconstructionLosses | None = None  # the bound alone
        if perceptual is not None or has_adversary:
            self.losses = ReconstructionLosses(self.vae, perceptual, self.adversary)
        self.alignment: Alignment | None = None
        if config.objective.alignment:
            self.alignment = runtime.on_all_ranks(
                lambda: Alignment(config, runtime, self.vae, has_features=has_features)
            )
        # images of one forward, 0: all of a rank; `auto` is a matter of vae_dist.training.memory
        self.microbatch_size = config.training.microbatch_size
        self.loss_scale = LossScale(device, enabled=config.training.precision == "fp16")
        self.spikes = SpikeGuard(device, factor=config.training.spike_factor)
        self.is_whole = True  # weights, moments and average are of one step
        self._generators = torch.Generator(), torch.Generator(device)

    def __call__(self, batch: Batch, step: int) -> StepReport:
        self._start(step)
        microbatches = self._microbatches(batch)
        for number, microbatch in enumerate(microbatches):
            self._backward(microbatch, step, is_last=number == len(microbatches) - 1)
        if self.adversary is not None:
            self.adversary.discriminator_step(self._scale())
        self.is_whole = False  # until the trainer has counted the step
        scale, optimizer = self.loss_scale.scale, self.config.optimizer
        largest = optimizer.clip_grad_norm
        grad_norm = scale_and_clip(self.vae.parameters(), scale, largest=largest)
        is_finite, shared = torch.isfinite(grad_norm), {}
        learning = self.adversary if self.adversary and self.adversary.is_learning else None
        if learning is not None:
            other_norm = learning.clip(scale)
            is_finite = is_finite & torch.isfinite(other_norm)
            shared["optim/discriminator_grad_norm"] = other_norm
            shared["optim/adversarial_weight"] = learning.weight  # of this step
        found_inf = (~is_finite).to(torch.float32)
        spike = self.spikes(grad_norm) * (1 - found_inf)
        lr, skip = lr_at(optimizer, self.config.training.steps, step), found_inf + spike
        update(self.optimizer, lr, skip=skip)
        if learning is not None:
            learning.update(lr / optimizer.lr, skip=skip)
        if self.alignment is not None:
            shared["optim/alignment_weight"] = self.alignment.weight  # of this step
            self.alignment.update(skip=skip)
        self.ema.update(step, skip=skip)
        self.loss_scale.update(found_inf)
        beta = beta_at(self.config.objective, step)
        return StepReport(self._sums, shared, grad_norm, found_inf, spike, lr=lr, beta=beta)

    def _start(self, step: int) -> None:
        self._sums = Sums()
        if self.losses is not None:
            self.losses.start_step(step, self._sums)
        if self.alignment is not None:
            self.alignment.start_step(step, self._sums)

    def rehearse(self, group: Group) -> None:
        """What needs most memory: the backward of a microbatch with all terms of the last step,
        beside the optimizer's moments. Nothing is updated, and no rank waits for another."""
        trained = [p for p in self.vae.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        last = self.config.training.steps - 1
        self._start(last)
        self._backward(group, last, is_last=False)
        del moments

    def forget(self) -> None:
        """Let go of what a rehearsal has left, also one that ran out of memory."""
        self.optimizer.zero_grad(set_to_none=True)
        self._start(0)

    def _scale(self) -> Tensor:
        """Of a sum over this rank's images: DDP and FSDP average gradients over the ranks."""
        return self.loss_scale.scale * (self.runtime.world / self.config.training.batch_size)

    def _backward(self, group: Group, step: int, *, is_last: bool) -> None:
        """Forward and backward of one microbatch; the last one sums gradients over the ranks."""
        stored = group.images.to(self.device, non_blocking=True)
        (images, noise, labels, mask), more = self._inputs(group, stored, step)
        objective, half_size = self.config.objective, None
        with self.runtime.strategy.accumulate(self.wrapped, is_last=is_last):
            output = self.wrapped(images, noise, labels, mask, **more)
            if objective.scale_equivariance:
                output, half_size = output
            beta = beta_at(objective, step)
            terms = loss_terms(output, objective, beta=beta, half_size=half_size)
            loss, value = terms.loss_sum, terms.loss_sum
            if self.losses is not None:
                surrogate, added = self.losses(output, images, stored, self.loss_scale.scale)
                loss, value = loss + surrogate, value + added
            if self.alignment is not None:
                surrogate, added = self.alignment(output, stored, group.features)
                loss, value = loss + surrogate, value + added
            (loss * self._scale()).backward()
        if self.alignment is not None:
            self.alignment.record_main(more["latent_noise"], self._scale())
        self._sums.add("train/loss", value)
        self._sums.add("train/distortion_nats", terms.distortion_sum)
        self._sums.add("train/rate_nats", terms.rate_sum)
        self._sums.add("train/neg_bound_nats", terms.neg_bound_sum)
        if half_size is not None:
            self._sums.add("train/half_size_distortion_nats", -half_size.sum())
        num_dims = torch.full((), images.numel(), device=images.device)
        self._sums.add("num_dims", num_dims if mask is None else images.shape[1] * mask.sum())

    def _microbatches(self, batch: Batch) -> list[Group]:
        """Parts of the batch that go through the model together: slots of one shape."""
        images_per_slot = self.config.training.batch_size // self.config.data.slots
        num_slots = self.microbatch_size // images_per_slot
        return [
            group.part(start, start + (num_slots or len(group.slots)))
            for group in batch.groups
            for start in range(0, len(group.slots), num_slots or len(group.slots))
        ]

    def _inputs(
        self, group: Group, stored: Tensor, step: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], dict[str, Any]]:
        """What the forward takes: images in [-1, 1] (b, C, H, W), noise of the latents, labels
        int64 (b,), -1 where there is none or it is hidden, mask uint8 (b, 1, H, W), 1: observed;
        and, by name, what it is asked for beside the bound."""
        config, likelihood = self.config, self.vae.likelihood
        latent = self.vae.latent_shape(*stored.shape[-2:])
        shape = noise_shape(config.objective, len(stored), latent)
        # drawn on the CPU, the same on every device, but for a ladder's: 22 million values a step
        is_small = not self.vae.num_levels
        noise = self._drawn("posterior", group, step, shape, on_host=is_small)
        uniform, labels, mask = None, None, group.masks
        if likelihood.needs_uniform:
            uniform = self._drawn("levels", group, step, stored.shape, on_host=False)
        if self.vae.num_classes:
            labels, dropout = group.labels, config.model.label_dropout
            if dropout:
                draws = self._drawn("label-dropout", group, step, labels.shape)
                labels = torch.where(draws < dropout, NO_LABEL, labels)
            labels = self._sent(labels)
        if mask is not None:
            mask = mask.to(self.device, non_blocking=True)
        more: dict[str, Any] = {"half_size": True} if config.objective.scale_equivariance else {}
        if config.objective.latent_noise:
            jitter = self._drawn("latent-noise", group, step, shape)
            more["latent_noise"] = self._sent(jitter * config.objective.latent_noise)
        if config.objective.channel_masking:
            draws = self._drawn("channel-masking", group, step, (len(stored), 2))
            more["channel_mask"] = self._sent(self._channel_mask(draws, latent[0]))
        if self.alignment is not None:  # its gradient is that of the decoder's loss at z
            more["latent_noise"] = Alignment.probe(more.get("latent_noise"), shape, self.device)
        images = likelihood.prepare(stored.contiguous(), uniform)
        noise = self._sent(noise) if is_small else noise
        return (images, noise, labels, mask), more

    def _channel_mask(self, draws: Tensor, num_channels: int) -> Tensor:
        """draws (b, 2) in [0, 1) -> (b, C, 1, 1): 1 for the first c channels, c uniform from 1 to
        C, in images whose first draw is below channel_masking (Chen et al. 2025, DC-AE 1.5)."""
        count = (draws[:, 1] * num_channels).long() + 1
        count = count.where(draws[:, 0] < self.config.objective.channel_masking, num_channels)
        mask = torch.arange(num_channels) < count.unsqueeze(1)
        return mask.float()[:, :, None, None]

    def _drawn(
        self, purpose: str, group: Group, step: int, shape: Sequence[int], *, on_host: bool = True
    ) -> Tensor:
        """(b, ...) for the images of a group, each slot's part from a generator of its own."""
        generator = self._generators[0 if on_host else 1]
        values = torch.empty(tuple(shape), device=generator.device)
        parts = values.split(len(values) // len(group.slots))
        for slot, part in zip(group.slots, parts, strict=True):
            generator.manual_seed(derive_seed(self.config.seed, purpose, step, slot))
            DRAWS[purpose](part, generator=generator)
        return values

    def _sent(self, drawn: Tensor) -> Tensor:
        """From host to device; CUDA is waited for unless memory is pinned."""
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()
        return drawn.to(self.device, non_blocking=True)

    # what a checkpoint holds, and ranks have in common

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups of named tensors; those of FSDP are this rank's part."""
        groups = {
            "model": self.vae.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.vae),
        }
        return groups | (self.adversary.tensors() if self.adversary is not None else {})

    def scalars(self) -> dict[str, Any]:
        scale = self.loss_scale
        own = {"loss_scale": float(scale.scale), "good_steps": int(scale.good_steps)}
        if self.adversary is not None:
            own["adversarial_weight"] = float(self.adversary.weight)
        if self.alignment is not None:
            own["alignment_ratio"] = float(self.alignment.ratio)
        return self.spikes.state() | own

    def load(self, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, Any]) -> None:
        """Full values, as `tensors` and `scalars` gave them on any number of ranks."""
        load_full(self.vae, tensors["model"])
        self.ema.load(tensors["ema"])
        load_optimizer_tensors(self.optimizer, self.vae, tensors["optimizer"])
        self.spikes.load_state(scalars)
        self.loss_scale.scale.fill_(scalars["loss_scale"])
        self.loss_scale.good_steps.fill_(scalars["good_steps"])
        if self.adversary is not None:
            self.adversary.load(tensors, scalars.get("adversarial_weight", 0.0))
        if self.alignment is not None:
            self.alignment.ratio.fill_(scalars.get("alignment_ratio", 0.0))

    def weights_of_every_rank(self) -> dict[str, Tensor]:
        """What all ranks hold alike, bit for bit, where it is not sharded."""
        weights: dict[str, Tensor] = dict(self.vae.named_parameters())
        weights |= {f"ema/{k}": v for k, v in self.ema.averages.items()}
        if self.adversary is not None:
            network = self.adversary.network
            weights |= {f"discriminator/{k}": v for k, v in network.named_parameters()}
        return weights
