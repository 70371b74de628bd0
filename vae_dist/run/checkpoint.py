"""Checkpoints: named tensors and a small JSON state, written so that a kill costs none.

Folder `step_00001000/` holds `NAME.safetensors` for each group of tensors (model, ema, optimizer),
`state.json`, and `manifest.json` with the size and CRC-32 of each file. It is written under a
temporary name, synced and renamed; then `latest` names it; then older ones are removed, but for the
one that `best` names. A folder whose files differ from its manifest is torn: it is reported and the
one before it is used. A write that fails leaves all others as they were.
Nothing that is read back can run code: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.files import sync_folder, write_durably

Tensors = dict[str, torch.Tensor]

SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE_BYTES = 4 << 20  # of a file that are summed and written at once

_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # nothing to read there

REPLACED = ".replaced"  # ending of a checkpoint that gives way to another of its step


class TornCheckpoint(ValueError):
    """A checkpoint folder whose files are not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """What one folder held: groups of tensors on CPU, and the JSON state (with `step`)."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of all complete-looking folders, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_" + "[0-9]" * 8))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensors],
        state: Mapping[str, Any],
        *,
        keep_last: int,
        best_step: int | None = None,
    ) -> Path:
        """Write a checkpoint durably, point `latest` at it, keep the `keep_last` newest ones.

        `best_step` is kept as well, and `best` names it. Raises OSError when the disk does not take
        it; nothing that was there before is harmed then.
        """
        target = self.folder / step_name(step)
        temporary = self.folder / f".{target.name}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            # not its parents: where these are gone, the disk of the run is
            temporary.mkdir()
            self._write(temporary, step, tensors, state)
            self._put(temporary, target)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(self.folder)
        write_durably(self.folder / "latest", target.name.encode())
        kept = set(self.steps()[-keep_last:])
        if best_step is not None:
            if best_step in self.steps():  # else its write failed: the one before it stays
                self.name_best(best_step)
            if (best := self.best_step()) is not None:
                kept.add(best)
        for old in self.steps():
            if old < step and old not in kept:
                with contextlib.suppress(OSError):  # it is in nobody's way
                    self._discard(self.folder / step_name(old))
        return target

    def _put(self, temporary: Path, target: Path) -> None:
        """Rename into place. One that is there already (torn, or saved before its evaluation was
        done) stays beside it under another name until then: a kill loses neither."""
        replaced = target.with_name(f".{target.name}{REPLACED}")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(target, replaced)
        try:
            os.replace(temporary, target)
        except OSError:
            if replaced.exists():
                os.replace(replaced, target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def name_best(self, step: int) -> None:
        """Let `best` name the checkpoint of a step."""
        if self.best_step() != step:
            write_durably(self.folder / "best", step_name(step).encode())

    def best_step(self) -> int | None:
        """The step that `best` names, if its checkpoint is there."""
        try:
            name = (self.folder / "best").read_text()
        except OSError:
            return None
        return next((step for step in self.steps() if step_name(step) == name), None)

    def _write(
        self, folder: Path, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]
    ) -> None:
        manifest = {}
        for name, group in tensors.items():
            manifest[f"{name}.safetensors"] = _write_pieces(
                folder / f"{name}.safetensors", safetensors_pieces(group)
            )
        text = json.dumps({"step": step, **state}, indent=1).encode()
        manifest["state.json"] = _write_pieces(folder / "state.json", [text])
        write_durably(folder / "manifest.json", json.dumps(manifest, indent=1).encode())

    def load(self, step: int) -> Checkpoint:
        """Read one checkpoint, checking every byte. Raises TornCheckpoint."""
        folder = self.folder / step_name(step)
        files = self._checked_files(folder)
        state = json.loads(files.pop("state.json"))
        tensors = {
            name.removesuffix(".safetensors"): safetensors.torch.load(data)
            for name, data in files.items()
        }
        return Checkpoint(step=int(state["step"]), tensors=tensors, state=state)

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; torn ones are named on stderr and left behind.

        None where there is none; ConfigError where there are some but none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step)
            except TornCheckpoint as torn:
                print(f"warning: {torn}; trying the checkpoint before it", file=sys.stderr)
        if steps:
            raise ConfigError(
                f"none of the {len(steps)} checkpoints in {self.folder} is whole; put one back "
                "from a copy, or start anew with run=OTHER_FOLDER"
            )
        return None

    def remove_leftovers(self) -> None:
        """Remove what killed processes left half written. Only for the holder of the run's lock.

        What a disk does not let go is in nobody's way, and stays.
        """
        for path in self.folder.glob(f".*{REPLACED}"):  # killed between two renames
            if not (target := self.folder / path.name[1 : -len(REPLACED)]).exists():
                os.replace(path, target)
        for path in self.folder.glob(".*"):
            if path.name.endswith(".tmp") and path.is_file():
                with contextlib.suppress(OSError):
                    path.unlink()
            elif path.name.endswith((".tmp", ".old", REPLACED)):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than `step`: torn ones, which the run is going to write anew."""
        for newer in self.steps():
            if newer > step:
                torn = self.folder / f"torn_{step_name(newer)}"
                shutil.rmtree(torn, ignore_errors=True)
                os.replace(self.folder / step_name(newer), torn)

    def _discard(self, folder: Path) -> None:
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _checked_files(self, folder: Path) -> dict[str, bytes]:
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            expected = {name: (one["bytes"], one["crc32"]) for name, one in manifest.items()}
        except (*_NO_FILE, ValueError, AttributeError, KeyError, TypeError) as error:
            raise TornCheckpoint(
                f"{folder} has no readable manifest.json ({type(error).__name__}: {error})"
            ) from None
        files = {}
        for name, (num_bytes, crc32) in expected.items():
            if not name or Path(name).name != name:
                raise TornCheckpoint(f"{folder}/manifest.json names {name!r}, outside its folder")
            try:
                data = (folder / name).read_bytes()
            except _NO_FILE:  # any other trouble of the disk is no sign of a torn write
                raise TornCheckpoint(f"{folder}/{name} is missing") from None
            if len(data) != num_bytes or zlib.crc32(data) != crc32:
                raise TornCheckpoint(
                    f"{folder}/{name} is damaged: {len(data)} bytes with CRC {zlib.crc32(data)}, "
                    f"its manifest says {num_bytes} bytes with CRC {crc32}"
                )
            files[name] = data
        if "state.json" not in files:
            raise TornCheckpoint(f"{folder}/manifest.json does not list state.json")
        return files


