"""What the loop is given from outside: an evaluator and a painter; and when something is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn

from vae_dist.tracking.metrics import Value

Row = dict[str, Value]


class Evaluator(Protocol):
    """Metrics of the averaged model, the same on every rank; None when a stop was agreed on."""

    def __call__(self, model: nn.Module, stop_requested: Callable[[], bool]) -> Row | None: ...


class Painter(Protocol):
    """Draws picture grids of the averaged model. Called on the main process alone."""

    def __call__(self, model: nn.Module, step: int, metrics: Row) -> None: ...

    def close(self) -> None:
        """Wait, not for ever, for what is still being written."""
        ...


def is_due(step: int, every: int, last_step: int) -> bool:
    """Every `every` steps and after the last one; every=0 means after the last one alone."""
    return step == last_step or (every > 0 and step > 0 and step % every == 0)
