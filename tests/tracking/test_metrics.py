from __future__ import annotations

import math

import pytest

from vae_dist.tracking.metrics import format_duration, format_number, format_row

NUMBERS = {104.23456: "104.2", 0.00031: "0.00031", 18342.7: "18343", 3.0: "3", 200: "200"}
NUMBERS |= {1.5e12: "1.5e+12", math.nan: "nan", math.inf: "inf"}
DURATIONS = {41.6: "42s", 185: "3m05s", 7800: "2h10m", 356400: "4d03h", math.nan: "?", -1: "?"}


def test_numbers_and_durations() -> None:
    assert {value: format_number(value) for value in NUMBERS} == NUMBERS
    assert {seconds: format_duration(seconds) for seconds in DURATIONS} == DURATIONS


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"train/loss": 104.23, "time/images_per_second": 1834.2, "eval/rate_nats": 9.5},
            "loss=104.2 images_per_second=1834 eval/rate_nats=9.5",
        ),
        ({"train/loss": 1.5, "train/beta": 1.0, "data/skipped_samples": 0.0}, "loss=1.5"),
        ({"data/skipped_samples": 2.0}, "data/skipped_samples=2"),
        ({"time/data_wait_fraction": 0.02, "optim/lr": 1e-3, "latent/kl": [1.0]}, ""),
        (
            {"time/data_wait_fraction": 0.2, "time/left_seconds": 185.0},
            "data_wait_fraction=0.2 left=3m05s",
        ),
        ({"train/loss": math.nan}, "loss=nan"),
    ],
)
def test_format_row_leaves_out_what_goes_without_saying(row: dict, text: str) -> None:
    assert format_row(row) == text
