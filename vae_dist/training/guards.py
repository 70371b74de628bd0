"""Gradients that are not used (not finite, or spikes), samples that cannot be read, and weights
that must agree over ranks.

In: the gradient norm of a step, the same number on all ranks. Out: a device flag that makes the
update of every rank nothing, and counts that the host reads now and then. A spike is

    norm > spike_factor * (0.9 quantile of the last WINDOW finite norms, once there are MIN_NORMS).

Norms of skipped steps count in the window, so a run whose gradients have grown for good goes on.
The checksum of a tensor is the sum of its 32-bit patterns: integers, so that no order of summation
changes it, and one message of 8 bytes a tensor compares all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vae_dist.config.errors import name_ranks
from vae_dist.data.loader import Batch
from vae_dist.distributed import Runtime, is_sharded
from vae_dist.training.stop import TrainingFailed


class SpikeGuard:
    """Callable: `norm (0-dim) -> 1.0 for a spike, else 0.0`, on the norm's device."""

    WINDOW = 256  # steps
    MIN_NORMS = 32
    QUANTILE = 0.9

    def __init__(self, device: torch.device, *, factor: float) -> None:
        self.factor = factor
        self._norms = torch.full((self.WINDOW,), torch.nan, device=device)
        self._places = torch.arange(self.WINDOW, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # of finite norms

    def __call__(self, norm: Tensor) -> Tensor:
        if not self.factor:
            return torch.zeros_like(norm)
        limit = self.factor * torch.nanquantile(self._norms, self.QUANTILE)
        finite = torch.isfinite(norm)
        spike = finite & (norm > limit) & (self._count >= self.MIN_NORMS)
        here = (self._places == self._count % self.WINDOW) & finite
        self._norms = torch.where(here, norm, self._norms)
        self._count += finite
        return spike.to(norm.dtype)

    def state(self) -> dict[str, Any]:
        count = int(self._count)
        norms = {"norms_seen": count, "recent_norms": self._norms[:count].tolist()}
        return norms if self.factor else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        norms = torch.tensor(state.get("recent_norms", []), device=self._norms.device)
        self._norms[: len(norms)] = norms
        self._count.fill_(state.get("norms_seen", 0))


class SkipGuard:
    """Counts skipped steps. The counts are equal on all ranks: after the all-reduce of gradients
    the norm is the same everywhere, so all ranks skip the same steps without another message."""

    def __init__(self, device: torch.device, *, max_consecutive: int) -> None:
        self.max_consecutive = max_consecutive
        counts = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        self.skipped, self.spikes, self.streak = counts  # not finite; spikes; either, in a row now
        self._recent: deque[tuple[str, ...]] = deque(maxlen=max_consecutive)

    def observe(self, found_inf: Tensor, spike: Tensor, shards: tuple[str, ...]) -> None:
        self._recent.append(shards)
        self.skipped += found_inf.long()
        self.spikes += spike.long()
        self.streak.add_(1).mul_((found_inf + spike).long())

    def check(self, runtime: Runtime, grad_norm: Tensor, *, step: int) -> None:
        """Raise TrainingFailed, on all ranks alike, where the last `max_consecutive` steps were
        skipped; `grad_norm` is of the last one. Waits for the device."""
        streak = int(self.streak)
        if streak < self.max_consecutive:
            return
        mine = {shard for shards in self._recent for shard in shards}
        names = sorted(set().union(*runtime.gather(mine)))
        shards = ", ".join(names[:8]) + " ..." * (len(names) > 8)
        raise TrainingFailed(
            f"the gradient was not finite, or a spike, for {streak} steps in a row up to step "
            f"{step}, with optim/grad_norm={float(grad_norm):g}; shards in hand: {shards}. Lower "
            "optimizer.lr, set optimizer.clip_grad_norm, or use training.precision=bf16 or no"
        )

    def state(self) -> dict[str, int]:
        counts = {"skipped_steps": self.skipped, "spike_steps": self.spikes}
        return {name: int(n) for name, n in (counts | {"skip_streak": self.streak}).items()}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.skipped.fill_(state["skipped_steps"])
        self.spikes.fill_(state["spike_steps"])
        self.streak.fill_(state["skip_streak"])


class DamageGuard:
    """Counts samples that could not be read, and names each once."""

    def __init__(self, *, limit: float, num_samples: int, warn: Callable[[str], None]) -> None:
        self.limit, self.num_samples, self.warn = limit, num_samples, warn
        self.before = 0  # over all ranks, before this process started
        self.since = 0  # over all ranks since then, as far as they have summed
        self.here = 0  # on this rank since then
        self._named: set[tuple[str, int]] = set()

    @property
    def total(self) -> int:
        return self.before + max(self.since, self.here)

    def observe(self, batch: Batch) -> None:
        self.here += len(batch.skipped)
        for lost in batch.skipped:
            if (lost.shard, lost.index) not in self._named:
                self._named.add((lost.shard, lost.index))
                self.warn(f"warning: step {batch.step}: cannot read {lost}")

    def check(self, since: int, images_seen: int) -> None:
        """Raise TrainingFailed where too many are lost since the start of this process, before
        which shards may have been repaired; `since` is equal on all ranks."""
        self.since = since
        # of an epoch at least: one bad sample in the first batch is no reason to stop
        seen = max(images_seen, self.num_samples)
        if since > self.limit * seen:
            raise TrainingFailed(
                f"{since} of {seen} samples could not be read (data.max_skipped_fraction="
                f"{self.limit}); repair the shards, which the warnings name, or raise the limit"
            )


def check_equal_over_ranks(runtime: Runtime, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Every rank takes part, and every rank raises TrainingFailed when one of them differs.

    The tensors are float32. Sharded ones are left out: no rank holds what another one has.
    """
    names = [name for name, tensor in tensors.items() if not is_sharded(tensor)]
    if runtime.world == 1 or not names:
        return
    patterns = [tensors[name].detach().view(torch.int32) for name in names]
    mine = torch.stack([pattern.sum(dtype=torch.int64) for pattern in patterns])
    everyone = [torch.empty_like(mine) for _ in range(runtime.world)]
    dist.all_gather(everyone, mine)
    by_rank = [tuple(one.tolist()) for one in everyone]
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, sums in enumerate(by_rank):
        groups.setdefault(sums, []).append(rank)
    if len(groups) > 1:
        differ = [name for name, *sums in zip(names, *by_rank, strict=True) if len(set(sums)) > 1]
        sides = " and of ".join(name_ranks(ranks) for ranks in groups.values())
        raise TrainingFailed(
            f"after step {step} the weights of {sides} differ: {len(differ)} of {len(names)} "
            f"tensors, {differ[0]} first. Suspect a device; the same command goes on from the "
            "last checkpoint"
        )
