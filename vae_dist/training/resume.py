"""What a run begins from: its own newest checkpoint, given weights, or nothing.

The main process chooses the checkpoint and every rank reads that one. What would silently change
the numbers of a run that goes on (config, shards) is refused with the differences.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vae_dist.checkpoint import Checkpoint, load_weights
from vae_dist.config.errors import ConfigError
from vae_dist.config.load import changed_numbers
from vae_dist.config.schema import TrainConfig
from vae_dist.runfolder import RunFolder
from vae_dist.runtime import Runtime

WAYS_OUT = "start anew with run=OTHER_FOLDER, or go on all the same with resume.allow_changes=true"


def as_in_run_folder(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """What the config leaves automatic is as the run in the folder resolved it.

    Raises ConfigError with the differences that would change the run's numbers.
    """
    if not folder.has_config() or not folder.checkpoints.steps():
        return config  # nothing is there that could be lost
    previous = folder.config()
    config = copy.deepcopy(config)
    config.data.slots = config.data.slots or previous.data.slots
    if config.data.window == "auto":
        config.data.window = previous.data.window
    if config.training.precision == "auto":
        config.training.precision = previous.training.precision
    changes = changed_numbers(previous, config)
    if changes and not config.resume.allow_changes:
        raise ConfigError(
            [
                f"run={folder.path}: this config would change the numbers of the run in it:",
                *(f"  {line}" for line in changes),
                f"take these back, or {WAYS_OUT}",
            ]
        )
    return config


def newest_checkpoint(runtime: Runtime, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint that the main process chose, read by every rank."""
    found: list[Checkpoint | None] = [None]

    def choose() -> int:
        found[0] = folder.checkpoints.load_newest()
        if found[0] is None:
            return -1
        folder.checkpoints.set_aside_after(found[0].step)
        return found[0].step

    step = runtime.on_main(choose)
    if step < 0 or runtime.is_main:
        return found[0]
    return folder.checkpoints.load(step)


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


def initial_weights(source: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of `init_from`, for this model. Raises ConfigError with all that do not fit."""
    weights = load_weights(Path(source))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    lines = [
        f"{name}: {_shape(found.get(name))} -> {_shape(wanted.get(name))}"
        for name in sorted(wanted.keys() | found.keys())
        if found.get(name) != wanted.get(name)
    ]
    if lines:
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


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "scalar"
