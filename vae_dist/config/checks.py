"""What a config must be: each value by itself, and the rules between keys.

In: values, or a filled config dataclass. Out: one sentence for each broken rule (key, value, rule,
remedy), found before any data is read or any device touched. With the images of a slot
ips = training.batch_size / data.slots:

    data.slots divides training.batch_size, ips divides training.microbatch_size
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from vae_dist.config.keys import Key, conditions, keys, shown, value_of
from vae_dist.config.resolve import default_slots, has_buckets, images_per_slot, slots_of
from vae_dist.config.schema import TrainConfig

LATENT_METRICS = ("viv", "lnc", "sec")
METRICS = (
    *("psnr", "ssim", "ms_ssim", "lpips", "lpips_alex", "rfid", "fid"),
    *LATENT_METRICS,
    "lattice",
)
PRIOR = "normal|gmm:([1-9][0-9]*)(?::(full|diagonal))?"
BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}
COUNT, NUMBER = "[1-9][0-9]*", r"[0-9.]+(?:e-?[0-9]+)?"
# What stands in a knob's `form` beside plain words: (what matches its text, words for it). Empty
# expressions are decided by `_is_a`.
FORMS = {
    "INDEX": ("[0-9]+", "a number 0, 1, ..."),
    "COUNT": (COUNT, "a count 1, 2, ..."),
    "COUNTS": (rf"\[{COUNT}(, {COUNT})*\]", "a list of counts"),
    "NUMBER": (NUMBER, "a number of at least 0"),
    "NUMBERS": (rf"\[{NUMBER}(, {NUMBER})*\]", "a list of these"),
    "PAIR": (rf"\[{NUMBER}, {NUMBER}\]", "two numbers, as in [0.9, 0.999]"),
    "SIZE": (rf"{COUNT}|\[{COUNT}, {COUNT}\]", "N or [H, W] in pixels"),
    "PRIOR": (PRIOR, "normal, gmm:K, gmm:K:full, gmm:K:diagonal; try prior=gmm:10"),
    "METRICS": ("", f"one or several of {','.join(METRICS)}"),
    "PATHS": ("", "a path, brace pattern or URL, or a list of these"),
    "MIXTURE": ("", "[{path: SHARDS, weight: NUMBER}, ...] with weights above 0"),
    "BUCKETS": (
        "",
        "aspect buckets {area: 65536, multiple: 16, max_aspect: 2.0} with area >= multiple^2 and "
        "max_aspect >= 1",
    ),
}

# What may not come together: each of the conditions before & with the one after it, and what is
# then said of the first key. {key} in the sentence stands for the key's value.
SPATIAL = "objective.scale_equivariance!=0 objective.channel_masking!=0 objective.alignment!="
OF_PICTURES = "perceptual.kind!=none adversarial.weight!=0"
CONFLICTS = {
    "data.mask=nan & data.bits!=32": "needs float images: set data.bits=32",
    "data.mask=alpha & data.bits=32": "is not for float images; use nan",
    "likelihood.kind=bernoulli & data.channels!=1": "is for binarised grey images: set "
    "data.channels=1 (it is {data.channels})",
    "likelihood.kind=discretized_gaussian|discretized_logistic_mixture & data.bits=32": "gives "
    "probabilities of levels, which float images have not; use gaussian or laplace",
    "model.arch=dense & model.latent=spatial": "has a latent vector: set model.latent=vector",
    f"model.arch=ladder {SPATIAL} & model.latent=vector": "needs model.latent=spatial",
    f"adversarial.weight!=0 {SPATIAL} & model.arch!=conv": "needs model.arch=conv",
    "objective.latent_noise!=0 objective.gradient=doubly_reparameterized "
    "training.train_only=decoder & model.arch=ladder": "is not for model.arch=ladder; remove it",
    f"{OF_PICTURES} objective.scale_equivariance!=0 objective.alignment!= & data.mask!=none": (
        "compares whole pictures, and data.mask={data.mask} says that pixels are missing"
    ),
    f"{OF_PICTURES} {SPATIAL} objective.latent_noise!=0 & objective.importance_samples!=1": (
        "is for one draw of z: set objective.importance_samples=1"
    ),
    "perceptual.kind=auto|lpips|lpips_alex objective.alignment!= & data.channels!=1|3": "compares "
    "grey or RGB pictures, and data.channels={data.channels}; perceptual.kind=structure takes any",
    "objective.scale_equivariance!=0 & likelihood.kind!=gaussian|laplace": "compares averages of "
    "pixels, which are no levels: set likelihood.kind=gaussian or laplace",
    "objective.alignment!= & training.train_only=decoder": "aligns a latent that does not change",
    "training.train_only=decoder & init_from=": "would train a decoder for an encoder of random "
    "weights; give init_from=RUN",
    "runtime.compile=true|blocks runtime.channels_last=true & runtime.parallel=fsdp": "needs "
    "runtime.parallel=ddp",
    "runtime.compile=blocks & model.arch=dense": "finds none in model.arch=dense; use true",
    # of `encode`
    "run!= checkpoint!=latest weights!=ema tile!=0 & features!=": "has no effect with "
    "features={features}; remove it",
    "run= & features=": "is missing; give the run's folder, or features=MODEL",
}


# ---- one value ----


def problem_of(key: Key, value: Any) -> str:
    """What is wrong with the value by itself, without the key; empty when nothing is."""
    forms = [(form, *FORMS.get(form, (form, form))) for form in key.form.split()]
    if forms and not any(
        re.fullmatch(expression, str(value)) if expression else _is_a(form, value)
        for form, expression, _ in forms
    ):
        return f"is none of {', '.join(words for *_, words in forms)}"
    for name, (is_inside, words) in BOUNDS.items():
        bound = getattr(key, name)
        for number in value if isinstance(value, list) else [value]:
            is_bounded = bound is not None and isinstance(number, int | float)
            if is_bounded and not is_inside(number, bound):
                return f"must be {words} {shown(bound)}"
    return ""


def _is_a(form: str, value: Any) -> bool:
    match form, value:
        case "BUCKETS", {"area": int(area), "multiple": int(side), "max_aspect": aspect, **rest}:
            return (
                not rest and area >= side**2 > 0 and isinstance(aspect, int | float) and aspect >= 1
            )
        case "PATHS", str():
            return bool(value.strip())
        case "PATHS", [_, *_]:
            return all(isinstance(item, str) and item.strip() for item in value)
        case "PATHS", {"path": path, "index": index, **rest}:
            return not rest and _is_a("PATHS", path) and _is_a("PATHS", index)
        case "MIXTURE", [_, *_]:
            return all(_is_a("PART", part) for part in value)
        case "PART", {"path": path, **rest}:
            weight: Any = rest.pop("weight", 1)
            is_positive = isinstance(weight, int | float) and weight > 0
            return is_positive and _is_a("PATHS", path) and rest.keys() <= {"index"}
        case "METRICS", _:
            return set(metric_names(value)) <= set(METRICS)
    return False


def mixture_prior(prior: str) -> tuple[int, str]:
    """The components that prior=gmm:K asks for (normal: 0), and full, diagonal or an empty text."""
    match = re.fullmatch(PRIOR, prior)
    return int(match[1] or 0) if match else 0, (match[2] or "") if match else ""


def metric_names(value: Any) -> list[str]:
    """What evaluate's `metrics` asks for: a word, words with commas between them, or a list."""
    items = value if isinstance(value, list) else str(value or "").split(",")
    return [str(item).strip() for item in items if str(item).strip()]


