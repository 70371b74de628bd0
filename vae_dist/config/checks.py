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
from difflib import get_close_matches
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from vae_dist.config.keys import Key, conditions, keys, shown, value_of
from vae_dist.config.resolve import default_slots, has_buckets, images_per_slot, slots_of

LATENT_METRICS = ("viv", "lnc", "sec")
METRICS = (
    *("psnr", "ssim", "ms_ssim", "lpips", "lpips_alex", "rfid", "fid"),
    *LATENT_METRICS,
    "lattice",
)
OF_RUN = ("run", "checkpoint", "weights", "tile")  # what `encode features=` has no use for
PRIOR = "normal|gmm:([1-9][0-9]*)(?::(full|diagonal))?"
BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}
COUNT = "[1-9][0-9]*"
NUMBER = r"[0-9.]+(?:e-?[0-9]+)?"
# What stands in a knob's `form` beside plain words: (what matches its text, words for it). Empty
# expressions are decided by `_is_a`.
FORMS = {
    "COUNT": (COUNT, "a count 1, 2, ..."),
    "COUNTS": (rf"\[{COUNT}(, {COUNT})*\]", "a list of counts"),
    "CLASS": ("[0-9]+", "a class 0, 1, ..."),
    "STEP": ("[0-9]+", "a step number"),
    "FRACTION": (r"[01](\.0)?|0\.[0-9]+|[0-9.]+e-[0-9]+", "a number from 0 to 1"),
    "SIZE": (rf"{COUNT}|\[{COUNT}, {COUNT}\]", "N or [H, W] in pixels"),
    "PRIOR": (PRIOR, "normal, gmm:K, gmm:K:full, gmm:K:diagonal; try prior=gmm:10"),
    "TEMPERATURE": (
        rf"{NUMBER}|\[{NUMBER}(, {NUMBER})*\]",
        "a number of at least 0, or one for each level of a ladder from the top",
    ),
    "METRICS": ("", f"one or several of {','.join(METRICS)}"),
    "SHARDS": ("", "a folder of *.tar, brace pattern, URL, list of these"),
    "MIXTURE": ("", "[{path: SHARDS, weight: NUMBER}, ...] with weights above 0"),
    "BUCKETS": (
        "",
        "aspect buckets {area: 65536, multiple: 16, max_aspect: 2.0} with area >= multiple^2 and "
        "max_aspect >= 1",
    ),
}
_PICTURES = "compares whole pictures, and data.mask={data.mask} says that pixels are missing"
_ONE_DRAW = "is for one draw of z: objective.importance_samples={objective.importance_samples} not"

# What may not come together: "KEY=VALUE|VALUE OTHER!=VALUE", and what is then said of the first.
# {other.key} in the sentence stands for the value.
CONFLICTS = {
    "data.mask=nan data.bits!=32": "needs float images: set data.bits=32 (it is {data.bits})",
    "data.mask=alpha data.bits=32": "is not for float images; use nan",
    "likelihood.kind=bernoulli data.channels!=1": "is for binarised grey images: set "
    "data.channels=1 (it is {data.channels})",
    "likelihood.kind=discretized_gaussian|discretized_logistic_mixture data.bits=32": "gives "
    "probabilities of levels, which float images have not; use likelihood.kind=gaussian or laplace",
    "model.arch=dense model.latent=spatial": "has a latent vector: set model.latent=vector",
    "model.arch=ladder model.latent=vector": "has groups of any size: set model.latent=spatial",
    "model.arch=ladder objective.scale_equivariance!=0": "has no latent at half size: set "
    "objective.scale_equivariance=0",
    "model.arch=ladder objective.latent_noise!=0": "has its noise in each group: set "
    "objective.latent_noise=0",
    "model.arch=ladder objective.gradient=doubly_reparameterized": "has one gradient: set "
    "objective.gradient=standard",
    "model.arch=ladder training.train_only=decoder": "has a posterior that reads the decoder: set "
    "training.train_only=all",
    "model.num_classes=1": "tells nothing; use 0 for a model without labels",
    "runtime.compile=blocks model.arch=dense": "finds none in model.arch=dense; use true",
    "runtime.compile=true|blocks runtime.parallel=fsdp": "needs runtime.parallel=ddp",
    "runtime.channels_last=true runtime.parallel=fsdp": "needs runtime.parallel=ddp",
    "perceptual.kind!=none data.mask!=none": _PICTURES,
    "adversarial.weight!=0 data.mask!=none": _PICTURES,
    "objective.scale_equivariance!=0 data.mask!=none": _PICTURES,
    "perceptual.kind!=none objective.importance_samples!=1": _ONE_DRAW,
    "adversarial.weight!=0 objective.importance_samples!=1": _ONE_DRAW,
    "objective.scale_equivariance!=0 objective.importance_samples!=1": _ONE_DRAW,
    "objective.latent_noise!=0 objective.importance_samples!=1": _ONE_DRAW,
    "objective.channel_masking!=0 objective.importance_samples!=1": _ONE_DRAW,
    "objective.alignment!= objective.importance_samples!=1": _ONE_DRAW,
    "objective.alignment!= model.latent=vector": "needs model.latent=spatial",
    "objective.channel_masking!=0 model.latent=vector": "needs model.latent=spatial",
    "objective.alignment!= model.arch=ladder": "needs model.arch=conv",
    "objective.channel_masking!=0 model.arch=ladder": "needs model.arch=conv",
    "objective.alignment!= data.channels!=1|3": "shows its model grey or RGB pictures, and "
    "data.channels={data.channels}",
    "objective.alignment!= data.mask!=none": _PICTURES,
    "objective.alignment!= training.train_only=decoder": "aligns a latent that does not change",
    "perceptual.kind=auto|lpips|lpips_alex data.channels!=1|3": "compares grey or RGB pictures, "
    "and data.channels={data.channels}; use perceptual.kind=structure",
    "adversarial.weight!=0 model.arch=dense|ladder": "needs a convolutional model: model.arch=conv",
    "objective.scale_equivariance!=0 model.latent=vector": "needs model.latent=spatial",
    "objective.scale_equivariance!=0 likelihood.kind!=gaussian|laplace": "compares averages of "
    "pixels, which are no levels: likelihood.kind must be one of gaussian, laplace",
    "training.train_only=decoder init_from=": "would train a decoder for an encoder of random "
    "weights; give init_from=RUN",
}


