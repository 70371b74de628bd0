"""Schedules at their edges."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from vae_dist.config.schema import ObjectiveConfig, OptimizerConfig
from vae_dist.objectives.schedules import beta_at, lr_at

STEPS = 1000


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    config = OptimizerConfig(lr=0.01, warmup_steps=100)
    rates = [lr_at(config, STEPS, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.0001)
    assert rates[99] == pytest.approx(0.01)
    gaps = [b - a for a, b in pairwise(rates)]
    assert gaps == pytest.approx([0.0001] * 99)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_falls_from_the_peak_to_its_last_value(final: float) -> None:
    config = OptimizerConfig(lr=0.01, warmup_steps=100, final_lr_fraction=final)
    rates = [lr_at(config, STEPS, step) for step in range(99, STEPS)]
    assert rates[0] == 0.01
    assert rates[-1] == pytest.approx(0.01 * final, abs=1e-12)
    assert rates == sorted(rates, reverse=True)
    middle = lr_at(config, STEPS, 549)  # half of the 900 steps after the warm-up
    assert middle == pytest.approx(0.01 * (1 + final) / 2)
    quarter = lr_at(config, STEPS, 324)
    fall = 0.5 * (1 + math.cos(math.pi / 4))
    assert quarter == pytest.approx(0.01 * (final + (1 - final) * fall))


def test_a_run_past_its_end_keeps_the_last_rate() -> None:
    config = OptimizerConfig(lr=0.01, warmup_steps=0, final_lr_fraction=0.1)
    assert lr_at(config, STEPS, STEPS + 50) == pytest.approx(0.001)


def test_constant_stays_at_the_peak() -> None:
    config = OptimizerConfig(lr=0.01, warmup_steps=10, schedule="constant")
    assert lr_at(config, STEPS, 4) == pytest.approx(0.005)
    assert {lr_at(config, STEPS, step) for step in (9, 10, 500, 5000)} == {0.01}


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 5)])
def test_short_runs_have_a_finite_rate(warmup: int, steps: int) -> None:
    config = OptimizerConfig(lr=0.01, warmup_steps=warmup)
    rates = [lr_at(config, steps, step) for step in range(steps)]
    assert all(0 <= rate <= 0.01 for rate in rates)


def test_beta_rises_linearly_from_zero() -> None:
    config = ObjectiveConfig(beta=4.0, beta_warmup_steps=10)
    assert [beta_at(config, step) for step in (0, 5, 10, 11, 10**6)] == [0.0, 2.0, 4.0, 4.0, 4.0]


def test_without_warmup_beta_is_constant() -> None:
    assert beta_at(ObjectiveConfig(beta=0.5), 0) == 0.5


def test_cosine_warmup_is_slow_at_both_ends() -> None:
    config = ObjectiveConfig(beta=2.0, beta_warmup_steps=8, beta_warmup="cosine")
    found = [beta_at(config, step) for step in (0, 2, 4, 6, 8, 9)]
    quarter = 1 - math.cos(math.pi / 4)
    assert found == pytest.approx([0.0, quarter, 1.0, 2 - quarter, 2.0, 2.0])


def test_beta_rises_as_often_as_asked_and_then_stays() -> None:
    config = ObjectiveConfig(beta=1.0, beta_warmup_steps=4, beta_cycles=3)
    rise, hold = [0.0, 0.25, 0.5, 0.75], [1.0] * 4
    expected = rise + hold + rise + hold + rise + [1.0] * 20
    assert [beta_at(config, step) for step in range(len(expected))] == expected