# ---- several keys ----


def broken_rules(config: Any, wrong: Collection[str] = ()) -> list[str]:
    """What is wrong between keys, a sentence for each first key.

    A rule is left out where one of its keys is in `wrong`: these have another value in `config`
    than was asked for.
    """
    found: dict[str, str] = {}
    for about, sentence in _broken(config):
        names = about.split()
        if not set(wrong).intersection(names):
            found.setdefault(names[0], f"{_given(config, names[0])} {sentence}")
    return list(found.values())


def without_effect(config: Any) -> list[tuple[Key, str]]:
    """(key that is not at its default and does nothing, key that takes its effect)."""
    return [
        (key, other)
        for name, key in keys(type(config)).items()
        if value_of(config, name) != key.default and (other := _failing(key.when, config))
    ]


def _failing(rule: str, config: Any) -> str:
    """The key of the first condition that does not hold; empty where all do."""
    for name, is_not, values in conditions(rule):
        if (shown(value_of(config, name)) in values) == is_not:
            return name
    return ""


def _given(config: Any, name: str) -> str:
    return f"{name}={shown(value_of(config, name))}"


def _broken(config: Any) -> Iterator[tuple[str, str]]:
    """(keys, what is said of the first one) for each broken rule."""
    for rules, sentence in CONFLICTS.items():
        firsts, _, other = rules.partition(" & ")
        for rule in (f"{first} {other}" for first in firsts.split()):
            names = [name for name, *_ in conditions(rule)]
            if keys(type(config)).keys() >= set(names) and not _failing(rule, config):
                text = re.sub(r"{([a-z_.]+)}", lambda m: shown(value_of(config, m[1])), sentence)
                yield " ".join(names), text
    if isinstance(config, TrainConfig):
        yield from _slots(config)
        yield from _widths(config)
        if config.data.bundled != "none" and PurePath(str(config.data.train)).name != "train":
            sentence = f"writes FOLDER/train, and {_given(config, 'data.train')}; set it to none"
            yield "data.bundled data.train", sentence
    for key, other in without_effect(config):
        sentence = f"has no effect with {_given(config, other)}; remove it"
        yield f"{key.name} {other}", f"{sentence} (default {shown(key.default)})"


