"""Checkpoints: named tensors and a small JSON state, written so that a kill costs none.

Folder `step_00001000/` holds `NAME.safetensors` for each group of tensors (model, ema, optimizer)
and `manifest.json`: step, state, and the size of each file. It is written under a temporary name,
synced and renamed; then `latest` names it; then older ones are removed, but for the one that `best`
names. A folder whose files differ in size from its manifest is torn: it is reported and the one
before it is used. A write that fails leaves all others as they were.
In training a thread writes: training waits for a copy in memory, not for the disk.
Nothing that is read back can run code: tensors are safetensors, the rest is JSON. safetensors
compares header and file before it maps a file; what is mapped costs memory where it is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.files import printable, read_bounded, read_json, sync_folder, write_durably

Tensors = dict[str, torch.Tensor]

DISCRIMINATOR = "discriminator/"  # what names of its tensors begin with, among others
MAX_MANIFEST_BYTES = 16 * 2**20
WRITER_NICE = 10  # the writing thread takes a tenth of a core where training wants all of them


class TornCheckpoint(ValueError):
    """A checkpoint folder whose files are not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """What one folder held: groups of tensors on CPU, and the JSON state."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def named_checkpoint(path: Path) -> tuple[Path, str]:
    """The folder of checkpoints and the step that a path to one of these names; of a run folder
    "latest"."""
    match = re.fullmatch(r"step_(\d{8})", path.name)
    return (path.parent, match[1]) if match else (path / "checkpoints", "latest")


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of all complete-looking folders, oldest first. Raises ConfigError at a link: what
        is replaced and removed here would lie elsewhere."""
        if self.folder.is_symlink():
            raise ConfigError(f"{self.folder} is a link; give the run folder it lies in as run=")
        paths = self.folder.glob("step_" + "[0-9]" * 8)
        return sorted(int(path.name[5:]) for path in paths if not path.is_symlink())

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensors],
        state: Mapping[str, Any],
        *,
        keep_last: int,
        best_step: int | None = None,
    ) -> None:
        """Write a checkpoint durably, point `latest` at it, keep the `keep_last` newest ones (0:
        all). `best_step` is kept as well, and `best` names it.

        Raises OSError when the disk does not take it; the others are as they were then.
        """
        target = self.folder / step_name(step)
        temporary = self.folder / f".{target.name}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            # not its parents: where these are gone, the disk of the run is
            temporary.mkdir()
            files = {f"{name}.safetensors": group for name, group in tensors.items()}
            sizes = {name: _write_tensors(temporary / name, group) for name, group in files.items()}
            _write_manifest(temporary, step, state, sizes)
            shutil.rmtree(target, ignore_errors=True)  # a torn one
            os.replace(temporary, target)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(self.folder)
        write_durably(self.folder / "latest", target.name.encode())
        self.name_best(best_step)
        if keep_last:
            self._remove_old(step, keep_last)

    def amend(self, step: int, state: Mapping[str, Any], *, best_step: int | None) -> None:
        """Replace the state of a checkpoint, whose tensors stay."""
        folder = self.folder / step_name(step)
        _write_manifest(folder, step, state, _read_manifest(folder)["files"])
        self.name_best(best_step)

    def name_best(self, step: int | None) -> None:
        """Let `best` name the checkpoint of a step; not where its write has failed."""
        if step is not None and self.best_step() != step and step in self.steps():
            write_durably(self.folder / "best", step_name(step).encode())

    def best_step(self) -> int | None:
        """The step that `best` names, if its checkpoint is there."""
        with contextlib.suppress(OSError, ValueError):
            step = int(read_bounded(self.folder / "best", 100).removeprefix(b"step_"))
            return step if step in self.steps() else None
        return None

    def load(self, step: int) -> Checkpoint:
        """Read one checkpoint. Raises TornCheckpoint."""
        folder = self.folder / step_name(step)
        manifest = _read_manifest(folder)
        tensors = {}
        for name, num_bytes in manifest.pop("files").items():
            path = folder / name
            if not name or path.name != name:
                raise TornCheckpoint(f"{folder}/manifest.json names {name!r}, outside its folder")
            found = path.stat().st_size if path.is_file() else "no file"
            if found != num_bytes:
                raise TornCheckpoint(f"{path} is torn: {found}, its manifest says {num_bytes}")
            try:
                tensors[name.removesuffix(".safetensors")] = safetensors.torch.load_file(path)
            except safetensors.SafetensorError as error:
                raise TornCheckpoint(f"{path} is damaged ({error})") from None
        return Checkpoint(step, tensors, state=manifest)

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; torn ones are named on stderr and left behind.

        None where there is none; ConfigError where there are some but none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step)
            except TornCheckpoint as torn:
                warning = f"warning: {torn}; trying the checkpoint before it"
                print(printable(warning), file=sys.stderr)
        if steps:
            raise ConfigError(
                f"none of the {len(steps)} checkpoints in {self.folder} is whole; put one back "
                "from a copy, or start anew with run=OTHER_FOLDER"
            )
        return None

    def _remove_old(self, step: int, keep_last: int) -> None:
        older = [one for one in self.steps() if one <= step]
        for old in older[:-keep_last]:
            if old != self.best_step():
                # a kill in between leaves a torn one, which is removed the next time
                shutil.rmtree(self.folder / step_name(old), ignore_errors=True)


