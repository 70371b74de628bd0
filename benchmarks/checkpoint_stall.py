"""How long does training wait for a checkpoint, and what does writing it behind training cost?

    python -m benchmarks.checkpoint_stall [parameters=20000000] [checkpoints=3] [folder=...]

In: a state of weights, averages and two moments, written while a loop of matrix products stands for
training. Out: seconds of the copy (the stall), of the whole write, and of 100 loop rounds with and
without a write under way; the last line is a JSON object. `stall_fraction` is of one checkpoint
per 30 s: the copy, plus what the loop loses while the disk is busy.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from vae_dist.run.checkpoint import Checkpoints, CheckpointWriter

INTERVAL_S = 30.0
ROUNDS = 100


def rounds(matrix: torch.Tensor) -> float:
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        torch.mm(matrix, matrix)
    return time.perf_counter() - begun


def main(argv: list[str]) -> int:
    given = dict(word.split("=", 1) for word in argv)
    parameters = int(float(given.get("parameters", 20e6)))
    folder = Path(tempfile.mkdtemp(prefix="stall.", dir=given.get("folder")))
    torch.set_num_threads(1)
    group = {f"layer{i}": torch.randn(parameters // 20) for i in range(20)}
    moments = {f"{kind}/{name}": value for kind in "ab" for name, value in group.items()}
    tensors = {"model": group, "ema": group, "optimizer": moments}
    writer = CheckpointWriter(Checkpoints(folder), keep_last=1, warn=print)
    matrix = torch.randn(256, 256)
    stalls, writes, alone, beside = [], [], [], []
    for step in range(1, int(given.get("checkpoints", 3)) + 1):
        alone.append(rounds(matrix))
        before, begun = writer.stall_s, time.perf_counter()
        writer.submit(step, tensors, {"scalars": {}}, best_step=None)
        stalls.append(writer.stall_s - before)
        while writer.written_step < step and not writer.problem:
            beside.append(rounds(matrix))
        writer.wait()
        writes.append(time.perf_counter() - begun)
    shutil.rmtree(folder)
    stall, write = statistics.median(stalls), statistics.median(writes)
    slower = max(0.0, 1 - statistics.median(alone) / statistics.median(beside or alone))
    figures = {
        "parameters": parameters,
        "state_bytes": 16 * parameters,
        "stall_s": stall,
        "write_s": write,
        "slower_while_writing": slower,
        "stall_fraction": (stall + slower * (write - stall)) / INTERVAL_S,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
