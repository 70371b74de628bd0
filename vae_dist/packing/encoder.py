"""Shards of a data set once more, with a member that a network makes of each image.

In: shards of images, and a subclass of `Encoder` that knows the network. Out: in the folder of the
job, `NAME-000000.tar`, ... with their offsets and `_info.json`, and last the summary: what was
done, what is left out.

Any number of processes share the work. Images of one shape go through the network together:
neighbours of one shard, in batches that the keys decide, so that the values do not depend on who
writes what.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_dist.config.commands import EncodeCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.decode import MASK_MEMBER, SUFFIXES
from vae_dist.data.indexing import write_info
from vae_dist.data.reader import SkippedSample
from vae_dist.data.sources import is_pipe
from vae_dist.data.tar import BLOCK, DamagedSampleError, is_metadata, key_and_suffix, members
from vae_dist.distributed import Runtime
from vae_dist.files import printable, progress_bar, redacted
from vae_dist.inference.load import Images
from vae_dist.packing.items import suffix_of
from vae_dist.packing.jobs import Report, ShardJob, check_lost, cut, print_left_out

MIN_SHARDS = 32  # of a large set: so that many processes have work
NUM_PROBED = 64  # samples whose bytes are measured
WINDOW_BATCHES = 8  # that images of several shapes are sorted within


class PlannedShard(NamedTuple):
    name: str
    first: int  # number of its first sample in index order
    stop: int


class Sample(NamedTuple):
    number: int  # in index order
    key: str
    members: dict[str, bytes]  # that the output has beside the latents
    label: int
    planes: np.ndarray  # the image (C, H, W), with a mask as its last plane


@dataclass
class Encoder(ABC):
    """Reads samples, encodes their images, and writes the shards of one rank."""

    network: Any  # as the subclass knows it
    job: ShardJob
    images: Images
    command: EncodeCommand
    runtime: Runtime
    threads: int  # that read and decode
    keeps_images: bool
    name: ClassVar[str]  # of the shards
    member: ClassVar[str]  # suffix of what is added to a sample

    def __post_init__(self) -> None:
        self.settings = self.images.settings.without_augmentation()
        self.num_samples = self.images.index.num_samples
        self.reader = self.images.reader()
        is_in_order = any(map(is_pipe, self.images.index.paths))  # a command gives its bytes once
        self.threads = 1 if is_in_order else max(1, self.threads)

    @abstractmethod
    def num_bytes(self, sample: Sample) -> int:
        """Of what is added to it, about."""

    @abstractmethod
    def encoded(self, samples: Sequence[Sample], planes: Tensor) -> list[bytes]:
        """What is added to each; planes: theirs, on the device. Raises ConfigError."""

    def facts_of_shard(self) -> Report:
        """What is to be kept of the shard that was just written."""
        return {}

    @abstractmethod
    def describe(self, reports: Sequence[Report]) -> Report:
        """What the summary and the last line say, of the reports of all shards."""

    def run(self) -> None:
        """Write what is missing in the folder: each rank its shards. Raises ConfigError."""
        job, runtime, started = self.job, self.runtime, time.monotonic()
        if runtime.on_main(job.is_finished):
            if runtime.is_main:
                print(f"{job.out}: finished already; nothing is left to do")
            return
        runtime.on_main(job.begin)
        plan = runtime.on_main(self._plan)
        missing = runtime.on_main(lambda: [s for s in plan if not job.is_done(s.name)])
        try:
            self._write(missing[runtime.rank :: runtime.world])
        except ConfigError as error:
            if not runtime.is_main:  # the command line shows those of rank 0 alone
                print(f"rank {runtime.rank}: {printable(error)}", file=sys.stderr)
            raise
        runtime.barrier()
        if runtime.is_main:
            with job.writing():
                self._finish(plan)
            num_images = sum(shard.stop - shard.first for shard in missing)
            speed = num_images / max(time.monotonic() - started, 1e-9)
            print(f"images_per_second={speed:.1f} on {runtime.world} x {runtime.device.type}")

    def _plan(self) -> list[PlannedShard]:
        """Shards of equal numbers of samples, give or take one, of about `shard_mb` each, after the
        bytes of some samples."""
        sizes, command, num_samples = [], self.command, self.num_samples
        for number in range(0, num_samples, max(1, num_samples // NUM_PROBED)):
            for sample in self._read((number, number + 1)):
                if isinstance(sample, Sample):
                    lengths = [self.num_bytes(sample), *map(len, sample.members.values())]
                    sizes.append(sum(BLOCK + -(-length // BLOCK) * BLOCK for length in lengths))
        total = sum(sizes) / max(1, len(sizes)) * num_samples
        count = math.ceil(total / (command.shard_mb * 1e6))
        parts = enumerate(cut(num_samples, count, at_least=MIN_SHARDS))
        return [PlannedShard(f"{self.name}-{k:06d}.tar", *part) for k, part in parts]

    # reading

    def _read(self, piece: tuple[int, int]) -> list[Sample | str]:
        """Samples by their numbers in the index; of unreadable ones the text. Raises ShardError."""
        found: list[Sample | str] = []
        runs = self.reader.in_order(*piece)
        places = [(run.shard, place) for run in runs for place in range(run.start, run.stop)]
        samples = zip(places, self.reader.read_runs(runs), strict=True)
        for number, ((shard, place), data) in enumerate(samples, piece[0]):
            try:
                image, label, _ = self.reader.load(data, shard, place, epoch=0)
                key, others = carried(data, self.member, keep_images=self.keeps_images)
            except DamagedSampleError as error:
                path = self.reader.index.paths[shard]
                found.append(str(SkippedSample(path, place, str(error), None)))
            else:
                found.append(Sample(number, key, others, label, image))
        return found

    def _read_ahead(self, pieces: Iterable[tuple[int, int]]) -> Iterator[list[Sample | str]]:
        """`_read` of the pieces, in their order, by threads that are some pieces ahead."""
        waiting: deque[Future[list[Sample | str]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for piece in pieces:
                waiting.append(pool.submit(self._read, piece))
                if len(waiting) > 2 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    # writing

    def _write(self, shards: Sequence[PlannedShard]) -> None:
        """Raises ConfigError for what the disk refuses and when too much cannot be read."""
        count, num_done = self.command.batch_size, 0
        lost: list[str] = []
        at_once = WINDOW_BATCHES if self.settings.sizes_differ else 1  # so few batches are small
        starts = {s: range(s.first, s.stop, count) for s in shards}
        pieces = self._read_ahead((at, min(at + count, s.stop)) for s in shards for at in starts[s])
        total = sum(shard.stop - shard.first for shard in shards)
        with progress_bar("encoded", total, unit="images") as progress:
            for shard in shards:
                num_lost = len(lost)
                with self.job.shard(shard.name) as (writer, report):
                    for start in range(0, len(starts[shard]), at_once):
                        num_pieces = len(starts[shard][start : start + at_once])
                        window = [found for piece in islice(pieces, num_pieces) for found in piece]
                        samples = [found for found in window if isinstance(found, Sample)]
                        for sample, file in zip(samples, self._by_shape(samples), strict=True):
                            added = {**sample.members, self.member: file}
                            writer.write({"__key__": sample.key, **added})
                        lost += [found for found in window if isinstance(found, str)]
                        check_lost(self.command, "data", lost, total=self.num_samples)
                        num_done += len(window)
                        progress(num_done)
                    skipped = lost[num_lost:]
                    num_samples = shard.stop - shard.first - len(skipped)
                    report |= {"samples": num_samples, "skipped": skipped, **self.facts_of_shard()}

    def _by_shape(self, samples: Sequence[Sample]) -> list[bytes]:
        """`encoded` of each sample, in order; images of one shape are encoded together."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, sample in enumerate(samples):
            by_shape.setdefault(sample.planes.shape, []).append(place)
        found: dict[int, bytes] = {}
        count = self.command.batch_size
        for places in by_shape.values():
            for start in range(0, len(places), count):
                rows = places[start : start + count]
                part = [samples[row] for row in rows]
                # one layout in memory: it decides the last digits
                planes = np.ascontiguousarray(np.stack([sample.planes for sample in part]))
                files = self.encoded(part, torch.from_numpy(planes).to(self.runtime.device))
                found |= zip(rows, files, strict=True)
        return [found[place] for place in range(len(samples))]

    # the end

    def _finish(self, plan: Sequence[PlannedShard]) -> None:
        """Write the index and the summary, and say what was done."""
        paths = [self.job.out / shard.name for shard in plan]
        reports = [self.job.report(shard.name) for shard in plan]
        skipped = [name for report in reports for name in report["skipped"]]
        check_lost(self.command, "data", skipped, total=self.num_samples)
        num_samples, data = sum(report["samples"] for report in reports), self.command.data
        if not num_samples:
            raise ConfigError(f"data={shown(data)}: no image can be read; {skipped[0]}")
        facts = self.describe(reports)
        write_info(paths, split=self.name)
        numbers = {"samples": num_samples, "shards": len(plan)}
        self.job.finish({**facts, "data": redacted(data), **numbers, "skipped": skipped})
        print_left_out(skipped, summary=self.job.out / self.job.summary)
        words = [f"{key}={shown(value)}" for key, value in (numbers | facts).items()]
        print(f"{self.job.out}: {self.name}, {len(skipped)} images left out, {' '.join(words)}")


def carried(
    data: bytes | memoryview, member: str, *, keep_images: bool
) -> tuple[str, dict[str, bytes]]:
    """Key and members of a sample, by their suffixes as they are written; `member` will be added.
    Raises DamagedSampleError."""
    found: dict[str, bytes] = {}
    sample_key = ""
    for name, content in members(data):
        key, suffix = key_and_suffix(name)
        if key is None or is_metadata(name):
            continue
        is_image = suffix_of(f".{suffix}") in SUFFIXES and suffix.lower() != MASK_MEMBER
        if keep_images or not is_image:
            found[suffix] = bytes(content)
        sample_key = key
    if member in map(str.lower, found):  # as readers take it
        raise DamagedSampleError(f"it has a .{member} already")
    return sample_key, found