def _slots(c: TrainConfig) -> Iterator[tuple[str, str]]:
    """The slots of a batch, and what holds whole ones."""
    size, microbatch, buckets = c.training.batch_size, c.training.microbatch_size, has_buckets(c)
    slots, per_slot = slots_of(c), images_per_slot(c)
    about = "training.batch_size data.slots data.resolution"
    if size % slots:
        near = " or ".join(str(n) for n in (size - size % slots, size - size % slots + slots) if n)
        sentence = f"is not a multiple of data.slots={slots}; try training.batch_size={near}, or "
        yield about, f"{sentence}data.slots={default_slots(size, buckets=buckets)}"
        return
    for name in ("training.microbatch_size", "data.window")[: 1 + buckets]:
        count = value_of(c, name)
        if isinstance(count, int) and count % per_slot:
            fitting = max(per_slot, count - count % per_slot)
            sentence = f"is not a multiple of the {per_slot} images of a slot; try {fitting}"
            yield f"{name} {about}", sentence
    if buckets and c.model.latent == "vector":
        sentence = "makes images of several sizes; use model.latent=spatial, or data.resolution=N"
        yield "data.resolution", sentence
    if buckets and c.runtime.parallel == "fsdp" and microbatch != per_slot:
        # FSDP gathers weights in each forward, so ranks need equally many
        sentence = f"with aspect buckets needs training.microbatch_size={per_slot}, a slot's images"
        yield f"runtime.parallel training.microbatch_size {about}", f"{sentence}; or use ddp"


def _widths(c: TrainConfig) -> Iterator[tuple[str, str]]:
    """The channels of a convolutional model."""
    model, widths = c.model, c.model.channels
    if model.arch == "dense":
        return
    if (common := math.gcd(*widths)) % model.norm_groups:
        sentence = f"does not divide every width of model.channels={shown(widths)}; {common} does"
        yield "model.norm_groups model.channels", sentence
    counts = {"blocks": len(widths)}
    if model.arch == "ladder":
        counts |= {"groups": len(widths), "factors": len(widths) - 1}
    for name, count in counts.items():
        value = getattr(model, name)
        if isinstance(value, list) and len(value) != count:
            sentence = f"must be {count} counts for the {len(widths)} levels"
            yield f"model.{name} model.channels", sentence
    if not model.dc_shortcuts:
        return
    for above, below in pairwise(widths):
        if 4 * above % below:
            sentence = "each width must divide four times the one before it"
            yield "model.channels", f"has no shortcut from {above} to {below} channels: {sentence}"
    if model.latent == "spatial" and widths[-1] % model.latent_channels:
        sentence = f"does not divide the last width, {widths[-1]}, as model.dc_shortcuts=true needs"
        yield "model.latent_channels model.channels", sentence
