"""Schedules at their edges: learning rate, beta, adversarial ramp, weight of the alignment."""

import math

import pytest

from vae_dist.config.schema import AdversarialConfig, ObjectiveConfig, OptimizerConfig
from vae_dist.objectives.adversarial import ramp_at
from vae_dist.objectives.alignment import weight_at
from vae_dist.objectives.schedules import beta_at, lr_at

STEPS = 1000


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_rate_rises_linearly_and_stays_or_falls_as_a_cosine(final):
    config = OptimizerConfig(lr=0.01, warmup_steps=100, final_lr_fraction=final)
    rates = [lr_at(config, STEPS, step) for step in range(STEPS)]
    assert rates[:100] == pytest.approx([0.0001 * (step + 1) for step in range(100)])
    assert rates[99] == 0.01 and rates[99:] == sorted(rates[99:], reverse=True)
    for step, fraction in ((324, 0.25), (549, 0.5), (STEPS - 1, 1.0), (STEPS + 50, 1.0)):
        fall = 0.5 * (1 + math.cos(math.pi * fraction))
        expected = 0.01 * (final + (1 - final) * fall)
        assert lr_at(config, STEPS, step) == pytest.approx(expected, abs=1e-12)
    config.schedule = "constant"
    assert [lr_at(config, STEPS, step) for step in (49, 99, 500, 5000)] == [0.005] + [0.01] * 3
    for warmup, steps in ((0, 1), (1, 1), (5, 5)):
        config = OptimizerConfig(lr=0.01, warmup_steps=warmup, final_lr_fraction=final)
        assert all(0 <= lr_at(config, steps, step) <= 0.01 for step in range(steps))


def test_beta_rises_to_its_value_in_cycles():
    rise, up = [0.0, 0.25, 0.5, 0.75], [1.0] * 4
    for knobs, steps, expected in (
        ({"beta": 0.5}, [0], [0.5]),
        ({"beta": 4.0, "beta_warmup_steps": 10}, [0, 5, 10, 11, 10**6], [0.0, 2.0] + [4.0] * 3),
        ({"beta_warmup_steps": 4, "beta_cycles": 3}, range(40), (rise + up) * 2 + rise + 5 * up),
    ):
        config = ObjectiveConfig(**knobs)
        assert [beta_at(config, step) for step in steps] == pytest.approx(expected)


def test_weights_of_the_adversarial_term_and_of_the_alignment():
    config = AdversarialConfig(start_step=10, warmup_steps=5, ramp_steps=4)
    ramp = [ramp_at(config, step) for step in range(14, 21)]
    assert ramp == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ramp_at(AdversarialConfig(start_step=0, warmup_steps=0, ramp_steps=0), 0) == 1.0
    weights = [weight_at(0.5, 0.1, step=step, num_steps=5) for step in (0, 1, 2, 4, 9)]
    assert weights == pytest.approx([0.5, 0.4, 0.3, 0.1, 0.1])
