"""Figures of latents on Gaussians and pictures whose value is known."""

import math

import pytest
import torch

from vae_dist.evaluation import diffusability
from vae_dist.evaluation.diffusability import (
    LatentMetric,
    high_frequency_share,
    lattice_figures,
    lattice_share,
    nearest_class_accuracy,
    normalised,
    velocity_irreducible_variance,
)


def white(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_viv_is_the_integral_over_time_of_the_error_of_the_best_velocity():
    """E_t[l / ((1-t)^2 l + t^2)], integrated numerically, of a product of two known covariances;
    within classes, weighted by their images."""
    channels, positions = torch.tensor([1.8, 0.2]).double(), torch.tensor([2.5, 1.0, 0.4, 0.1])
    positions = positions.double() / positions.mean()
    eigenvalues = channels[:, None] * positions  # (C, P)
    latents = (white(15000, 2, 4) * eigenvalues.sqrt()).unflatten(2, (2, 2))
    time = (torch.arange(20000, dtype=torch.float64)[:, None] + 0.5) / 20000
    error = eigenvalues.flatten() / ((1 - time) ** 2 * eigenvalues.flatten() + time**2)
    both = torch.cat([latents, 0.5 * white(5000, 2, 2, 2, seed=1) + 9])
    value = velocity_irreducible_variance(both, [4] * 15000 + [2] * 5000)
    expected = 0.75 * float(error.mean()) + 0.25 * 0.5 * math.pi / 2
    assert value == pytest.approx(expected, rel=0.01)
    assert velocity_irreducible_variance(torch.ones(4, 2, 2, 2).double(), [0] * 4) == 0.0
    assert math.isnan(velocity_irreducible_variance(white(3, 2, 2, 2), [0, 1, 2]))


def test_lnc_of_two_gaussians_is_phi_of_half_their_distance():
    labels = [number // 2 % 2 for number in range(20000)]
    pooled = white(20000, 1, 1, 1) + torch.tensor(labels).double().view(-1, 1, 1, 1)
    phi = 0.5 * (1 + math.erf(1 / 2 / 2**0.5))
    assert nearest_class_accuracy(pooled, labels) == pytest.approx(phi, abs=0.015)


def test_sec_of_noise_constants_and_stripes():
    stripes = torch.tensor([1.0, -1.0]).double().repeat(1, 1, 8, 4)  # the highest frequency
    assert high_frequency_share(white(400, 2, 8, 8)) == pytest.approx(0.75, abs=0.01)
    assert high_frequency_share(stripes) > 0.88
    assert high_frequency_share(torch.ones(2, 3, 5, 7).double()) == pytest.approx(0, abs=0.01)
    assert high_frequency_share(torch.zeros(1, 1, 4, 4).double()) == 0


def test_lattice_finds_what_repeats_with_the_stride_alone():
    grid = torch.zeros(4, 4)
    grid[0] = 0.1
    share, rms = lattice_share(grid.repeat(3, 10, 10) + 0.4, 4)
    assert share == pytest.approx(1.0) and rms == pytest.approx(float(grid.std(correction=0)))
    assert lattice_share(white(3, 40, 40), 4)[0] == pytest.approx(0.01, abs=0.01)
    assert lattice_share(torch.linspace(0, 1, 40).expand(1, 40, 40), 4)[0] < 0.02  # a ramp
    assert lattice_share(torch.full((1, 8, 8), 0.3), 4) == (0.0, 0.0)
    image = torch.zeros(1, 1, 48, 50)
    image[..., :8, :] = torch.rand(1, 1, 8, 50)  # the border is left out, and small images
    assert lattice_figures(image, 4) == {"lattice": 0.0, "lattice_levels": 0.0}
    assert lattice_figures(image[..., :20, :20], 4) == {}


def test_the_sample_is_the_same_however_images_are_spread(monkeypatch):
    monkeypatch.setattr(diffusability, "SAMPLE_BYTES", 4 * 18 * 30)  # 30 latents
    latents, labels = white(40, 2, 3, 3).float(), torch.arange(40) % 3
    reports = []
    for parts in ([range(40)], [range(1, 40, 2), range(0, 40, 2)]):
        metric = LatentMetric(["sec", "viv", "lnc"])
        for part in map(list, parts):
            metric.add(latents[part], part, labels[part].tolist())
        reports.append(metric.report())
    assert reports[0] == reports[1]
    assert set(reports[0].figures) == {"viv", "lnc", "sec"}
    assert "30 latents" in reports[0].notes["diffusability"]
    assert reports[0].figures["sec"] == high_frequency_share(normalised(latents[:30]))
