"""What benchmarks share: their options, the head that says where they ran, tables, the last line.

In: words `key=value` of the command line, figures. Out: lines on stdout; the last is a JSON object.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vae_dist.tracking.environment import launch_command, versions

Figures = Mapping[str, Any]


def split_options(
    words: Sequence[str], defaults: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The benchmark's own options, and what is left for a training run's config."""
    options, keys = dict(defaults), []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in options:
            options[name] = value
        else:
            keys.append(word)
    return options, keys


def machine() -> dict[str, Any]:
    """Device, cores and versions, as every benchmark prints them."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions(),
    }


def head(title: str) -> dict[str, Any]:
    """Print what was asked and where it runs; the same, for the last line."""
    facts = {"command": launch_command(), **machine()}
    known = " ".join(f"{key} {value}" for key, value in facts["versions"].items())
    print(f"{title}\n  command  {facts['command']}")
    print(
        f"  machine  {facts['device']}, {facts['processor']}, {facts['cores']} cores in use, "
        f"load {facts['load']} at the start; {known}",
        flush=True,
    )
    return facts


def show(rows: Sequence[Figures]) -> None:
    """A Markdown table; floats get four digits."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(_cell, row.values())) + " |")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return "" if value is None else str(value)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of a round: what a loaded machine does to both cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def finish(facts: Figures, figures: Figures) -> None:
    """The last line: one JSON object."""
    print(json.dumps({**figures, **facts}, default=str))
