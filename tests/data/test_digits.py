from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import DataConfig
from vae_dist.data import digits as bundled
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import load_index
from vae_dist.data.settings import image_settings


def stored(folder: Path, split: str) -> tuple[list[bytes], list[int]]:
    index = load_index(str(folder / split), key="data.train", create=False)
    settings = image_settings(index, DataConfig(channels=1, resolution="native", max_pixels=10**6))
    assert settings.shape == (1, 28, 28)
    batches = list(EvaluationStream(index, settings, batch_size=1000))
    images = [image.numpy().tobytes() for batch in batches for image in batch.images]
    return images, [label for batch in batches for label in batch.labels.tolist()]


def test_the_shards_hold_each_digit_that_ships_once(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = bundled.load_digits()
    assert images.shape == (10_000, 28, 28) and images.dtype == np.uint8
    assert hashlib.md5(images.tobytes()).hexdigest() == "eb2514c9b94be0fa2ad6f5eeeb6692e1"
    assert np.bincount(labels).tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    want = Counter(zip((image.tobytes() for image in images), labels.tolist(), strict=True))
    parts = [stored(digits, split) for split in ("train", "validation")]
    assert [len(part[0]) for part in parts] == [9_000, 1_000]
    assert Counter(pair for part in parts for pair in zip(*part, strict=True)) == want
    assert Counter(parts[1][1]) == dict.fromkeys(range(10), 100)
    assert len(set(parts[0][1][:100])) == 10, "shuffled"
    assert len(list((digits / "train").glob("*.tar"))) == 8
    assert [path.name for path in digits.parent.iterdir()] == [digits.name]
    monkeypatch.setattr(bundled, "load_digits", lambda: pytest.fail("read again"))
    assert bundled.make_digits(digits) is False


def test_what_is_in_the_way_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"data\.bundled=digits: .* holds no folders"):
        bundled.make_digits(tmp_path)
    with pytest.raises(ConfigError, match="cannot write the digits"):
        bundled.make_digits(tmp_path / "mine.txt" / "mnist10k")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
