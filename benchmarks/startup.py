"""How long until a command answers, until a run takes its first step, until an index is read?

    python -m benchmarks.startup [shards=100000] [repeats=3] [folder=...]

In: the commands as one types them (config=mnist, one thread), and a set of local shards of one
sample each with their index. Out: medians of seconds, by the clock and of the CPU, and the last
line as one JSON object. A resumed run reads the same index, and one window of each lane.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from vae_dist.data.index import index_shard, load_index, write_info, write_sidecar
from vae_dist.data.writer import ShardWriter

MAX_LINKS = 30_000  # to one file: file systems allow so many
TRAIN = (
    "config=mnist",
    "wandb.mode=disabled",
    "runtime.threads=1",
    "training.steps=1",
    "optimizer.warmup_steps=0",
    "log.num_images=4",
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "import torch": ("-c", "import torch"),
    "--help": ("-m", "vae_dist.train", "--help"),
    "wrong config": ("-m", "vae_dist.train", "config=mnist", "optimizer.rate=1"),
    "dry run": ("-m", "vae_dist.train", "config=mnist", "dry_run=true"),
}


def timed(arguments: tuple[str, ...], folder: Path) -> tuple[float, float, str]:
    """Seconds by the clock and of the CPU, and what was printed."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, result.stdout


def first_step(text: str) -> float:
    line = next(line for line in text.splitlines() if "first step after" in line)
    return float(line.split("first step after ")[1].split(" s")[0])


def main(argv: list[str]) -> int:
    given = dict(word.split("=", 1) for word in argv)
    repeats, num_shards = int(given.get("repeats", 3)), int(given.get("shards", 100_000))
    folder = Path(tempfile.mkdtemp(prefix="startup.", dir=given.get("folder")))
    figures: dict[str, float] = {}
    try:
        for name, arguments in COMMANDS.items():
            timed(arguments, folder)  # files into memory, digits onto the disk
            runs = [timed(arguments, folder)[:2] for _ in range(repeats)]
            clock, cpu = (median(values) for values in zip(*runs, strict=True))
            figures[name], figures[f"{name}, CPU"] = clock, cpu
            print(f"{name:24} {clock:6.2f} s by the clock, {cpu:6.2f} s of the CPU", flush=True)
        starts = []
        for repeat in range(repeats):
            run = f"run={folder}/run{repeat}"
            text = timed(("-m", "vae_dist.train", *TRAIN, run), folder)[2]
            starts.append(first_step(text))
        figures["first step"] = median(starts)
        print(f"{'first step of train':24} {median(starts):6.2f} s by the clock", flush=True)
        figures |= index_seconds(folder / "shards", num_shards)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))
    return 0


def index_seconds(folder: Path, num_shards: int) -> dict[str, float]:
    """Of reading the index of many shards, and of the order of their samples."""
    folder.mkdir()
    paths = make_shards(folder, num_shards)
    begun = time.perf_counter()
    index = load_index(str(folder), key="data.train", create=False)
    read = time.perf_counter() - begun
    begun = time.perf_counter()
    fingerprint = index.fingerprint
    digest = time.perf_counter() - begun
    assert len(index.paths) == len(paths) and fingerprint
    print(f"{f'index of {num_shards:,} shards':24} {read:6.2f} s, its fingerprint {digest:.2f} s")
    return {"index": read, "fingerprint": digest, "shards": num_shards}


def make_shards(folder: Path, count: int) -> list[Path]:
    """Names of a few files and of their sidecars: what counts is how many there are."""
    paths = [folder / f"shard-{number:06d}.tar" for number in range(count)]
    for number, path in enumerate(paths):
        first = paths[number - number % MAX_LINKS]
        if path == first:
            writer = ShardWriter(path)
            writer.write({"__key__": "0", "png": b"0" * 1000, "cls": b"0"})
            writer.close()
            write_sidecar(path, index_shard(path))
        else:
            path.hardlink_to(first)
            Path(f"{path}.idx").hardlink_to(f"{first}.idx")
    write_info(paths, split="shards")
    return paths


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
