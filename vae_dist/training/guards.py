"""Gradients that are not used (not finite, or spikes), and weights that must agree over ranks.

In: the gradient norm of a step, the same number on all ranks. Out: a device flag that makes the
update of every rank nothing, and counts that the host reads now and then. A spike is

    norm > spike_factor * (0.9 quantile of the last WINDOW finite norms, once there are MIN_NORMS).

Norms of skipped steps count in the window, so a run whose gradients have grown for good goes on.
The checksum of a tensor is the sum of its 32-bit patterns: integers, so that no order of summation
changes it, and one message of 8 bytes a tensor compares all ranks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

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

    def __call__(self, norm: torch.Tensor) -> torch.Tensor:
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
        if not self.factor:
            return {}
        count = int(self._count)
        return {"norms_seen": count, "recent_norms": self._norms[:count].tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        if not self.factor or "norms_seen" not in state:
            return
        norms = torch.tensor(state["recent_norms"], dtype=self._norms.dtype)
        self._norms[: len(norms)] = norms.to(self._norms.device)
        self._count.fill_(state["norms_seen"])


class SkipGuard:
    """Counts skipped steps. The counts are equal on all ranks: after the all-reduce of gradients
    the norm is the same everywhere, so all ranks skip the same steps without another message."""

    def __init__(self, device: torch.device, *, max_consecutive: int) -> None:
        self.max_consecutive = max_consecutive
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # not finite
        self.spikes = torch.zeros((), dtype=torch.int64, device=device)
        self.streak = torch.zeros((), dtype=torch.int64, device=device)  # of both, at the end
        self._longest = torch.zeros((), dtype=torch.int64, device=device)  # since the last look
        self._recent: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=2 * max_consecutive)

    def observe(
        self, step: int, found_inf: torch.Tensor, spike: torch.Tensor, shards: tuple[str, ...]
    ) -> None:
        self._recent.append((step, shards))
        if self.streak.is_cpu and not found_inf and not spike:  # which can be asked without a wait
            self.streak.zero_()
            return
        nonfinite, spike = found_inf.to(torch.int64), spike.to(torch.int64)
        self.skipped += nonfinite
        self.spikes += spike
        self.streak.copy_((self.streak + 1) * (nonfinite + spike))
        torch.maximum(self._longest, self.streak, out=self._longest)

    def is_due(self, step: int) -> bool:
        """Whether the host must look: every `max_consecutive` steps at the latest."""
        return step % self.max_consecutive == 0

    def check(self, runtime: Runtime, grad_norm: torch.Tensor) -> None:
        """Raise TrainingFailed, on all ranks alike, where `max_consecutive` steps in a row were
        skipped since the last look; `grad_norm` is of the last step. Waits for the device."""
        longest = int(self._longest)
        self._longest.copy_(self.streak)
        if longest < self.max_consecutive:
            return
        mine = {shard for _, shards in self._recent for shard in shards}
        names = sorted(set().union(*runtime.gather(mine)))
        raise TrainingFailed(
            f"the gradient was not finite, or a spike, for {longest} steps in a row, noticed "
            f"at step {self._recent[-1][0]} with optim/grad_norm={float(grad_norm):g} "
            "(training.max_consecutive_nonfinite); shards in hand: "
            f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. Lower optimizer.lr, set "
            "optimizer.clip_grad_norm, or use training.precision=bf16 or no"
        )

    def check_all(self, num_steps: int) -> None:
        """Raise TrainingFailed, on all ranks alike, where none of the run's steps was used."""
        if int(self.skipped + self.spikes) >= num_steps:
            raise TrainingFailed(
                f"all {num_steps} updates were skipped, for no gradient was finite: the weights "
                "are those of the start. Lower optimizer.lr, look at likelihood.* and the data, "
                "or use training.precision=bf16 or no"
            )

    def state(self) -> dict[str, int]:
        return {
            "skipped_steps": int(self.skipped),
            "spike_steps": int(self.spikes),
            "skip_streak": int(self.streak),
        }

    def load_state(self, state: dict[str, int]) -> None:
        self.skipped.fill_(state["skipped_steps"])
        self.spikes.fill_(state["spike_steps"])
        self.streak.fill_(state["skip_streak"])
        self._longest.copy_(self.streak)


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
        """Raise TrainingFailed where too many are lost; `since` is equal on all ranks."""
        self.since = since
        # of an epoch at least: one bad sample in the first batch is no reason to stop
        seen = max(images_seen, self.num_samples)
        if self.total > self.limit * seen:
            raise TrainingFailed(
                f"{self.total} of {seen} samples could not be read (data.max_skipped_fraction="
                f"{self.limit}); the warnings above name them. Repair the shards, or raise the "
                "limit"
            )


def checksums(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """int64 (number of tensors,), on their device. The tensors are float32."""
    return torch.stack(
        [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors.values()]
    )


def check_equal_over_ranks(
    runtime: Runtime, tensors: Mapping[str, torch.Tensor], *, step: int
) -> None:
    """Every rank takes part, and every rank raises TrainingFailed when one of them differs.
    Sharded tensors are left out: no rank holds what another one has."""
    tensors = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    if runtime.world == 1 or not tensors:
        return
    mine = checksums(tensors)
    everyone = [torch.empty_like(mine) for _ in range(runtime.world)]
    dist.all_gather(everyone, mine)
    by_rank = [tuple(one.tolist()) for one in everyone]
    usual, num_usual = Counter(by_rank).most_common(1)[0]
    if num_usual == runtime.world:
        return
    others = [rank for rank, sums in enumerate(by_rank) if sums != usual]
    where = [i for i, sums in enumerate(zip(*by_rank, strict=True)) if len(set(sums)) > 1]
    sentence = f"{name_ranks(others)} of {runtime.world} holds other weights than the rest"
    if num_usual * 2 <= runtime.world:  # no majority says who is right
        who = name_ranks(range(runtime.world))
        sentence = f"{who} hold weights that differ from each other"
    raise TrainingFailed(
        f"after step {step} {sentence}: {len(where)} of {len(tensors)} tensors, "
        f"{list(tensors)[where[0]]} first. Nothing was saved since; suspect the memory or the "
        "device of these ranks. The same command goes on from the last checkpoint"
    )
