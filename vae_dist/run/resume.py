"""What a run begins from: its own newest checkpoint, given weights, or nothing.

The main process reads the checkpoint and broadcasts it. What would silently change
the numbers of a run that goes on (config, shards) is refused with the differences.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import changed_numbers, set_value, shown, value_of
from vae_dist.config.schema import TrainConfig
from vae_dist.distributed import Runtime
from vae_dist.models.build import build_projection
from vae_dist.models.diffusers import (
    KINDS_OF_MEANS,
    Published,
    fitting_keys,
    from_diffusers,
    local_source,
    read_published,
)
from vae_dist.models.discriminator import build_discriminator
from vae_dist.models.likelihoods import build_likelihood
from vae_dist.run.checkpoint import DISCRIMINATOR, Checkpoint, Tensors, load_weights
from vae_dist.run.folder import RunFolder

SHOWN = 12  # tensors that do not fit: a published model has hundreds
WAYS_OUT = "start anew with run=OTHER_FOLDER, or go on all the same with resume.allow_changes=true"


def as_in_run_folder(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """What the config leaves automatic is as the run in the folder resolved it.

    Raises ConfigError with the differences that would change the run's numbers.
    """
    if not folder.checkpoints.steps():
        return config  # nothing is there that could differ
    previous, config = folder.config(), copy.deepcopy(config)
    if config.training.batch_size % previous.data.slots == 0:  # else its batch is another one
        config.data.slots = config.data.slots or previous.data.slots
    width = "objective.alignment_width"
    for name in ("data.window", "training.precision", "perceptual.kind", width):
        # a term that the run never had is not taken away silently
        if value_of(config, name) == "auto" and value_of(previous, name) != "none":
            set_value(config, name, value_of(previous, name))
    changes = changed_numbers(previous, config)
    if changes and not config.resume.allow_changes:
        of_model = ("model.", "likelihood.", "data.channels")
        must_fit = any(change.startswith(of_model) for change in changes)
        raise ConfigError(
            [
                f"run={folder.path}: this config would change the numbers of the run in it:",
                *(f"  {line}" for line in changes),
                f"take these back, or {WAYS_OUT}{' (its weights must fit)' if must_fit else ''}",
            ]
        )
    return config


def newest_checkpoint(runtime: Runtime, folder: RunFolder) -> Checkpoint | None:
    """The newest checkpoint that is whole: the main process reads it, the others get it from there.

    Raises ConfigError on every rank where it cannot be read.
    """
    read: list[Checkpoint] = []  # on the main process

    def load() -> tuple[int, dict[str, Any], list[str]] | None:
        if (newest := folder.checkpoints.load_newest()) is None:
            return None
        read.append(newest)
        return newest.step, newest.state, list(newest.tensors)

    if (found := runtime.on_main(load)) is None:
        return None
    step, state, groups = found
    tensors = {
        name: runtime.broadcast_tensors(read[0].tensors[name] if read else None) for name in groups
    }
    return Checkpoint(step, tensors, state)


def is_finished(config: TrainConfig, checkpoint: Checkpoint) -> bool:
    evaluated_step = checkpoint.state["scalars"]["evaluated_step"]
    steps = config.training.steps
    return checkpoint.step > steps or checkpoint.step == steps == evaluated_step


def check_identity(
    checkpoint: Checkpoint, identity: Mapping[str, Any], config: TrainConfig, folder: RunFolder
) -> None:
    """Raises ConfigError when the shards are not those of the run."""
    differences = [
        f"  {key}: {checkpoint.state[key]} -> {value}"
        for key, value in identity.items()
        if checkpoint.state[key] != value
    ]
    if differences and not config.resume.allow_changes:
        raise ConfigError(
            [
                f"run={folder.path}: the shards are not those that the run began with, so it "
                "cannot go on exactly:",
                *differences,
                f"put the shards back, or {WAYS_OUT}",
            ]
        )


def initial_weights(config: TrainConfig, model: nn.Module) -> Tensors:
    """The weights of `init_from`, for this model (of any device, meta as well), and where both runs
    have an adversarial term of the same shape, those of the discriminator, as DISCRIMINATOR. Raises
    ConfigError with all that do not fit."""
    source = local_source(config.init_from)
    if (published := read_published(source)) is not None:
        return _published_weights(config, published, model)
    weights = load_weights(source)
    others = {k: weights.pop(k) for k in [*weights] if k.startswith(DISCRIMINATOR)}
    weights = {k: v for k, v in weights.items() if not k.startswith("projection.")}
    weights |= fresh_projection(config)
    _check_fit(weights, model, f"init_from={source}")
    return weights | (others if _fits_discriminator(others, config) else {})


def _fits_discriminator(tensors: Tensors, config: TrainConfig) -> bool:
    if not tensors or not config.adversarial.weight:
        return False
    channels = config.data.channels
    with torch.device("meta"):
        network = build_discriminator(config.adversarial, image_channels=channels, seed=0)
    shapes = {DISCRIMINATOR + name: v.shape for name, v in network.state_dict().items()}
    return shapes == {name: v.shape for name, v in tensors.items()}


def fresh_projection(config: TrainConfig) -> Tensors:
    """That of the alignment begins anew: the vision model may be another one."""
    if not config.objective.alignment:
        return {}
    return {f"projection.{k}": v for k, v in build_projection(config).state_dict().items()}


def _published_weights(config: TrainConfig, published: Published, model: nn.Module) -> Tensors:
    """Those of a diffusers folder. What it lacks begins as in a model without `init_from`."""
    blame, kind = f"init_from={config.init_from}", config.likelihood.kind
    if kind not in KINDS_OF_MEANS:
        raise ConfigError(
            f"{blame}: its decoder gives the mean of an image, which likelihood.kind={kind} has no "
            f"output for; use one of {', '.join(KINDS_OF_MEANS)}"
        )
    likelihood = build_likelihood(config.likelihood, config.data)
    fresh = {f"likelihood.{name}": value for name, value in likelihood.state_dict().items()}
    fresh |= fresh_projection(config)
    for name, value in model.state_dict().items():
        if name.startswith("decoder.conv_out."):
            fresh[name] = torch.zeros(value.shape)  # a learned raw log-variance begins at 0
    weights = from_diffusers(published, fresh)
    wrong = [
        f"'{key}={shown(value)}'".replace(", ", ",")
        for key, value in fitting_keys(published).items()
        if value_of(config, key) != value
    ]
    _check_fit(weights, model, f"{blame}: the AutoencoderKL in {published.path}", wrong)
    return weights


def _check_fit(
    weights: Tensors, model: nn.Module, blame: str, settings: Sequence[str] = ()
) -> None:
    """Raises ConfigError with the tensors whose shape differs or that only one side has, and with
    the `settings` that would fit, where there are some."""
    there, here = (
        {name: "x".join(map(str, value.shape)) or "scalar" for name, value in side.items()}
        for side in (weights, model.state_dict())
    )
    lines = [
        f"  {name}: {there.get(name, 'absent')} -> {here.get(name, 'absent')}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if lines or settings:
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        head = f"{blame}: {len(lines)} of its tensors do not fit this model (there -> here):"
        remedy = f"set {' '.join(settings)}" if settings else "give the model the other one's shape"
        raise ConfigError([head, *lines[:SHOWN], *more, f"{remedy}, or leave init_from out"])
