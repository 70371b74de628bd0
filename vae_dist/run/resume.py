"""What a run begins from: its own newest checkpoint, given weights, or nothing.

The main process reads the checkpoint and broadcasts it. What would silently change
the numbers of a run that goes on (config, shards) is refused with the differences.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import changed_numbers, shown, value_of
from vae_dist.config.schema import TrainConfig
from vae_dist.distributed import Runtime
from vae_dist.models.diffusers import (
    KINDS_OF_MEANS,
    Published,
    fitting_keys,
    from_diffusers,
    read_published,
)
from vae_dist.models.likelihoods import build_likelihood
from vae_dist.run.checkpoint import Checkpoint, load_weights
from vae_dist.run.folder import RunFolder

SHOWN = 12  # tensors of a published model that do not fit: it has hundreds
WAYS_OUT = "start anew with run=OTHER_FOLDER, or go on all the same with resume.allow_changes=true"


def as_in_run_folder(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """What the config leaves automatic is as the run in the folder resolved it.

    Raises ConfigError with the differences that would change the run's numbers.
    """
    lost = folder.lost_config()
    if lost and not config.resume.allow_changes:
        raise ConfigError(f"{lost}, or {WAYS_OUT}")
    if lost or not folder.checkpoints.steps():
        return config  # nothing is there that could differ
    previous = folder.config()
    config = copy.deepcopy(config)
    if config.training.batch_size % previous.data.slots == 0:  # else its batch is another one
        config.data.slots = config.data.slots or previous.data.slots
    if config.data.window == "auto":
        config.data.window = previous.data.window
    if config.training.precision == "auto":
        config.training.precision = previous.training.precision
    if config.perceptual.kind == "auto" and previous.perceptual.kind != "none":
        config.perceptual.kind = previous.perceptual.kind
    changes = changed_numbers(previous, config)
    if changes and not config.resume.allow_changes:
        raise ConfigError(
            [
                f"run={folder.path}: this config would change the numbers of the run in it:",
                *(f"  {line}" for line in changes),
                f"take these back, or {WAYS_OUT}"
                + (" (its weights must fit)" if any(map(_is_of_model, changes)) else ""),
            ]
        )
    return config


def _is_of_model(change: str) -> bool:
    return change.startswith(("model.", "likelihood.", "data.channels"))


def newest_checkpoint(runtime: Runtime, folder: RunFolder) -> Checkpoint | None:
    """The newest checkpoint that is whole: the main process reads it, the others get it from there.

    Raises ConfigError on every rank where it cannot be read.
    """
    read: list[Checkpoint] = []  # on the main process

    def load() -> tuple[int, dict[str, Any], list[str]] | None:
        newest = folder.checkpoints.load_newest()
        if newest is None:
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
    if config.resume.allow_changes:
        return
    differences = [
        f"{key}: {checkpoint.state[key]} -> {value}"
        for key, value in identity.items()
        if checkpoint.state[key] != value
    ]
    if differences:
        raise ConfigError(
            [
                f"run={folder.path}: the shards are not those that the run began with, so it "
                "cannot go on exactly:",
                *(f"  {line}" for line in differences),
                f"put the shards back, or {WAYS_OUT}",
            ]
        )


def initial_weights(config: TrainConfig, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of `init_from`, for this model (of any device, meta as well). Raises ConfigError
    with all that do not fit."""
    source = Path(config.init_from)
    if (published := read_published(source)) is not None:
        return _published_weights(config, published, model)
    weights = load_weights(source)
    if lines := _misfits(weights, model):
        raise ConfigError(
            [
                f"init_from={source}: {len(lines)} of its tensors do not fit this model "
                "(there -> here):",
                *(f"  {line}" for line in lines),
                "give the model the shape of the other run (model.*, data.channels, likelihood.*), "
                "or leave init_from out",
            ]
        )
    return weights


def _published_weights(
    config: TrainConfig, published: Published, model: nn.Module
) -> dict[str, torch.Tensor]:
    """Those of a diffusers folder. What it lacks begins as in a model without `init_from`."""
    blame = f"init_from={config.init_from}"
    kind = config.likelihood.kind
    if kind not in KINDS_OF_MEANS:
        raise ConfigError(
            f"{blame}: its decoder gives the mean of an image, which likelihood.kind={kind} has no "
            f"output for; use one of {', '.join(KINDS_OF_MEANS)}"
        )
    likelihood = build_likelihood(config.likelihood, config.data)
    fresh = {f"likelihood.{name}": value for name, value in likelihood.state_dict().items()}
    last = {k: v for k, v in model.state_dict().items() if k.startswith("decoder.conv_out.")}
    # a raw log-variance of 0 is where a learned one begins
    fresh |= {name: torch.zeros(value.shape) for name, value in last.items()}
    weights = from_diffusers(published, fresh)
    fitting = fitting_keys(published)
    wrong = {key: value for key, value in fitting.items() if not _has(config, key, value)}
    lines = _misfits(weights, model)
    if wrong or lines:
        words = " ".join(
            f"'{key}={shown(value)}'".replace(", ", ",") for key, value in wrong.items()
        )
        hidden = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise ConfigError(
            [
                f"{blame}: the AutoencoderKL in {published.path} is not the model of this config; "
                f"{len(lines)} of its tensors differ (there -> here):",
                *(f"  {line}" for line in lines[:SHOWN]),
                *hidden,
                f"set {words}, or leave init_from out"
                if wrong
                else "its tensors are not what its config.json says; is the folder whole?",
            ]
        )
    return weights


def _has(config: TrainConfig, key: str, value: Any) -> bool:
    found = value_of(config, key)
    if key == "model.blocks" and isinstance(found, list):
        return all(count == value for count in found)
    return bool(found == value)


def _misfits(weights: Mapping[str, torch.Tensor], model: nn.Module) -> list[str]:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    return [
        f"{name}: {_shape(found.get(name))} -> {_shape(wanted.get(name))}"
        for name in sorted(wanted.keys() | found.keys())
        if found.get(name) != wanted.get(name)
    ]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "scalar"
