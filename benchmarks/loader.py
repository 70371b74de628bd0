"""How fast images are loaded: this package, webdataset, and the limit set by the JPEG decoder.

    python benchmarks/loader.py data=FOLDER_OF_JPEGS [turns=5] [images=4096] [large=true]

FOLDER_OF_JPEGS holds images of one size (others are left out). They are packed into a temporary
folder. All ways take turns in one run; a turn is `images` images, or as many as there are, and
times are CPU seconds of this process (workers=0) or seconds by the clock (two workers). Figures are
medians over the turns; ratios are medians of the ratios of a turn. large=true: the images, tiled to
2000 x 1500, brought to 256 x 256. The last line is JSON.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image

from vae_dist.data.index import load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

BATCH = 64
LARGE_SIZE, SMALL_SIZE = (1500, 2000), 256
NUM_LARGE = 96
REPEATS = 8  # of the small ones in the shards: a lane is then longer than some windows


def jpegs(folder: Path) -> list[bytes]:
    """The colour JPEGs of the most common size."""
    found = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    heads = [simplejpeg.decode_jpeg_header(data) for data in found if data[:2] == b"\xff\xd8"]
    if not heads:
        raise SystemExit(f"data={folder}: no JPEG files there; give a folder of them")
    ((size, _),) = Counter(head[:2] for head in heads).most_common(1)
    return [data for data, head in zip(found, heads, strict=True) if head[:2] == size]


def tiled(data: bytes) -> bytes:
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    repeats = [-(-want // have) for want, have in zip(LARGE_SIZE, pixels.shape, strict=False)]
    large = np.tile(pixels, (*repeats, 1))[: LARGE_SIZE[0], : LARGE_SIZE[1]]
    file = io.BytesIO()
    Image.fromarray(large).save(file, "JPEG", quality=90)
    return file.getvalue()


class Loaders:
    """Each method reads `count` images and returns how many; `size`: resize to it, or None."""

    def __init__(
        self, files: list[bytes], folder: Path, size: int | None, repeats: int = 1
    ) -> None:
        samples = (
            {"__key__": f"{i:06d}", "jpg": data, "cls": b"1"}
            for i, data in enumerate(files * repeats)
        )
        self.paths = [str(p) for p in write_shards(samples, folder, num_shards=8)]
        self.files, self.size = files, size
        height, width, _, _ = simplejpeg.decode_jpeg_header(files[0])
        shape = (size, size) if size else (height, width)
        self.settings = ImageSettings(3, shape, size is not None, 2**26)
        self.index = load_index(str(folder), key="data", create=False)

    def limit(self, count: int) -> int:
        for data in self.files[:count]:
            simplejpeg.decode_jpeg(data, "RGB")
        return min(count, len(self.files))

    def ours(self, count: int, workers: int = 0) -> int:
        order = Order(self.index.lengths, lanes=BATCH, window=32, seed=0)
        steps = max(1, count // BATCH)
        batches = TrainingStream(
            self.index, order, self.settings, batch_size=BATCH, start_step=0, stop_step=steps,
            workers=workers,
        )  # fmt: skip
        return sum(batch.num_images for batch in batches)

    def webdataset_default(self, count: int, workers: int = 0) -> int:
        return self._webdataset(count, workers, _by_pillow(self.size), "pil")

    def webdataset_simplejpeg(self, count: int, workers: int = 0) -> int:
        return self._webdataset(count, workers, _by_simplejpeg, None)

    def _webdataset(
        self, count: int, workers: int, to_array: Callable[[Any], Any], decode: str | None
    ) -> int:
        # the shuffle and the batches of a training run; it ends with the shards, so it is repeated
        data = wds.WebDataset(self.paths, shardshuffle=8).shuffle(1000).repeat()
        data = data.decode(decode) if decode else data
        data = data.to_tuple("jpg", "cls").map_tuple(to_array).batched(BATCH)
        loader = wds.WebLoader(data, batch_size=None, num_workers=workers)
        done = 0
        for images, _ in loader:
            done += len(images)
            if done >= count // BATCH * BATCH:
                break
        return done


def _by_simplejpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB")


class _by_pillow:
    def __init__(self, size: int | None) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> np.ndarray:
        if self.size is not None:
            scale = self.size / min(image.size)
            image = image.resize(tuple(round(scale * n) for n in image.size), Image.BICUBIC)
            left, top = ((n - self.size) // 2 for n in image.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image)


def rates(
    ways: dict[str, Callable[..., int]], turns: int, clock: Callable[[], float], *how: int
) -> Iterator[dict[str, float]]:
    """Images per second of `way(*how)`, in each turn."""
    for way in ways.values():
        way(*how)  # warm
    for _ in range(turns):
        turn = {}
        for name, way in ways.items():
            begun = clock()
            turn[name] = way(*how) / (clock() - begun)
        yield turn


def table(title: str, turns: list[dict[str, float]]) -> dict[str, Any]:
    """Print and return the medians and the ratios of `ours` to each other."""
    print(title)
    result: dict[str, Any] = {}
    for name in turns[0]:
        result[name] = statistics.median(turn[name] for turn in turns)
        print(f"  {name:24s} {result[name]:8.0f} images/s")
    for name in [name for name in turns[0] if name != "ours"]:
        ratio = statistics.median(turn["ours"] / turn[name] for turn in turns)
        result[f"ours / {name}"] = round(ratio, 3)
        print(f"  ours / {name:17s} {ratio:8.2f}")
    return result


def main(argv: list[str]) -> int:
    keys = {"turns": "5", "images": "4096", "large": "true"} | dict(t.split("=", 1) for t in argv)
    turns, count = int(keys["turns"]), int(keys["images"])
    torch.set_num_threads(1)
    files = jpegs(Path(keys["data"]))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        loaders = Loaders(files, Path(name) / "small", None, REPEATS)
        ways = {
            "ours": loaders.ours,
            "webdataset default": loaders.webdataset_default,
            "webdataset simplejpeg": loaders.webdataset_simplejpeg,
        }
        result["one process"] = table(
            f"as they are ({len(files)} images), one process, CPU time",
            list(rates({"limit": loaders.limit, **ways}, turns, time.process_time, count)),
        )
        for workers in (1, 2):
            result[f"{workers} workers"] = table(
                f"as they are, {workers} worker(s), by the clock",
                list(rates(ways, turns, time.perf_counter, count, workers)),
            )
        if keys["large"] == "true":
            large = Loaders([tiled(f) for f in files[:NUM_LARGE]], Path(name) / "large", SMALL_SIZE)
            ways = {"ours": large.ours, "webdataset default": large.webdataset_default}
            result["2000x1500 to 256"] = table(
                "2000 x 1500 to 256 x 256, one process, CPU time",
                list(rates(ways, min(turns, 3), time.process_time, NUM_LARGE)),
            )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
