"""The rules between keys.

In: a filled config dataclass. Out: one sentence per broken rule (key, value, rule, way out), found
before any data is read or any device touched. With ips = training.batch_size / data.slots:

    data.slots divides training.batch_size, ips divides training.microbatch_size
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, starmap
from pathlib import PurePath
from typing import Any

from vae_dist.config.automatic import default_slots, has_buckets, slots_of
from vae_dist.config.buckets import bucket_rules
from vae_dist.config.keys import shown
from vae_dist.config.objective_checks import DENSITIES, added_terms
from vae_dist.config.rules import Violation, is_count, is_size, out_of_range, rule, value_of
from vae_dist.config.rules import ignored as _ignored
from vae_dist.config.schema import TrainConfig


def problems(config: TrainConfig) -> list[str]:
    """What is wrong with the config, one sentence each; empty when nothing is."""
    return [violation.text for violation in violations(config)]


def violations(config: TrainConfig) -> Iterator[Violation]:
    wrong = list(out_of_range(config))
    yield from wrong
    bad = {name for violation in wrong for name in violation.keys}
    everything = (_data, _slots, _model, _likelihood, _objective, added_terms, _optimizer, _runtime)
    for rules in everything:
        # A rule that divides by a count needs the count to be good.
        yield from (rule for rule in rules(config) if not bad & set(rule.keys))


def _is_shards(value: Any) -> bool:
    """A path, a list of these, or {path: SHARDS, index: FOLDER}."""
    if isinstance(value, dict):
        return set(value) == {"path", "index"} and all(map(_is_shards, value.values()))
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item.strip() for item in items)


def _is_mixture(value: Any) -> bool:
    """[{path: SHARDS, weight: NUMBER}, ...]; a weight may be left away."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(part, dict)
            and set(part) <= {"path", "index", "weight"}
            and _is_shards(part.get("path"))
            and isinstance(part.get("index", ""), str)
            and isinstance(part.get("weight", 1), int | float)
            and 0 < part.get("weight", 1) < math.inf
            for part in value
        )
    )


def _data(config: TrainConfig) -> Iterator[Violation]:
    data = config.data
    for name in ("data.train", "data.validation"):
        value = value_of(config, name)
        if not (_is_shards(value) or (name == "data.train" and _is_mixture(value))):
            yield rule(name, value, "is no folder of *.tar, brace pattern, URL or list of these")
    if data.bits not in (5, 8, 16, 32):
        yield rule("data.bits", data.bits, "is none of 5, 8, 16 and 32")
    if data.resolution == "native":
        because = "data.resolution=native (images are taken as they are)"
        yield from _ignored(config, "data.crop", because)
    elif isinstance(data.resolution, dict):
        yield from starmap(Violation, bucket_rules(config))
    elif not is_size(data.resolution):
        sentence = (
            "is none of N, [H, W], native and aspect buckets "
            "{area: 65536, multiple: 16, max_aspect: 2.0}"
        )
        yield rule("data.resolution", data.resolution, sentence)
    yield from _mask(config)
    if data.window != "auto" and not is_count(data.window):
        yield rule("data.window", data.window, "is neither auto nor a count of samples")
    if data.bundled == "digits":
        yield from _bundled_digits(config)


def _mask(config: TrainConfig) -> Iterator[Violation]:
    data = config.data
    if data.mask not in ("random", "rectangle"):
        yield from _ignored(config, "data.mask_fraction", f"data.mask={data.mask}")
    elif data.mask_fraction == 1:
        yield rule("data.mask_fraction", 1, "leaves no pixel to learn from", "data.mask")
    if data.mask == "nan" and data.bits != 32:
        sentence = f"needs float images: set data.bits=32 (it is {data.bits})"
        yield rule("data.mask", data.mask, sentence, "data.bits")
    if data.mask == "alpha" and data.bits == 32:
        yield rule("data.mask", data.mask, "is not for float images; use nan", "data.bits")


def _bundled_digits(config: TrainConfig) -> Iterator[Violation]:
    """The digits are written to FOLDER/train and FOLDER/validation, and nowhere else."""
    train, validation = config.data.train, config.data.validation
    if not (_is_shards(train) and _is_shards(validation)):
        return
    written = isinstance(train, str) and isinstance(validation, str)
    if written:
        first, second = PurePath(train), PurePath(validation)
        written = first.parent == second.parent
        written = written and (first.name, second.name) == ("train", "validation")
    if not written:
        yield Violation(
            ("data.bundled", "data.train", "data.validation"),
            "data.bundled=digits writes FOLDER/train and FOLDER/validation, but "
            f"data.train={shown(train)} and data.validation={shown(validation)}; "
            "give these two, or set data.bundled=none for your own shards",
        )


