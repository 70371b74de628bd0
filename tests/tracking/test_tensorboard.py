from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.tensorboard_sink import TensorBoardSink

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TENSORBOARD, reason="needs the extra tensorboard")
def test_rows_pictures_and_distributions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    png = save_png(grid(torch.zeros(4, 1, 8, 8)), tmp_path / "grid.png")
    for resume_step, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        sink = TensorBoardSink(tmp_path / "tensorboard", resume_step=resume_step)
        for step in steps:
            sink.log(step, {"train/loss": step / 2, "latent/kl_nats_per_unit": [0.0, 1.0]})
        sink.image(steps[-1], "images/samples", png, "")
        sink.close("finished")
        sink.close("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(10, 5.0), (20, 10.0), (30, 15.0), (40, 20.0)]
    assert events.Tags()["images"] == ["images/samples"]
    assert events.Tags()["histograms"] == ["latent/kl_nats_per_unit"]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'vae_dist\[tensorboard\]'"):
        TensorBoardSink(tmp_path, resume_step=0)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TENSORBOARD, reason="needs the extra tensorboard")
def test_a_distribution_without_a_finite_number_is_left_out(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, resume_step=0)
    sink.log(10, {"latent/kl_nats_per_unit": [float("nan"), float("nan")]})
    sink.close("finished")
