from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.tensorboard import TensorBoardSink

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TENSORBOARD, reason="needs the extra tensorboard")
@pytest.mark.parametrize("resume_step", [20, 0])  # 0: killed before its first checkpoint
def test_a_resumed_run_has_each_point_once(tmp_path: Path, resume_step: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    png = save_png(grid(torch.zeros(4, 1, 8, 8)), tmp_path / "grid.png")
    for session, first in ((1.0, 0), (2.0, resume_step)):
        sink = TensorBoardSink(tmp_path / "tensorboard", resume_step=first)
        for step in range(first + 10, 41, 10):
            kl = [[0.0, 1.0], [float("nan")], [float("inf"), 1e30]][step % 3]
            sink.log(step, {"train/loss": session, "latent/kl_nats_per_unit": kl})
        sink.image(40, "images/samples", png, "")
        for _ in range(2):
            sink.close("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(step, 2.0 if step > resume_step else 1.0) for step in (10, 20, 30, 40)]
    assert events.Tags()["images"] == ["images/samples"]
    assert events.Tags()["histograms"] == ["latent/kl_nats_per_unit"]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'vae_dist\[tensorboard\]'"):
        TensorBoardSink(tmp_path, resume_step=0)