def _default_slots(config: TrainConfig) -> int:
    return default_slots(config.training.batch_size, buckets=has_buckets(config))


def _slots(config: TrainConfig) -> Iterator[Violation]:
    batch_size, slots = config.training.batch_size, config.data.slots
    names = ("data.slots", "training.batch_size")
    if batch_size < 1 or slots < 0:
        return
    if slots and batch_size % slots:
        near = sorted({batch_size - batch_size % slots, batch_size - batch_size % slots + slots})
        sizes = " or ".join(str(size) for size in near if size)
        yield Violation(
            names,
            f"training.batch_size={batch_size} is not a multiple of data.slots={slots}; "
            f"try training.batch_size={sizes}, or data.slots={_default_slots(config)}",
        )
        return
    microbatch = config.training.microbatch_size
    if microbatch == "auto":
        return
    if microbatch != 0 and not is_count(microbatch):
        sentence = "is neither auto, nor 0, nor a count of images"
        yield rule("training.microbatch_size", microbatch, sentence)
        return
    per_slot = batch_size // slots_of(config)
    involved = (*names, "training.microbatch_size")
    given = f"training.microbatch_size={microbatch}"
    if microbatch > batch_size:
        yield Violation(
            involved,
            f"{given} is more than training.batch_size={batch_size}; "
            "use 0 for the whole share of a process",
        )
    elif microbatch % per_slot:
        fitting = max(per_slot, microbatch - microbatch % per_slot)
        yield Violation(
            involved,
            f"{given} is not a multiple of the {per_slot} images of a slot "
            f"(training.batch_size / data.slots); try {fitting}",
        )


def _model(config: TrainConfig) -> Iterator[Violation]:
    model = config.model
    if not model.channels or not all(map(is_count, model.channels)):
        yield rule("model.channels", model.channels, "must be one positive width for each level")
    elif model.arch == "dense":
        if model.latent != "vector":
            yield Violation(
                ("model.arch", "model.latent"),
                "model.arch=dense has a latent vector: set model.latent=vector",
            )
        for name in (
            "model.patch",
            "model.blocks",
            "model.dc_shortcuts",
            "model.attention",
            "model.norm_groups",
            "model.gradient_checkpointing",
        ):
            yield from _ignored(config, name, "model.arch=dense")
        if config.runtime.compile == "blocks":
            sentence = "finds none in model.arch=dense; use true"
            yield rule("runtime.compile", "blocks", sentence, "model.arch")
    elif model.norm_groups >= 1 and any(width % model.norm_groups for width in model.channels):
        yield Violation(
            ("model.norm_groups", "model.channels"),
            f"model.norm_groups={model.norm_groups} does not divide every width of "
            f"model.channels={shown(model.channels)}; {math.gcd(*model.channels)} or a divisor "
            "of it does",
        )
    else:
        yield from _levels(config)
    if model.num_classes == 0:
        yield from _ignored(config, "model.label_dropout", "model.num_classes=0 (no labels)")
    elif model.num_classes == 1:
        yield rule("model.num_classes", 1, "tells nothing; use 0 for a model without labels")


def _levels(config: TrainConfig) -> Iterator[Violation]:
    """Blocks of each level, and the widths that shortcuts can lead to."""
    model = config.model
    blocks, channels = model.blocks, model.channels
    if isinstance(blocks, list):
        if len(blocks) != len(channels) or not all(map(is_count, blocks)):
            sentence = f"must be one positive count for each of the {len(channels)} levels"
            yield rule("model.blocks", blocks, sentence, "model.channels")
    elif not is_count(blocks):
        yield rule("model.blocks", blocks, "must be a positive count, or a list of these")
    if not model.dc_shortcuts:
        return
    for above, below in pairwise(channels):
        if 4 * above % below:
            sentence = (
                f"has no shortcut from {above} to {below} channels: with model.dc_shortcuts=true "
                "each width divides four times the one before it"
            )
            yield rule("model.channels", channels, sentence, "model.dc_shortcuts")
    if model.latent == "spatial" and channels[-1] % model.latent_channels:
        sentence = (
            f"does not divide the last width, {channels[-1]}, which the shortcut to the latent "
            "needs; change one of them, or set model.dc_shortcuts=false"
        )
        yield rule("model.latent_channels", model.latent_channels, sentence, "model.channels")


