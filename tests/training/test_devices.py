"""What a CUDA device computes is what the CPU computes, without waiting, and exactly again."""

import contextlib
import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.devices import CUDA, DEVICES, runtime_on
from tests.support.steps import batch, config, first_step, make_step, wrong_gradients
from vae_dist.data.loader import split_mask
from vae_dist.run.checkpoint import Checkpoints, CheckpointWriter
from vae_dist.training.guards import SkipGuard
from vae_dist.training.memory import largest_that_fits, largest_that_runs, step_cost

KINDS = ("bound", "discriminator")


def pinned(batch, device):
    """As a loader hands it over: pixel by pixel with their mask, in pinned memory before a GPU."""
    groups = []
    for group in batch.groups:
        planes = [group.images, *(() if group.masks is None else (group.masks,))]
        pixels = torch.cat(planes, 1).permute(0, 2, 3, 1).contiguous()
        pixels = pixels.pin_memory() if device == "cuda" else pixels
        images, masks = split_mask(pixels.permute(0, 3, 1, 2), has_mask=group.masks is not None)
        groups.append(group._replace(images=images, masks=masks))
    return batch._replace(groups=tuple(groups))


@contextlib.contextmanager
def the_same_each_time():
    """Kernels that give the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def no_waiting(device):
    """An error where the host waits for a CUDA device."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def settings_of(kind, precision="no"):
    """Clipping, guard, microbatches; in `bound` labels of which some are hidden, and holes."""
    is_bound = kind == "bound"
    settings = config(adversarial=not is_bound, microbatch_size=8 * is_bound, precision=precision)
    settings.training.spike_factor = 100.0
    settings.optimizer.clip_grad_norm = 1.0
    settings.optimizer.eps = 1e-3  # Adam does not divide by the root of rounding errors
    settings.optimizer.warmup_steps = 2
    settings.data.dequantize = False  # these draws are made on the device, by its own generator
    settings.likelihood.kind = "gaussian"
    if is_bound:
        settings.model.num_classes, settings.model.label_dropout = 3, 0.3
        settings.model.attention = True
        settings.likelihood.variance = "fixed"
        settings.data.mask = "member"
    return settings


def batch_of(step, number):
    made = batch(step, number)
    if step.config.model.num_classes:
        (group,) = made.groups
        generator = torch.Generator().manual_seed(number)
        masks = torch.rand((len(group.images), 1, 8, 8), generator=generator) < 0.8
        labels = torch.arange(len(group.images)) % 3
        group = group._replace(masks=masks.to(torch.uint8), labels=labels)
        made = made._replace(groups=(group,))
    return pinned(made, step.device.type)


def flat(step):
    return {
        f"{group}/{name}": tensor.detach().cpu().clone()
        for group, tensors in step.tensors().items()
        for name, tensor in tensors.items()
    }


