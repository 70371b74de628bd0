"""How much the plan of a worker costs at the scale of 10^9 samples.

    python benchmarks/order.py [samples=1000000000] [shards=100000] [ranks=4096] [workers=8]

One worker of one rank, with one lane per worker: seconds until it knows its first window, at the
start and in the middle of epoch 3, then in a second pass what its plan allocates at its peak and
keeps (tracemalloc, which numpy reports to and which slows the clock). `peak_megabytes` is the most
that this process held. The last line is JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import tracemalloc
from typing import Any

import numpy as np

from vae_dist.data.order import Order


def measure(lengths: np.ndarray, lanes: int, row: int) -> dict[str, float]:
    begun = time.perf_counter()
    order = Order(lengths, lanes=lanes, window=32, seed=0)
    window = order.window_at(lanes - 1, row)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(100):
        window = order.window_at(lanes - 1, window.end_row)
    following = (time.perf_counter() - begun) / 100
    del order
    tracemalloc.start()
    order = Order(lengths, lanes=lanes, window=32, seed=0)
    order.window_at(lanes - 1, row)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "first_window_seconds": first,
        "next_window_seconds": following,
        "plan_megabytes": kept / 2**20,
        "plan_peak_megabytes": peak / 2**20,
    }


def main(argv: list[str]) -> int:
    keys = {"samples": 10**9, "shards": 10**5, "ranks": 4096, "workers": 8}
    keys |= {name: int(float(value)) for name, value in (text.split("=") for text in argv)}
    lanes = keys["ranks"] * keys["workers"]
    random = np.random.default_rng(0)
    lengths = random.multinomial(
        keys["samples"], np.full(keys["shards"], 1 / keys["shards"])
    ).astype(np.int64)
    epoch_rows = keys["samples"] // lanes
    result: dict[str, Any] = dict(keys)
    for name, row in (("start", 0), ("resume_in_epoch_3", 2 * epoch_rows + epoch_rows // 2)):
        result[name] = measure(lengths, lanes, row)
        print(f"{name}: " + " ".join(f"{k}={v:.4g}" for k, v in result[name].items()))
    result["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