# The knobs that not every likelihood heeds, and those that each kind does.
_LIKELIHOOD_KNOBS = {
    "gaussian": {"variance", "sigma", "min_sigma"},
    "laplace": {"variance", "sigma", "min_sigma"},
    "discretized_gaussian": {"variance", "sigma", "min_sigma"},
    "discretized_logistic_mixture": {"min_sigma", "mixtures"},
    "bernoulli": {"binarization"},
}


def _likelihood(config: TrainConfig) -> Iterator[Violation]:
    likelihood, bits = config.likelihood, config.data.bits
    kind = likelihood.kind
    if kind == "bernoulli" and config.data.channels != 1:
        yield Violation(
            ("likelihood.kind", "data.channels"),
            "likelihood.kind=bernoulli is for binarised grey images: set data.channels=1 "
            f"(it is {config.data.channels}), or likelihood.kind=gaussian",
        )
    if kind.startswith("discretized") and bits == 32:
        yield Violation(
            ("likelihood.kind", "data.bits"),
            f"likelihood.kind={kind} gives probabilities of levels, and float images "
            "(data.bits=32) have none; use likelihood.kind=gaussian or laplace",
        )
    knobs, heeded = set().union(*_LIKELIHOOD_KNOBS.values()), _LIKELIHOOD_KNOBS[kind]
    for name in sorted(knobs - heeded):
        yield from _ignored(config, f"likelihood.{name}", f"likelihood.kind={kind}")
    if "variance" in heeded:
        unused = "min_sigma" if likelihood.variance == "fixed" else "sigma"
        because = f"likelihood.variance={likelihood.variance}"
        yield from _ignored(config, f"likelihood.{unused}", because)
    if kind not in DENSITIES:
        yield from _ignored(config, "data.dequantize", f"likelihood.kind={kind}")
    elif bits == 32:
        yield from _ignored(config, "data.dequantize", "data.bits=32 (float images)")


def _objective(config: TrainConfig) -> Iterator[Violation]:
    objective = config.objective
    if objective.beta_warmup_steps == 0:
        for name in ("objective.beta_warmup", "objective.beta_cycles"):
            yield from _ignored(config, name, "objective.beta_warmup_steps=0")
    if objective.importance_samples == 1:
        yield from _ignored(config, "objective.gradient", "objective.importance_samples=1")
    if objective.beta == 0:
        yield from _ignored(config, "objective.free_bits", "objective.beta=0")
    rises = (2 * objective.beta_cycles - 1) * objective.beta_warmup_steps
    if objective.beta_cycles > 1 and rises > config.training.steps:
        yield Violation(
            ("objective.beta_cycles", "objective.beta_warmup_steps", "training.steps"),
            f"objective.beta_cycles={objective.beta_cycles} rises of objective.beta_warmup_steps="
            f"{objective.beta_warmup_steps}, each but the last held as long, take {rises} steps, "
            f"more than training.steps={config.training.steps}; try "
            "objective.beta_warmup_steps="
            f"{config.training.steps // (2 * objective.beta_cycles)}",
        )


def _runtime(config: TrainConfig) -> Iterator[Violation]:
    runtime = config.runtime
    for name, reason in (
        ("runtime.channels_last", "FSDP cuts contiguous weights only"),
        ("runtime.compile", "towers that FSDP cuts are not compiled"),
    ):
        value = value_of(config, name)
        if runtime.parallel == "fsdp" and value not in ("auto", "false"):
            sentence = f"needs runtime.parallel=ddp ({reason}); leave it out, or set that"
            yield rule(name, value, sentence, "runtime.parallel")


def _optimizer(config: TrainConfig) -> Iterator[Violation]:
    optimizer, training = config.optimizer, config.training
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        yield rule("optimizer.betas", optimizer.betas, "must be two numbers in [0, 1)")
    if optimizer.schedule == "constant":
        yield from _ignored(config, "optimizer.final_lr_fraction", "optimizer.schedule=constant")
    if not 0 <= training.ema_decay < 1:
        yield rule("training.ema_decay", training.ema_decay, "must be in [0, 1)")
