"""A data set to a folder of latents, by any number of processes.

In: images, a model, the keys of `encode`. Out: the folder `OUT.partial/`, which becomes OUT by one
rename when everything is there: `latents-000000.tar`, ... with their offsets `.tar.idx` and
`_info.json`, `latents.json` (mean and spread), `encode.json` (what was done, what is left out).
A killed `encode` repeats the shards that it was writing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.index import write_info
from vae_dist.distributed import Runtime
from vae_dist.files import ProgressBar, sync_folder, write_durably
from vae_dist.inference.encoding.plan import NAME, PlannedShard, identity, plan_shards
from vae_dist.inference.encoding.writing import (
    NUM_NAMED,
    WORK,
    Done,
    Writing,
    is_written,
    report_path,
)
from vae_dist.inference.load import Images, LoadedModel
from vae_dist.models.latent import (
    STATISTICS_FILE,
    LatentMoments,
    LatentStatistics,
    write_statistics,
)
from vae_dist.run.folder import RunFolder, RunLock

SUMMARY = "encode.json"
BEAT_S = 2.0  # between two meetings of the ranks
MAX_SHOWN = 80  # characters of two values that differ; digests are longer


@dataclass(frozen=True)
class Encoded:
    """What the folder holds, and how fast this session was."""

    summary: dict[str, Any]
    images_per_second: float | None  # None: nothing was left to do


def encode_images(
    loaded: LoadedModel, images: Images, command: EncodeCommand, runtime: Runtime
) -> Encoded:
    """Write what is missing of the folder `command.out`; every rank takes part.

    Raises ConfigError on all ranks alike, for a folder that is in use, disks, and images of which
    too many cannot be read.
    """
    out = Path(command.out)
    mine = identity(images, loaded, command)
    if finished := runtime.on_main(lambda: _finished(out, mine)):
        return Encoded(finished, None)
    partial = out.with_name(f"{out.name}.partial")
    plan = runtime.on_main(lambda: plan_shards(images, loaded.model, command))
    with contextlib.ExitStack() as held:
        if finished := runtime.on_main(lambda: _hold(out, partial, mine, held)):
            return Encoded(finished, None)
        runtime.on_main(lambda: _claim(partial, mine))
        runtime.on_all_ranks(lambda: _check_visible(partial, mine))
        seconds, count = _write_missing(loaded, images, command, runtime, partial, plan)
        summary = runtime.on_main(lambda: _finish(out, partial, plan, loaded, command, mine))
    return Encoded(summary, count / max(seconds, 1e-9))


def _write_missing(
    loaded: LoadedModel,
    images: Images,
    command: EncodeCommand,
    runtime: Runtime,
    partial: Path,
    plan: Sequence[PlannedShard],
) -> tuple[float, int]:
    """Write the shards that are not there yet; seconds, and images of all ranks."""
    missing = runtime.on_main(lambda: [s.number for s in plan if not is_written(partial, s)])
    before = sum(s.stop - s.first for s in plan if s.number not in set(missing))
    shards = [plan[number] for number in missing[runtime.rank :: runtime.world]]
    started = time.monotonic()
    writing = Writing(loaded, images, command, runtime.device, partial)
    work = writing.write(shards)
    skipped_before = runtime.on_main(lambda: _num_skipped(partial, plan))
    total = images.index.num_samples
    with (
        contextlib.closing(work),
        ProgressBar("encoded", total, unit="images") if runtime.is_main else _no_bar() as bar,
    ):
        for everyone in _in_step(work, writing.done, runtime):
            num_samples = sum(done.num_samples for done in everyone)
            bar(before + num_samples)
            num_skipped = skipped_before + sum(done.num_skipped for done in everyone)
            names = [name for done in everyone for name in done.skipped]
            _check_skipped(command, num_skipped, total, names)
    return time.monotonic() - started, total - before


@contextlib.contextmanager
def _no_bar() -> Iterator[Any]:
    yield lambda done: None


def _in_step(work: Iterator[None], done: Done, runtime: Runtime) -> Iterator[list[Done]]:
    """Run every rank's work to its end. The ranks meet every BEAT_S: what goes wrong on one is
    raised by all, and a rank that is ready does not wait for longer than the others' next meeting.
    """

    def advance() -> bool:
        until = time.monotonic() + BEAT_S
        return all(time.monotonic() < until for _ in work)

    has_ended = False
    while not has_ended:
        is_ready = runtime.on_all_ranks(advance)
        everyone = runtime.gather((is_ready, done))
        yield [theirs for _, theirs in everyone]
        has_ended = all(ready for ready, _ in everyone)


def _check_skipped(command: EncodeCommand, num: int, total: int, names: Sequence[str]) -> None:
    if num > command.max_skipped_fraction * total:
        raise ConfigError(
            [
                f"data={shown(command.data)}: {num} of {total} images cannot be read, more than "
                f"max_skipped_fraction={command.max_skipped_fraction:g}:",
                *(f"  {name}" for name in names[:NUM_NAMED]),
                "mend the shards, or raise max_skipped_fraction and give the same command again",
            ]
        )


def _report(folder: Path, shard: PlannedShard) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report_path(folder, shard).read_text())
    return found


def _num_skipped(folder: Path, plan: Sequence[PlannedShard]) -> int:
    return sum(len(_report(folder, s)["skipped"]) for s in plan if is_written(folder, s))


# the folder


def _finished(out: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a folder that is done; None where there is none yet. Raises ConfigError."""
    path = out / SUMMARY
    if path.exists():
        summary: dict[str, Any] = json.loads(path.read_text())
        _check_same(summary["identity"], mine, out)
        shutil.rmtree(out / WORK, ignore_errors=True)
        return summary
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: the folder is in use; give another one, or empty it")
    return None