# ---- one value ----


def problem_of(key: Key, value: Any) -> str:
    """What is wrong with the value by itself, without the key; empty when nothing is."""
    if key.form:
        forms = {form: FORMS.get(form, (form, form)) for form in key.form.split()}
        for form, (expression, _) in forms.items():
            if re.fullmatch(expression, str(value)) if expression else _is_a(form, value):
                return ""
        close = [get_close_matches(name, METRICS, n=1) for name in metric_names(value)]
        guess = ",".join(name for names in close for name in names) if "METRICS" in forms else ""
        nearest = f"; did you mean {key.name}={guess}?" if guess else ""
        return f"is none of {', '.join(words for _, words in forms.values())}{nearest}"
    for name, (is_inside, words) in BOUNDS.items():
        bound = getattr(key, name)
        for number in value if isinstance(value, list) else [value]:
            if bound is not None and not is_inside(number, bound):
                return f"must be {words} {shown(bound)}"
    return ""


def _is_a(form: str, value: Any) -> bool:
    match form, value:
        case "BUCKETS", {
            "area": int(area),
            "multiple": int(multiple),
            "max_aspect": aspect,
            **rest,
        }:
            is_whole = not rest and area >= multiple**2 and multiple > 0
            return is_whole and _is_number(aspect) and aspect >= 1
        case "SHARDS", str():
            return bool(value.strip())
        case "SHARDS", [_, *_]:
            return all(isinstance(item, str) and item.strip() for item in value)
        case "SHARDS", {"path": path, "index": index, **rest}:
            return not rest and _is_a("SHARDS", path) and _is_a("SHARDS", index)
        case "MIXTURE", [_, *_]:
            return all(_is_a("PART", part) for part in value)
        case "PART", {"path": path, **rest}:
            weight: Any = rest.pop("weight", 1)
            is_part = isinstance(rest.pop("index", ""), str) and not rest
            return is_part and _is_a("SHARDS", path) and _is_number(weight) and weight > 0
        case "METRICS", _:
            return set(metric_names(value)) <= set(METRICS)
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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
    if hasattr(config, "training"):
        for rule, sentence in CONFLICTS.items():
            if not _failing(rule, config):
                text = re.sub(r"{([a-z_.]+)}", lambda m: shown(value_of(config, m[1])), sentence)
                yield " ".join(name for name, *_ in conditions(rule)), text
        for rules in (_slots, _widths, _steps):
            yield from rules(config)
    names = metric_names(getattr(config, "metrics", ""))
    metrics = {name[:3] for name in names}
    if getattr(config, "latents", "") and not (names and set(names) <= set(LATENT_METRICS)):
        yield "latents metrics", f"is for metrics={','.join(LATENT_METRICS)}, some or all of them"
    if getattr(config, "metric_weights", "") and not metrics & {"lpi", "rfi", "fid"}:
        yield "metric_weights metrics", "has no effect without lpips, lpips_alex, rfid or fid"
    if features := getattr(config, "features", None):
        for name in OF_RUN:
            if value_of(config, name) != keys(type(config))[name].default:
                yield f"{name} features", f"has no effect with features={features}; remove it"
    elif features == "" and not config.run:
        yield "run features", "is missing; give the run's folder, or features=MODEL"
    for key, other in without_effect(config):
        sentence = f"has no effect with {_given(config, other)}; remove it"
        yield f"{key.name} {other}", f"{sentence} (default {shown(key.default)})"