def safetensors_pieces(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """A safetensors file of CPU tensors, piece by piece, without a copy of it in memory.

    Eight bytes, the length of the header; the header, JSON; the values, row by row. What takes time
    with a piece (checksum, write) does not hold the interpreter's lock: training goes on meanwhile.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of eight
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        values = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(values), PIECE_BYTES):
            yield values[begin : begin + PIECE_BYTES]


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, int]:
    """Write a file durably; its line of the manifest."""
    num_bytes = crc32 = 0

    def counted() -> Iterator[bytes | memoryview]:
        nonlocal num_bytes, crc32
        for piece in pieces:
            num_bytes, crc32 = num_bytes + len(piece), zlib.crc32(piece, crc32)
            yield piece

    write_durably(path, counted())
    return {"bytes": num_bytes, "crc32": crc32}


def load_checkpoint(folder: Path, which: str) -> Checkpoint:
    """`which` is "latest", "best" or a step number. Raises ConfigError when there is none such."""
    checkpoints = Checkpoints(folder)
    if which == "latest":
        found = checkpoints.load_newest()
        if found is None:
            raise ConfigError(f"{folder} holds no checkpoint: has the run reached its first one?")
        return found
    if which == "best":
        best = checkpoints.best_step()
        if best is None:
            raise ConfigError(
                f"checkpoint=best: {folder} has none; it comes with the first evaluation of a run "
                "with checkpoint.keep_best=true; use checkpoint=latest"
            )
        which = str(best)
    if not which.isdigit() or int(which) not in checkpoints.steps():
        have = ", ".join(str(step) for step in checkpoints.steps()) or "none"
        raise ConfigError(f"checkpoint={which} is not in {folder}; there are: latest, {have}")
    try:
        return checkpoints.load(int(which))
    except TornCheckpoint as torn:
        raise ConfigError(f"checkpoint={which}: {torn}; choose another one") from None


def load_weights(source: Path) -> Tensors:
    """Weights of a run folder (averaged, newest), a checkpoint folder (averaged), a file, or a
    folder that `export` wrote.

    Raises ConfigError, blaming `init_from`.
    """
    is_checkpoint = source.name.startswith("step_")
    if not is_checkpoint and (source / "model.safetensors").is_file():
        source = source / "model.safetensors"  # as `export format=safetensors` names it
    if source.suffix == ".safetensors":
        try:
            return safetensors.torch.load(source.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"init_from={source}: cannot be read ({error})") from None
    if is_checkpoint:
        folder, which = source.parent, source.name[5:]
    else:
        folder, which = source / "checkpoints", "latest"
    if not folder.is_dir():
        raise ConfigError(
            f"init_from={source}: no run folder, checkpoint folder, .safetensors file or folder of "
            "a diffusers AutoencoderKL; give for example runs/mnist or "
            "runs/mnist/checkpoints/step_00001000"
        )
    try:
        return load_checkpoint(folder, which).tensors["ema"]
    except ConfigError as error:
        raise ConfigError([f"init_from={source}: {line}" for line in error.problems]) from None
