"""The rules of the commands on a run folder, and what the words in their keys ask for.

In: a filled dataclass of a command. Out: one sentence per broken rule, as in `checks`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from vae_dist.config.commands import (
    EncodeCommand,
    EvaluateCommand,
    ExportCommand,
    ImputeCommand,
    RunCommand,
    SampleCommand,
)
from vae_dist.config.keys import keys
from vae_dist.config.rules import Violation, is_size, out_of_range, rule

METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "lpips_alex", "rfid", "fid")
METRICS_WITH_WEIGHTS = ("lpips", "lpips_alex", "rfid", "fid")


def command_violations(command: Any) -> Iterator[Violation]:
    """The rules of the other commands' dataclasses."""
    yield from out_of_range(command)
    if isinstance(command, RunCommand | ExportCommand):
        checkpoint = command.checkpoint
        is_step = checkpoint.isascii() and checkpoint.isdigit()
        if checkpoint not in ("latest", "best") and not is_step:
            yield rule("checkpoint", checkpoint, "is none of latest, best and a step number")
    if isinstance(command, EvaluateCommand):
        yield from _evaluate(command)
    if isinstance(command, SampleCommand | EvaluateCommand):
        yield from _prior(command)
    if isinstance(command, ImputeCommand):
        yield from _impute(command)
    label = getattr(command, "label", "auto")
    is_class = type(label) is int and label >= 0  # false is no class 0
    if label not in ("auto", "all", "none") and not is_class:
        yield rule("label", label, "is none of auto, all, none and a class 0, 1, ...")
    resolution = getattr(command, "resolution", "trained")
    words = ("trained", "native") if isinstance(command, EncodeCommand) else ("trained",)
    if resolution not in words and not is_size(resolution):
        sentence = f"is none of {', '.join(words)}, N and [H, W] in pixels"
        yield rule("resolution", resolution, sentence)


def _evaluate(command: EvaluateCommand) -> Iterator[Violation]:
    if command.chunk and not command.samples:
        sentence = "has no effect without importance samples; remove it, or give samples=1000"
        yield rule("chunk", command.chunk, sentence, "samples")
    names = metric_names(command.metrics)
    if command.metric_weights and not set(names) & set(METRICS_WITH_WEIGHTS):
        sentence = f"has no effect without one of metrics={','.join(METRICS_WITH_WEIGHTS)}"
        yield rule("metric_weights", command.metric_weights, sentence, "metrics")
    for name in names:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f" (there are {', '.join(METRICS)})"
            yield rule("metrics", command.metrics, f"asks for {name}, which is no metric{hint}")


def _impute(command: ImputeCommand) -> Iterator[Violation]:
    known = keys(ImputeCommand)
    if command.method == "single" and command.samples != known["samples"].default:
        sentence = "has no effect with method=single; remove it, or set draws"
        yield rule("samples", command.samples, sentence, "method")
    if command.samples < 2:
        yield rule("samples", command.samples, "must be at least 2; method=single takes one")
    if command.mask not in ("random", "rectangle") and (
        command.mask_fraction != known["mask_fraction"].default
    ):
        sentence = f"has no effect with mask={command.mask}; remove it"
        yield rule("mask_fraction", command.mask_fraction, sentence, "mask")


class MixturePrior(NamedTuple):
    """What prior=gmm:K asks for; covariance is full, diagonal or empty (by the size of latents)."""

    num_components: int
    covariance: str


def mixture_prior(prior: str) -> MixturePrior | None:
    """None for prior=normal. ValueError for what is neither."""
    if prior == "normal":
        return None
    match = re.fullmatch(r"gmm:([1-9][0-9]*)(?::(full|diagonal))?", prior)
    if match is None:
        raise ValueError(prior)
    return MixturePrior(int(match[1]), match[2] or "")


def _prior(command: SampleCommand | EvaluateCommand) -> Iterator[Violation]:
    try:
        mixture = mixture_prior(command.prior)
    except ValueError:
        sentence = "is none of normal, gmm:K, gmm:K:full and gmm:K:diagonal; try prior=gmm:10"
        yield rule("prior", command.prior, sentence)
        return
    if mixture is None:
        default = keys(type(command))["prior_images"].default
        if command.prior_images != default:
            sentence = f"has no effect with prior=normal; remove it (default {default})"
            yield rule("prior_images", command.prior_images, sentence, "prior")
        if isinstance(command, SampleCommand) and command.compare:
            sentence = "has nothing to compare N(0, I) with; give prior=gmm:10"
            yield rule("compare", command.compare, sentence, "prior")
    elif 0 < command.prior_images < mixture.num_components:
        sentence = f"are fewer images than the {mixture.num_components} components of the mixture"
        yield rule("prior_images", command.prior_images, sentence, "prior")


def metric_names(value: Any) -> list[str]:
    """What evaluate's `metrics` asks for: a word, words with commas between them, or a list."""
    items = value if isinstance(value, list) else str(value or "").split(",")
    return [str(item).strip() for item in items if str(item).strip()]
