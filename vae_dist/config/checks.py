"""What a config must be: each knob by itself, and the rules between keys.

In: a filled config dataclass. Out: one sentence for each broken rule (key, value, rule, remedy),
found before any data is read or any device touched. With ips = training.batch_size / data.slots:

    data.slots divides training.batch_size, ips divides training.microbatch_size
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import PurePath
from typing import Any, NamedTuple

from vae_dist.config.forms import form_problem, metric_names, mixture_prior
from vae_dist.config.keys import Key, conditions, keys, shown, value_of
from vae_dist.config.resolve import default_slots, has_buckets, images_per_slot, slots_of

METRICS_WITH_WEIGHTS = ("lpips", "lpips_alex", "rfid", "fid")
_PICTURES = "compares whole pictures, and data.mask={data.mask} says that pixels are missing"
_ONE_DRAW = "is for one draw of z: objective.importance_samples={objective.importance_samples} not"

# What may not come together, as "KEY=VALUE|VALUE OTHER!=VALUE": the sentence that then follows
# "KEY=VALUE ". {other.key} in it stands for the value.
CONFLICTS = {
    "data.mask=nan data.bits!=32": "needs float images: set data.bits=32 (it is {data.bits})",
    "data.mask=alpha data.bits=32": "is not for float images; use nan",
    "likelihood.kind=bernoulli data.channels!=1": "is for binarised grey images: set data.channels"
    "=1 (it is {data.channels}), or likelihood.kind=gaussian",
    "likelihood.kind=discretized_gaussian|discretized_logistic_mixture data.bits=32": "gives "
    "probabilities of levels, and float images (data.bits=32) have none; use "
    "likelihood.kind=gaussian or laplace",
    "model.arch=dense model.latent=spatial": "has a latent vector: set model.latent=vector",
    "model.num_classes=1": "tells nothing; use 0 for a model without labels",
    "runtime.compile=blocks model.arch=dense": "finds none in model.arch=dense; use true",
    "runtime.compile=true|blocks runtime.parallel=fsdp": "needs runtime.parallel=ddp (what FSDP "
    "shards is not compiled); leave it out, or set that",
    "runtime.channels_last=true runtime.parallel=fsdp": "needs runtime.parallel=ddp (FSDP shards "
    "contiguous weights only); leave it out, or set that",
    "perceptual.kind!=none data.mask!=none": _PICTURES,
    "adversarial.weight!=0 data.mask!=none": _PICTURES,
    "objective.scale_equivariance!=0 data.mask!=none": _PICTURES,
    "perceptual.kind!=none objective.importance_samples!=1": _ONE_DRAW,
    "adversarial.weight!=0 objective.importance_samples!=1": _ONE_DRAW,
    "objective.scale_equivariance!=0 objective.importance_samples!=1": _ONE_DRAW,
    "objective.latent_noise!=0 objective.importance_samples!=1": _ONE_DRAW,
    "perceptual.kind=auto|lpips|lpips_alex data.channels!=1|3": "compares grey or RGB pictures, "
    "and data.channels={data.channels}; use perceptual.kind=structure",
    "adversarial.weight!=0 model.arch=dense": "needs a convolutional model: model.arch=conv",
    "objective.scale_equivariance!=0 model.latent=vector": "needs model.latent=spatial: a vector "
    "has no scale",
    "objective.scale_equivariance!=0 likelihood.kind!=gaussian|laplace": "compares averages of "
    "pixels, which are no levels: likelihood.kind must be one of gaussian, laplace",
    "training.train_only=decoder init_from=": "would train a decoder for an encoder of random "
    "weights; give init_from=RUN",
}


class Violation(NamedTuple):
    """A broken rule and the keys that it is about."""

    keys: tuple[str, ...]
    text: str
    is_without_effect: bool = False  # the first key does nothing beside another


def problems(config: Any) -> list[str]:
    """What is wrong with the config, one sentence each; empty when nothing is."""
    return [violation.text for violation in violations(config)]


def violations(config: Any) -> Iterator[Violation]:
    """Of a config or a command. A rule is left out where one of its keys is wrong already."""
    known = keys(type(config))
    wrong: set[str] = set()

    def is_sound(*names: str) -> bool:
        return not wrong & set(names)

    def found(sentence: str, name: str, *others: str, idle: bool = False) -> Violation:
        wrong.add(name)
        return Violation((name, *others), f"{_given(config, name)} {sentence}", idle)

    for key in known.values():
        if sentence := _problem(key, value_of(config, key.name)):
            yield found(sentence, key.name)
    for rule, sentence in CONFLICTS.items():
        about = [name for name, *_ in conditions(rule)]
        is_ours = set(about) <= known.keys() and is_sound(*about)
        if is_ours and not failing(rule, config):
            yield found(_with_values(sentence, config), *about)
    rules = _arithmetic if "training.batch_size" in known else _of_command
    for name, sentence in rules(config, is_sound):
        yield found(sentence, name)
    for key in known.values():
        is_set = is_sound(key.name) and value_of(config, key.name) != key.default
        if is_set and (other := failing(key.when, config)):
            sentence = f"has no effect with {_given(config, other)}; remove it"
            yield found(f"{sentence} (default {shown(key.default)})", key.name, other, idle=True)


def failing(rule: str, config: Any) -> str:
    """The key of the first condition that does not hold; empty where all do."""
    for name, is_not, values in conditions(rule):
        if (shown(value_of(config, name)) in values) == is_not:
            return name
    return ""


def _given(config: Any, name: str) -> str:
    return f"{name}={shown(value_of(config, name))}"


def _with_values(sentence: str, config: Any) -> str:
    return re.sub(r"{([a-z_.]+)}", lambda m: shown(value_of(config, m[1])), sentence)


def _problem(key: Key, value: Any) -> str:
    """What is wrong with the value by itself; empty when nothing is."""
    if key.form:
        return form_problem(key.form, value)
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, str | None):
            continue
        if not math.isfinite(number):
            return "is not a finite number"
        for bound, is_outside, words in (
            (key.ge, operator.lt, "at least"),
            (key.gt, operator.le, "more than"),
            (key.le, operator.gt, "at most"),
            (key.lt, operator.ge, "less than"),
        ):
            if bound is not None and is_outside(number, bound):
                return f"must be {words} {shown(bound)}"
    return ""


def _arithmetic(c: Any, is_sound: Callable[..., bool]) -> Iterator[tuple[str, str]]:
    """(key, sentence) for what does not fit in counts, widths and steps of a run."""
    yield from _slots(c, is_sound)
    if is_sound("model.channels"):
        yield from _widths(c.model, is_sound)
    for name in ("optimizer.betas", "adversarial.betas"):
        if len(value_of(c, name)) != 2:
            yield name, "must be two numbers in [0, 1)"
    if c.data.bundled == "digits" and not _is_bundle(c.data.train, c.data.validation):
        yield (
            "data.bundled",
            f"writes FOLDER/train and FOLDER/validation, but data.train={shown(c.data.train)} and "
            f"data.validation={shown(c.data.validation)}; give these two, or set data.bundled=none",
        )
    cycles, warmup, steps = c.objective.beta_cycles, c.objective.beta_warmup_steps, c.training.steps
    rises = (2 * cycles - 1) * warmup
    if cycles > 1 and rises > steps:
        yield (
            "objective.beta_cycles",
            f"rises of objective.beta_warmup_steps={warmup}, each but the last held as long, take "
            f"{rises} steps, more than training.steps={steps}; try objective.beta_warmup_steps="
            f"{steps // (2 * cycles)}",
        )
    if c.adversarial.weight and c.adversarial.start_step + c.adversarial.warmup_steps >= steps:
        yield (
            "adversarial.start_step",
            f"and adversarial.warmup_steps={c.adversarial.warmup_steps} leave no step of "
            f"training.steps={steps} in which the discriminator has a gradient for the decoder; "
            "lower them, or set adversarial.weight=0",
        )


def _slots(c: Any, is_sound: Callable[..., bool]) -> Iterator[tuple[str, str]]:
    """The slots of a batch, and what holds whole ones. Ranks of FSDP gather weights in each
    forward, so they need equally many."""
    if not is_sound("training.batch_size", "data.slots", "data.resolution"):
        return
    size, slots, microbatch = c.training.batch_size, slots_of(c), c.training.microbatch_size
    if size % slots:
        near = " or ".join(str(n) for n in (size - size % slots, size - size % slots + slots) if n)
        yield (
            "training.batch_size",
            f"is not a multiple of data.slots={slots}; try training.batch_size={near}, or "
            f"data.slots={default_slots(size, buckets=has_buckets(c))}",
        )
        return
    per_slot = images_per_slot(c)
    counts = {"training.microbatch_size": microbatch}
    if has_buckets(c):
        counts["data.window"] = c.data.window
        if c.model.latent == "vector":
            yield (
                "data.resolution",
                "makes images of several sizes, but model.latent=vector works at one; use "
                "model.latent=spatial, or data.resolution=N",
            )
        if c.runtime.parallel == "fsdp" and microbatch != per_slot:
            yield (
                "runtime.parallel",
                "needs equally many forwards on all processes, but aspect buckets make slots of "
                f"different shapes: set training.microbatch_size={per_slot}, the images of one "
                "slot, or runtime.parallel=ddp",
            )
    for name, count in counts.items():
        if is_sound(name) and isinstance(count, int) and count % per_slot:
            yield (
                name,
                f"is not a multiple of the {per_slot} images of a slot (training.batch_size / "
                f"data.slots); try {max(per_slot, count - count % per_slot)}",
            )
    if is_sound("training.microbatch_size") and microbatch != "auto" and microbatch > size:
        yield (
            "training.microbatch_size",
            f"is more than training.batch_size={size}; use 0 for the whole share of a process",
        )


def _widths(model: Any, is_sound: Callable[..., bool]) -> Iterator[tuple[str, str]]:
    widths, blocks = model.channels, model.blocks
    if not widths:
        yield "model.channels", "must be one positive width for each level"
        return
    if model.arch == "dense":
        return
    common = math.gcd(*widths)
    if is_sound("model.norm_groups") and common % model.norm_groups:
        yield (
            "model.norm_groups",
            f"does not divide every width of model.channels={shown(widths)}; {common} or a divisor "
            "of it does",
        )
    if isinstance(blocks, list) and len(blocks) != len(widths):
        yield "model.blocks", f"must be one count for each of the {len(widths)} levels"
    if not model.dc_shortcuts:
        return
    for above, below in pairwise(widths):
        if 4 * above % below:
            yield (
                "model.channels",
                f"has no shortcut from {above} to {below} channels: with model.dc_shortcuts=true "
                "each width divides four times the one before it",
            )
    if model.latent == "spatial" and widths[-1] % model.latent_channels:
        yield (
            "model.latent_channels",
            f"does not divide the last width, {widths[-1]}, which the shortcut to the latent "
            "needs; change one of them, or set model.dc_shortcuts=false",
        )


def _is_bundle(train: Any, validation: Any) -> bool:
    """The digits are written to FOLDER/train and FOLDER/validation, and nowhere else."""
    if not (isinstance(train, str) and isinstance(validation, str)):
        return False
    first, second = PurePath(train), PurePath(validation)
    return first.parent == second.parent and (first.name, second.name) == ("train", "validation")


def _of_command(c: Any, is_sound: Callable[..., bool]) -> Iterator[tuple[str, str]]:
    metrics = metric_names(getattr(c, "metrics", ""))
    if getattr(c, "metric_weights", "") and not {*metrics} & {*METRICS_WITH_WEIGHTS}:
        yield "metric_weights", "has no effect without lpips, lpips_alex, rfid or fid"
    if hasattr(c, "prior") and is_sound("prior", "prior_images"):
        mixture = mixture_prior(c.prior)
        if mixture is not None and 0 < c.prior_images < mixture.num_components:
            yield "prior_images", f"are fewer images than the components of prior={c.prior}"
