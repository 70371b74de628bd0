"""Non-finite gradients: counted on the device, read by the host now and then, fatal in a row."""

from __future__ import annotations

from collections import deque

import torch


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step, why, and with which shards."""


class NonFiniteGuard:
    """Counts skipped steps. The counts are equal on all ranks: after the all-reduce of gradients
    the norm is the same everywhere, so all ranks skip the same steps without another message."""

    def __init__(self, device: torch.device, *, max_consecutive: int) -> None:
        self.max_consecutive = max_consecutive
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.streak = torch.zeros((), dtype=torch.int64, device=device)
        self._recent: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=max_consecutive)

    def observe(self, step: int, found_inf: torch.Tensor, shards: tuple[str, ...]) -> None:
        """Count step `step`; checked on the host every `max_consecutive` steps at the latest."""
        lost = found_inf.to(torch.int64)
        self.skipped += lost
        self.streak.copy_((self.streak + 1) * lost)
        self._recent.append((step, shards))
        if step % self.max_consecutive == 0:
            self.check()

    def check(self) -> None:
        """Raises TrainingFailed after `max_consecutive` skipped steps in a row."""
        if int(self.streak) < self.max_consecutive:
            return
        step = self._recent[-1][0] if self._recent else 0
        shards = sorted({shard for _, names in self._recent for shard in names})
        raise TrainingFailed(
            f"the gradient was not finite for {int(self.streak)} steps in a row, up to step {step} "
            f"(training.max_consecutive_nonfinite={self.max_consecutive}); shards in hand: "
            f"{', '.join(shards[:8])}{' ...' if len(shards) > 8 else ''}. Lower optimizer.lr, set "
            "optimizer.clip_grad_norm, or use training.precision=bf16 or no"
        )

    def state(self) -> dict[str, int]:
        return {"skipped_steps": int(self.skipped), "nonfinite_streak": int(self.streak)}

    def load_state(self, state: dict[str, int]) -> None:
        self.skipped.fill_(state["skipped_steps"])
        self.streak.fill_(state["nonfinite_streak"])
