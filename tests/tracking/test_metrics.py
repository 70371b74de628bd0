from __future__ import annotations

import math

import pytest

from vae_dist.tracking.metrics import format_duration, format_number, format_row


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (104.23456, "104.2"),
        (0.00031, "0.00031"),
        (18342.7, "18343"),
        (3.0, "3"),
        (200, "200"),
        (1.5e12, "1.5e+12"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_format_number(value: float, text: str) -> None:
    assert format_number(value) == text


def test_format_row_keeps_groups_that_say_something() -> None:
    row = {"train/loss": 104.23, "time/images_per_second": 1834.2, "eval/neg_elbo_nats": 95.5}
    text = "step=200 loss=104.2 images_per_second=1834 eval/neg_elbo_nats=95.5"
    assert format_row(200, row) == text


def test_format_row_leaves_out_what_goes_without_saying() -> None:
    row = {"train/loss": 1.5, "train/beta": 1.0, "data/skipped_samples": 0.0}
    assert format_row(1, row) == "step=1 loss=1.5"
    assert format_row(1, {"data/skipped_samples": 2.0}) == "step=1 data/skipped_samples=2"
    assert format_row(1, {"time/data_wait_fraction": 0.02, "optim/lr": 1e-3}) == "step=1"
    assert format_row(1, {"time/data_wait_fraction": 0.2}) == "step=1 data_wait_fraction=0.2"
    assert format_row(1, {"train/loss": math.nan}) == "step=1 loss=nan"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(41.6, "42s"), (185, "3m05s"), (7800, "2h10m"), (356400, "4d03h"), (math.nan, "?")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