def _slots(c: Any) -> Iterator[tuple[str, str]]:
    """The slots of a batch, and what holds whole ones."""
    size, microbatch, buckets = c.training.batch_size, c.training.microbatch_size, has_buckets(c)
    slots, per_slot = slots_of(c), images_per_slot(c)
    about = "training.batch_size data.slots data.resolution"
    if size % slots:
        near = " or ".join(str(n) for n in (size - size % slots, size - size % slots + slots) if n)
        yield (
            about,
            (
                f"is not a multiple of data.slots={slots}; try training.batch_size={near}, "
                f"or data.slots={default_slots(size, buckets=buckets)}"
            ),
        )
        return
    for name in ("training.microbatch_size", "data.window")[: 1 + buckets]:
        count = value_of(c, name)
        if isinstance(count, int) and count % per_slot:
            fitting = max(per_slot, count - count % per_slot)
            sentence = f"is not a multiple of the {per_slot} images of a slot; try {fitting}"
            yield f"{name} {about}", sentence
    if microbatch != "auto" and microbatch > size:
        yield f"training.microbatch_size {about}", f"is more than training.batch_size={size}; use 0"
    if buckets and c.model.latent == "vector":
        sentence = "makes images of several sizes; use model.latent=spatial, or data.resolution=N"
        yield "data.resolution", sentence
    if buckets and c.runtime.parallel == "fsdp" and microbatch != per_slot:
        # FSDP gathers weights in each forward, so ranks need equally many
        sentence = f"with aspect buckets needs training.microbatch_size={per_slot}, a slot's images"
        yield f"runtime.parallel training.microbatch_size {about}", f"{sentence}; or use ddp"


def _widths(c: Any) -> Iterator[tuple[str, str]]:
    """The channels of a convolutional model."""
    widths, blocks = c.model.channels, c.model.blocks
    if c.model.arch == "dense":
        return
    if (common := math.gcd(*widths)) % c.model.norm_groups:
        sentence = f"does not divide every width of model.channels={shown(widths)}; {common} does"
        yield "model.norm_groups model.channels", sentence
    if isinstance(blocks, list) and len(blocks) != len(widths):
        sentence = f"must be one count for each of the {len(widths)} levels"
        yield "model.blocks model.channels", sentence
    if c.model.arch == "ladder":
        for name, count in (("groups", len(widths)), ("factors", len(widths) - 1)):
            value = getattr(c.model, name)
            if isinstance(value, list) and len(value) != count:
                sentence = f"must be {count} counts for the {len(widths)} levels"
                yield f"model.{name} model.channels", sentence
    if not c.model.dc_shortcuts:
        return
    for above, below in pairwise(widths):
        if 4 * above % below:
            sentence = "each width must divide four times the one before it"
            yield "model.channels", f"has no shortcut from {above} to {below} channels: {sentence}"
    if c.model.latent == "spatial" and widths[-1] % c.model.latent_channels:
        sentence = f"does not divide the last width, {widths[-1]}, as model.dc_shortcuts=true needs"
        yield "model.latent_channels model.channels", sentence


def _steps(c: Any) -> Iterator[tuple[str, str]]:
    """What needs steps of a run, and the rest."""
    cycles, steps = c.objective.beta_cycles, c.training.steps
    needed = (2 * cycles - 1) * c.objective.beta_warmup_steps
    if cycles > 1 and needed > steps:
        most = f"try objective.beta_warmup_steps={steps // (2 * cycles)}"
        sentence = f"rises take {needed} steps, more than training.steps={steps}; {most}"
        yield "objective.beta_cycles objective.beta_warmup_steps training.steps", sentence
    start, warmup = c.adversarial.start_step, c.adversarial.warmup_steps
    if c.adversarial.weight and start + warmup >= steps:
        sentence = f"and adversarial.warmup_steps={warmup} leave no step of training.steps={steps}"
        yield "adversarial.start_step adversarial.warmup_steps", f"{sentence}; lower them"
    for name in ("optimizer.betas", "adversarial.betas"):
        if len(value_of(c, name)) != 2:
            yield name, "must be two numbers in [0, 1)"
    train, validation = (PurePath(str(path)) for path in (c.data.train, c.data.validation))
    bundle = train.parent / "train", train.parent / "validation"
    if c.data.bundled != "none" and (train, validation) != bundle:
        given = f"{_given(c, 'data.train')} and {_given(c, 'data.validation')}"
        sentence = f"writes FOLDER/train and FOLDER/validation, but {given}; give these two"
        yield "data.bundled data.train data.validation", sentence
