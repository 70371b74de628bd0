"""Sums of weights in parts, against the sums of all at once."""

from __future__ import annotations

import pytest
import torch

from vae_dist.evaluation.importance import StreamedWeights


@pytest.mark.parametrize("offset", [0.0, -1e5, 1e5])
def test_parts_sum_up_to_the_whole_and_survive_extremes(offset: float) -> None:
    log_weights = 300 * torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).double()
    log_weights += offset
    log_weights[0, 0] -= 1e5
    log_weights[1, 2, :9] = -torch.inf  # whole parts without weight, first ones and others
    log_weights[0, 1, 12:18] = -torch.inf
    streamed = StreamedWeights(2, 3, device=torch.device("cpu"))
    total = torch.zeros(2, 3, dtype=torch.float64)
    for part in log_weights.split(3, dim=-1):
        weights, shrink = streamed.add(part)
        total = total * shrink + weights.sum(-1)
    torch.testing.assert_close(streamed.log_sum, log_weights.logsumexp(-1))
    torch.testing.assert_close(streamed.sum, total)
    weights = log_weights.softmax(-1)
    torch.testing.assert_close(streamed.effective_samples, 1 / weights.square().sum(-1))


def test_weights_that_are_all_zero() -> None:
    streamed = StreamedWeights(1, device=torch.device("cpu"))
    for _ in range(2):
        streamed.add(torch.full((1, 3), -torch.inf))
    assert streamed.log_sum.item() == -torch.inf
    assert streamed.effective_samples.item() == 0
