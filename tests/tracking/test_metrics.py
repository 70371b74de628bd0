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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(41.6, "42s"), (185, "3m05s"), (7800, "2h10m"), (356400, "4d03h"), (math.nan, "?")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