def _hold(
    out: Path, partial: Path, mine: dict[str, Any], held: contextlib.ExitStack
) -> dict[str, Any] | None:
    """Lock the work folder until `held` is closed. The summary of what another process finished
    meanwhile, if it did. Raises ConfigError where one is at work."""
    held.enter_context(RunLock(RunFolder(partial / WORK), name=f"out={out}"))
    if finished := _finished(out, mine):
        shutil.rmtree(partial)  # made for the lock alone
    return finished


def _claim(partial: Path, mine: dict[str, Any]) -> None:
    """Begin in the work folder, or find it begun by the same command. Raises ConfigError."""
    work = partial / WORK
    path = work / "identity.json"
    if path.exists():
        _check_same(json.loads(path.read_text()), mine, partial)
    for name in ("reports", "tmp"):
        (work / name).mkdir(parents=True, exist_ok=True)
    for left in (work / "tmp").iterdir():  # by a killed process
        host, _, pid = left.name.partition(".tar.")[2].rpartition(".")
        if host == os.uname().nodename and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)
    if not path.exists():
        write_durably(path, json.dumps(mine, indent=1).encode())


def _check_same(theirs: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    mine = json.loads(json.dumps(mine))
    differs = [key for key in mine if theirs.get(key) != mine[key]]
    if differs:
        other = ", ".join(
            f"another {_in_short(key, theirs.get(key), mine[key])}" for key in differs
        )
        raise ConfigError(
            f"{folder} was made with {other}: give that command again, or remove the folder, or "
            "choose another one with out="
        )


def _in_short(key: str, theirs: Any, mine: Any) -> str:
    values = f"{shown(theirs)} there, {shown(mine)} here"
    return f"{key} ({values})" if len(values) < MAX_SHOWN else key


def _check_visible(partial: Path, mine: dict[str, Any]) -> None:
    try:
        text = (partial / WORK / "identity.json").read_text()
    except FileNotFoundError:
        raise ConfigError(
            f"out={partial}: is not the same folder on all nodes; choose one on a file system that "
            "all nodes see"
        ) from None
    _check_same(json.loads(text), mine, partial)


def _finish(
    out: Path,
    partial: Path,
    plan: Sequence[PlannedShard],
    loaded: LoadedModel,
    command: EncodeCommand,
    mine: dict[str, Any],
) -> dict[str, Any]:
    """Write index, statistics and, last, the summary; give the folder its name."""
    reports = [_report(partial, shard) for shard in plan]
    num_samples = sum(report["samples"] for report in reports)
    skipped = [name for report in reports for name in report["skipped"]]
    _check_skipped(command, len(skipped), plan[-1].stop, skipped)
    if not num_samples:
        raise ConfigError(f"data={shown(command.data)}: no image can be read; {skipped[0]}")
    statistics = _statistics(reports)
    facts = {
        "run": str(Path(command.run).resolve()),
        "step": loaded.step,
        "weights": command.weights,
        "of": "means" if command.content == "mean" else "samples",
    }
    write_statistics(partial / STATISTICS_FILE, statistics, facts)
    write_info([partial / shard.name for shard in plan], split=NAME)
    sizes: Counter[str] = Counter()
    for report in reports:
        sizes.update(report["sizes"])
    summary = {
        **facts,
        "data": command.data,
        "content": command.content,
        "dtype": command.dtype,
        "samples": num_samples,
        "skipped": skipped,
        "shards": len(plan),
        "bytes": sum((partial / shard.name).stat().st_size for shard in plan),
        "image_sizes": dict(sizes.most_common(20)),
        "latent_channels": loaded.model.latent_channels,
        "stride": loaded.model.stride,
        "statistics": statistics.record(),
        "identity": mine,
    }
    write_durably(partial / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    if out.exists():
        out.rmdir()  # it is empty
    os.rename(partial, out)
    sync_folder(out.parent)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return summary


def _statistics(reports: Sequence[dict[str, Any]]) -> LatentStatistics:
    """Added up shard by shard in their order, whoever wrote them."""
    moments = LatentMoments((len(reports[0]["sums"]) - 2) // 3)
    for report in reports:
        moments.add_sums(report["sums"])
    return moments.statistics()
