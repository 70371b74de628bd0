from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.tensorboard import TensorBoardSink

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
def test_a_run_begun_anew_has_each_point_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):  # killed before its first checkpoint
        sink = TensorBoardSink(tmp_path, resume_step=0)
        for step in (1, 2, 3):
            sink.log(step, {"train/loss": value})
        sink.close("failed")
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 2.0), (2, 2.0), (3, 2.0)]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TENSORBOARD, reason="needs the extra tensorboard")
@pytest.mark.parametrize("values", [[float("nan"), float("nan")], [float("inf")], [1e30, -1e31]])
def test_a_distribution_outside_of_the_bins_is_left_out(
    tmp_path: Path, values: list[float]
) -> None:
    sink = TensorBoardSink(tmp_path, resume_step=0)
    sink.log(10, {"latent/kl_nats_per_unit": values})
    sink.close("finished")


class Broken:
    """Stands for SummaryWriter."""

    def __init__(self, folder: str, *, purge_step: int) -> None: ...

    def add_scalar(self, *arguments: object) -> None:
        raise ValueError("of the package")

    add_image = add_scalar

    def close(self) -> None: ...


def test_what_the_package_raises_is_an_error_of_the_disk_which_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Broken)
    )
    sink = TensorBoardSink(tmp_path, resume_step=0)
    with pytest.raises(OSError, match="TensorBoard: ValueError: of the package"):
        sink.log(1, {"train/loss": 1.0})
    png = save_png(grid(torch.zeros(4, 1, 8, 8)), tmp_path / "grid.png")
    with pytest.raises(OSError, match="TensorBoard: TypeError"):
        sink.image(1, "images/samples", png, "")
