"""One optimizer step: draws, microbatches, clipping, agreement on finiteness, update, average.

In: a rank's share of batch k. Out: device tensors to log. What is minimised is
`sum over images of (distortion + beta(k) rate) / batch_size`; DDP and FSDP average gradients over
ranks, so each rank backpropagates `world * sum over its images / batch_size`. All draws are
functions of (seed, purpose, k, slot), so neither the number of ranks nor the microbatch changes
them.
Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vae_dist.config.schema import TrainConfig
from vae_dist.data.stream import Batch
from vae_dist.models.vae import VAE
from vae_dist.objectives.elbo import elbo_terms
from vae_dist.objectives.schedules import beta_at, lr_at
from vae_dist.randomness import derive_seed
from vae_dist.runtime import Runtime
from vae_dist.sharding import full_value, local_part
from vae_dist.training.ema import Ema
from vae_dist.training.guard import SpikeGuard


class StepReport(NamedTuple):
    """Sums over this rank's images (0-dim tensors, nats), and what all ranks share."""

    loss_sum: torch.Tensor
    distortion_sum: torch.Tensor
    rate_sum: torch.Tensor
    grad_norm: torch.Tensor  # before clipping, over all ranks
    found_inf: torch.Tensor  # 1.0 where the norm was not finite, so that nothing was updated
    spike: torch.Tensor  # 1.0 where it was a spike, likewise
    lr: float
    beta: float


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
    ) -> None:
        self.config, self.runtime = config, runtime
        self.wrapped, self.vae, self.optimizer, self.ema = wrapped, vae, optimizer, ema
        self.loss_scale = LossScale(runtime.device, enabled=config.training.precision == "fp16")
        self.spikes = SpikeGuard(runtime.device, factor=config.training.spike_factor)
        self._generator = torch.Generator()
        self._device_generator = torch.Generator(runtime.device)
        self._parameters = [p for p in vae.parameters() if p.requires_grad]

    def __call__(self, batch: Batch, step: int) -> StepReport:
        training = self.config.training
        lr = lr_at(self.config.optimizer, training.steps, step)
        beta = beta_at(self.config.objective, step)
        images, noise = self._inputs(batch, step)
        share = training.microbatch_size or len(images)
        scale = self.loss_scale.scale * (self.runtime.world / training.batch_size)
        sums = torch.zeros(3, device=images.device)
        for start in range(0, len(images), share):
            part = slice(start, start + share)
            is_last = start + share >= len(images)
            with self.runtime.accumulating(self.wrapped, is_last=is_last):
                terms = elbo_terms(self.wrapped(images[part], noise[part]), beta=beta)
                (terms.loss_sum * scale).backward()
            sums += torch.stack([t.detach() for t in terms])
        grad_norm, found_inf = self._unscale_and_clip()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        spike = self.spikes(grad_norm)
        skip = found_inf + spike
        # the fused update does nothing, not even count, where found_inf is 1
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step, found_inf=skip)
        self.loss_scale.update(found_inf)
        loss_sum, distortion_sum, rate_sum = sums.unbind()
        return StepReport(loss_sum, distortion_sum, rate_sum, grad_norm, found_inf, spike, lr, beta)

    def _inputs(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in [-1, 1] (B/world, C, H, W) and latent noise, drawn slot by slot."""
        device, likelihood = self.runtime.device, self.vae.likelihood
        levels = batch.images.to(device, non_blocking=True).contiguous()
        slots = self.config.data.slots // self.runtime.world
        images_per_slot = len(levels) // slots
        latent = (images_per_slot, *self.vae.latent_shape(*levels.shape[-2:]))
        dims = (images_per_slot, *levels.shape[1:])
        noise, uniform = [], []
        for slot in range(self.runtime.rank * slots, (self.runtime.rank + 1) * slots):
            # latents are small: drawn on the CPU, the same on every device
            self._generator.manual_seed(derive_seed(self.config.seed, "posterior", step, slot))
            noise.append(torch.randn(latent, generator=self._generator))
            if likelihood.needs_uniform:
                self._device_generator.manual_seed(
                    derive_seed(self.config.seed, "levels", step, slot)
                )
                uniform.append(torch.rand(dims, generator=self._device_generator, device=device))
        images = likelihood.prepare(levels, torch.cat(uniform) if uniform else None)
        return images, torch.cat(noise).to(device, non_blocking=True)

    def _unscale_and_clip(self) -> tuple[torch.Tensor, torch.Tensor]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # under FSDP the norm of DTensors, which is of all ranks' parts
        total = full_value(torch.nn.utils.get_total_norm(gradients, foreach=True))
        norm = total / self.loss_scale.scale
        largest = self.config.optimizer.clip_grad_norm
        if largest or self.loss_scale.enabled:
            factor = torch.ones_like(norm)
            if largest:
                factor = (largest / (norm + 1e-6)).clamp(max=1.0)
            parts = [local_part(gradient) for gradient in gradients]
            torch._foreach_mul_(parts, factor / self.loss_scale.scale)
        return norm, (~torch.isfinite(norm)).to(torch.float32)
