from unittest.mock import Mock

import pytest
import torch

from vae_dist.tracking.throughput import Meter, memory_row, peak_flops


def test_rows_count_images_of_all_ranks_and_waiting_without_pauses(monkeypatch):
    now = [100.0]  # seconds
    monkeypatch.setattr("vae_dist.tracking.throughput.time.perf_counter", lambda: now[0])
    meter = Meter(10, first_step=2, world=2, peak_images_per_second=16.0)
    assert meter.row() == {}  # without a step
    for _ in range(4):
        with meter.data_wait():
            now[0] += 0.5
        now[0] += 1.5
        meter.step(8)
    assert meter.row() == {
        "time/images_per_second": pytest.approx(4 * 8 * 2 / 8.0),
        "time/data_wait_fraction": pytest.approx(0.25),
        "time/step_seconds": pytest.approx(2.0),
        "time/left_seconds": pytest.approx(4 * 2.0),
        "time/mfu": pytest.approx(0.25),  # 4 images per second on each of two devices
    }
    with meter.pause():
        now[0] += 1000.0
    now[0] += 4.0
    meter.step(8)
    assert meter.row()["time/step_seconds"] == pytest.approx(4.0)


def test_peak_by_name_and_memory_of_a_cpu(monkeypatch):
    for name, teraflops in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("GPU", 0)):
        monkeypatch.setattr("torch.cuda.get_device_name", Mock(return_value=name))
        assert peak_flops(torch.device("cuda"), "bf16") == teraflops * 1e12
        assert peak_flops(torch.device("cuda"), "no") == 0.0
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "bf16") == 0.0 and 0.01 < memory_row(cpu)["system/memory_gib"] < 1000