def run_steps(kind, device, folder):
    """Sums and norm of six steps, what a checkpoint holds after them, and the same of a run that
    was resumed after three."""
    with the_same_each_time(), runtime_on(device) as runtime:
        settings, numbers = settings_of(kind), []
        whole, again = (make_step(settings, runtime) for _ in range(2))
        for k in range(6):
            report = whole(batch_of(whole, k), k)
            values = (*report.sums.values(), report.grad_norm, *report.shared.values())
            numbers.append([float(value) for value in values])
            if k == 2:
                writer = CheckpointWriter(Checkpoints(folder), keep_last=1, warn=print)
                writer.submit(3, whole.tensors(), whole.scalars(), best_step=None)
        assert writer.wait()
        checkpoint = Checkpoints(folder).load(3)
        again.load(checkpoint.tensors, checkpoint.state)
        for k in range(3, 6):
            again(batch_of(again, k), k)
        assert whole.scalars() == again.scalars()
        return numbers, flat(whole), flat(again)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_and_one_of_cuda_is_that_of_the_cpu(kind, device, tmp_path):
    found, whole, again = run_steps(kind, device, tmp_path)
    assert whole.keys() == again.keys()
    assert not [name for name in whole if not torch.equal(whole[name], again[name])]
    if device == "cpu":
        return
    (tmp_path / "cpu").mkdir()
    expected, tensors, _ = run_steps(kind, "cpu", tmp_path / "cpu")
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    for name, theirs in tensors.items():
        scale = float(theirs.abs().max()) + 1e-3
        assert float((whole[name] - theirs).abs().max()) < 2e-3 * scale, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_step_waits_for_the_device(kind, device):
    with runtime_on(device, "bf16") as runtime:
        settings = settings_of(kind, "bf16")
        settings.data.dequantize = True
        step = make_step(settings, runtime)
        guard = SkipGuard(runtime.device, max_consecutive=100)

        def one(k):
            report = step(batch_of(step, k), k)
            guard.observe(report.found_inf, report.spike, ("a.tar",))
            return report

        for k in range(3):
            one(k)
        with no_waiting(device):
            for k in range(3, 8):
                report = one(k)
        assert float(report.found_inf) == 0.0 and torch.isfinite(report.sums["train/loss"])


@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_of_fp16_is_skipped_and_halves_the_scale(device):
    # a CPU has no fp16 to train in, but it has the scale
    with runtime_on(device, "no" if device == "cpu" else "fp16") as runtime:
        step = make_step(settings_of("bound", "fp16"), runtime)
        step.loss_scale.scale.fill_(1.0)
        assert float(step(batch_of(step, 0), 0).found_inf) == 0.0
        before = flat(step)
        step.loss_scale.scale.fill_(2.0**127)
        with no_waiting(device):
            step.loss_scale.update(torch.zeros((), device=device))
        report = step(batch_of(step, 1), 1)
        assert float(report.found_inf) == 1.0 and not torch.isfinite(report.grad_norm)
        assert float(step.loss_scale.scale) == 2.0**126
        after = flat(step)
        assert not [name for name in before if not torch.equal(after[name], before[name])]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("compiled", ["true", "blocks"])
def test_compiled_towers_in_bf16_have_the_gradients_of_plain_ones(device, compiled):
    with runtime_on(device, "bf16") as runtime:
        settings = settings_of("bound", "bf16")
        settings.training.microbatch_size = 0
        settings.runtime.channels_last = "true"
        settings.model.channels, settings.model.norm_groups = [32, 64], 8
        settings.model.num_classes, settings.data.mask = 0, "none"
        size = (32, 32)
        plain = make_step(settings, runtime, size)
        made = pinned(batch(plain, 0), device)
        expected, _ = first_step(plain, made)
        settings.runtime.compile = compiled
        step = make_step(settings, runtime, size)
        # bfloat16 rounds by 1%, a wrong gradient is off by its own size
        assert wrong_gradients(first_step(step, made)[0], expected, rounding=0.2) == []
        weight = step.vae.decoder.conv_out.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", [CUDA])
def test_the_estimate_is_near_what_a_step_takes(device):
    with runtime_on(device, "bf16") as runtime:
        settings, size = config(microbatch_size="auto", precision="bf16"), (128, 128)
        settings.model.channels, settings.model.attention = [64, 128], True
        cost = step_cost(settings, size, runtime.device)
        assert largest_that_fits(settings, runtime, cost) == settings.training.batch_size
        estimate = cost.peak_bytes(16)
        settings.training.microbatch_size = 0
        step = make_step(settings, runtime, size)
        made = batch(step, 0)
        torch.cuda.reset_peak_memory_stats()
        for number in range(2):
            step(made, number)
        used = torch.cuda.max_memory_allocated()
        assert 0.6 < used / estimate < 1.4, (used, estimate)
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.7 * used / total)
        try:
            assert 0 < largest_that_runs(step, size, ()) < settings.training.batch_size
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