def _write_tensors(path: Path, tensors: Tensors) -> int:
    """Bytes of the file, which the disk has."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(contiguous, path)
    except safetensors.SafetensorError as error:  # as it reports a full disk
        raise OSError(errno.EIO, str(error), str(path)) from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _write_manifest(
    folder: Path, step: int, state: Mapping[str, Any], files: Mapping[str, int]
) -> None:
    text = json.dumps({"step": step, "files": files, **state}, indent=1)
    write_durably(folder / "manifest.json", text.encode())


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / "manifest.json", MAX_MANIFEST_BYTES)
        manifest["files"].items()
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError, KeyError) as error:
        raise TornCheckpoint(f"{folder} has no sound manifest.json ({error!r})") from None
    return manifest


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time: a kill costs at most the interval before it.

    `submit` returns after the copy; `wait` returns when the disk has it, or has refused. A disk
    that does not take a checkpoint costs a warning; the next one tries again.
    """

    def __init__(
        self, checkpoints: Checkpoints, *, keep_last: int, warn: Callable[[str], None]
    ) -> None:
        self.checkpoints, self.keep_last = checkpoints, keep_last
        self.stall_s = 0.0  # that training has waited for checkpoints since the start
        self.written_step = -1  # of the newest checkpoint that is on the disk
        self.problem = ""  # of the last write, empty when it went well
        self._warn = warn  # the thread calls it
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, Tensors] = {}

    def submit(
        self,
        step: int,
        tensors: Mapping[str, Tensors],
        state: Mapping[str, Any],
        *,
        best_step: int | None,
        keep_all: bool = False,
    ) -> None:
        """Copy what is given and write it, after the write before it. `keep_all`: remove no older
        ones."""
        begun = time.perf_counter()
        self.wait()
        options = {"keep_last": 0 if keep_all else self.keep_last, "best_step": best_step}
        self._start(self.checkpoints.save, step, self._copied(tensors), dict(state), **options)
        self.stall_s += time.perf_counter() - begun

    def amend(self, step: int, state: Mapping[str, Any], *, best_step: int | None) -> None:
        """Replace the state of the checkpoint of that step, if the disk has it."""
        self.wait()
        if self.written_step == step:
            self._start(self.checkpoints.amend, step, dict(state), best_step=best_step)

    def wait(self) -> bool:
        """Until the write under way is done; whether the last one went well."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return not self.problem

    def _start(self, write: Callable[..., object], step: int, *given: Any, **options: Any) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):  # Linux: of this thread alone
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICE)
            try:
                write(step, *given, **options)
            except Exception as error:  # training goes on, and its end says what is missing
                reason, last = getattr(error, "strerror", None) or error, self.written_step
                self.problem = f"checkpoint {step_name(step)}: {reason}"
                safe = f"the last good one is {step_name(last)}" if last >= 0 else "there is none"
                self._warn(f"warning: cannot write {self.problem}; {safe}; training goes on")
            else:
                self.written_step, self.problem = step, ""

        # no daemon: a process that ends on its own ends with this write done
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def _copied(self, tensors: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """In buffers that are kept: fresh memory would cost more than the copy."""
        for name, group in tensors.items():
            buffers = self._buffers.setdefault(name, {})
            for key, source in group.items():
                if key not in buffers:
                    buffers[key] = torch.empty(source.shape, dtype=source.dtype)
                buffers[key].copy_(source.detach())
        return {name: {key: self._buffers[name][key] for key in tensors[name]} for name in tensors}


def load_checkpoint(folder: Path, which: str) -> Checkpoint:
    """`which` is "latest", "best" or a step number. Raises ConfigError when there is none such."""
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    if not steps:
        raise ConfigError(f"{folder} holds no checkpoint: has the run reached its first one?")
    if which == "latest" and (newest := checkpoints.load_newest()):
        return newest
    step = checkpoints.best_step() if which == "best" else int(which) if which.isdigit() else None
    if step not in steps:
        have = ", ".join(map(str, steps))
        raise ConfigError(f"checkpoint={which} is not in {folder}; there are: latest, {have}")
    try:
        return checkpoints.load(step)
    except TornCheckpoint as torn:
        raise ConfigError(f"checkpoint={which}: {torn}; choose another one") from None


def load_weights(source: Path) -> Tensors:
    """Weights of a run folder (averaged, newest), a checkpoint folder (averaged), a file, or a
    folder that `export` wrote; of a checkpoint with a discriminator also its, as DISCRIMINATOR.

    Raises ConfigError, blaming `init_from`.
    """
    folder, which = named_checkpoint(source)
    if which == "latest" and (source / "model.safetensors").is_file():
        source = source / "model.safetensors"  # as `export format=safetensors` names it
    try:
        if source.suffix == ".safetensors":
            return safetensors.torch.load_file(source)
        if folder.is_dir():
            tensors = load_checkpoint(folder, which).tensors
            others = tensors.get("discriminator", {})
            return tensors["ema"] | {DISCRIMINATOR + name: v for name, v in others.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"init_from={source}: cannot be read ({error})") from None
    except ConfigError as error:
        raise ConfigError([f"init_from={source}: {line}" for line in error.problems]) from None
    raise ConfigError(
        f"init_from={source}: no run folder, checkpoint folder, .safetensors file or folder of "
        "a diffusers AutoencoderKL; give for example runs/mnist or "
        "runs/mnist/checkpoints/step_00001000"
    )
