"""The estimate of a step against the step itself on CPU: bytes kept, worst moment, operations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.adversarial import (
    BATCH_SIZE,
    SIZE,
    adversarial_config,
    adversarial_step,
    picture_batch,
    start,
)
from vae_dist.abstract import Abstract
from vae_dist.config.load import load_train_config
from vae_dist.estimate import step_cost
from vae_dist.models.build import build_vae
from vae_dist.objectives.elbo import loss_terms, noise_shape
from vae_dist.training.optimizer import freeze_encoder

CPU = torch.device("cpu")
SMALL = ("model.channels=[8,16]", "model.norm_groups=4", "model.latent_channels=4")
SPATIAL = ("training.precision=no", "model.latent=spatial")
CASES = [
    ("mnist", (28, 28), ("training.precision=no",)),
    ("mnist", (28, 28), ("objective.importance_samples=3",)),
    ("mnist_conditional", (28, 28), ()),
    ("mnist_dense", (28, 28), ()),
    ("celeba64", (32, 32), (*SMALL, "training.precision=bf16")),
    ("celeba64", (18, 22), (*SMALL, "training.precision=no", "likelihood.variance=per_pixel")),
    ("celeba64", (32, 32), (*SMALL, "training.precision=no", "model.latent=spatial")),
    (
        "celeba64",
        (32, 32),
        (*SMALL, *SPATIAL, "objective.scale_equivariance=0.25"),
    ),
    (
        "celeba64",
        (32, 32),
        (*SMALL, *SPATIAL, "training.train_only=decoder", "init_from=runs/first"),
    ),
    (
        "celeba64",
        (16, 16),
        (*SMALL, "training.precision=no", "likelihood.kind=discretized_logistic_mixture"),
    ),
]


def config_of(name, options):
    shards = ("data.train=d/train", "data.validation=d/validation")
    return load_train_config([f"config={name}", *shards, *options])


def forward(config, size, num_images):
    """A real forward with its loss, in the config's precision."""
    vae = build_vae(config, size)
    images = torch.zeros(num_images, config.data.channels, *size)
    noise = torch.zeros(noise_shape(config.objective, num_images, vae.latent_shape(*size)))
    more = {"half_size": True} if config.objective.scale_equivariance else {}
    if config.training.train_only == "decoder":
        freeze_encoder(vae)
    is_bf16 = config.training.precision == "bf16"

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            result = vae(images, noise, **more)
        output, half_size = result if more else (result, None)
        return loss_terms(output, config.objective, beta=1.0, half_size=half_size).loss_sum

    return vae, run


@pytest.mark.parametrize(("name", "size", "options"), CASES)
def test_bytes_kept_for_the_backward_are_those_of_the_real_forward(name, size, options):
    config = config_of(name, options)
    vae, run = forward(config, size, 3)
    state = {t.untyped_storage().data_ptr() for t in [*vae.parameters(), *vae.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in state:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()  # what is kept lives as long as this, so that no address comes twice
    assert loss.grad_fn is not None
    estimated = step_cost(config, size, CPU, num_images=3).saved_bytes
    assert sum(kept.values()) == estimated
    assert estimated > 10_000


@pytest.mark.parametrize(("name", "size", "options"), [CASES[4], CASES[5], CASES[6]])
def test_worst_moment_is_that_of_torchs_allocator(name, size, options):
    config = config_of(name, options)
    vae, run = forward(config, size, 4)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run().backward()
    live = peak = 0
    for num_bytes in moved_bytes(profile):
        live += num_bytes
        peak = max(peak, live)
    parameters = sum(p.numel() for p in vae.parameters()) * 4
    cost = step_cost(config, size, CPU, num_images=4)
    # beside weights, moments (2), average and images, which are there before
    images = 4 * 4 * config.data.channels * size[0] * size[1]
    assert cost.peak_bytes - 4 * parameters - images == pytest.approx(peak, rel=0.01)
    assert peak > 2 * parameters  # so it is no figure of the weights alone


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_checkpointing_keeps_less_and_computes_the_forward_again(precision):
    options = (*SMALL, f"training.precision={precision}", "model.latent=spatial")
    config = config_of("celeba64", options)
    plain = step_cost(config, (32, 32), CPU, num_images=4)
    config.model.gradient_checkpointing = True
    lean = step_cost(config, (32, 32), CPU, num_images=4)
    assert lean.saved_bytes < 0.7 * plain.saved_bytes
    assert lean.peak_bytes < plain.peak_bytes
    assert plain.step_flops < lean.step_flops <= plain.step_flops + plain.forward_flops


@pytest.mark.parametrize(
    ("kind", "channels", "tolerance"), [("structure", 8, 0.04), ("none", 64, 0.13)]
)
def test_worst_moment_counts_what_compares_pictures(kind, channels, tolerance):
    """To a tolerance below what each adds, beside copies that a whole step makes of its images."""
    config = adversarial_config()
    config.adversarial.r1, config.adversarial.channels = 0.0, channels
    config.perceptual.kind = kind
    config.objective.scale_equivariance = config.objective.latent_noise = 0.0
    runtime = start()
    step = adversarial_step(config, runtime)
    for number in range(3):
        step(picture_batch(runtime, number), number)
    batch = picture_batch(runtime, 3)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(batch, 3)
    live = peak = 0
    for num_bytes in moved_bytes(profile):
        live += num_bytes
        peak = max(peak, live)
    before = 4 * 4 * sum(p.numel() for p in step.vae.parameters())  # moments, average
    before += 3 * 4 * sum(p.numel() for p in step.adversary.network.parameters())
    cost = step_cost(config, SIZE, CPU, num_images=BATCH_SIZE)
    assert cost.peak_bytes - before == pytest.approx(peak, rel=tolerance)


def test_a_device_without_a_number_is_the_first_one():
    """Autograd knows no other, and Accelerate says `cuda` where one process has one."""
    assert Abstract(torch.device("cuda")).device == torch.device("cuda", 0)
    assert Abstract(torch.device("cuda", 1)).device == torch.device("cuda", 1)
    assert Abstract(torch.device("cpu")).device == torch.device("cpu")


def test_microbatches_before_leave_gradients_and_pictures():
    config = adversarial_config()
    one, first = (step_cost(config, SIZE, CPU, num_images=2, share=n) for n in (2, 8))
    parameters = sum(p.numel() for p in build_vae(config, SIZE).parameters())
    pictures = 2 * 8 * config.data.channels * SIZE[0] * SIZE[1]
    assert first.peak_bytes - one.peak_bytes == 4 * (parameters + pictures)


def moved_bytes(profile):
    """Bytes of each allocation (positive) and release (negative) in order."""
    events = profile.profiler.kineto_results.events()
    moves = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [num_bytes for _, num_bytes in sorted(moves)]


def test_memory_grows_with_images_and_falls_with_precision():
    config = config_of("celeba64", (*SMALL, "training.precision=no"))
    costs = [step_cost(config, (32, 32), CPU, num_images=n) for n in (2, 4, 8)]
    first, second, third = (cost.saved_bytes for cost in costs)
    assert third - second == 2 * (second - first)
    assert len({cost.forward_flops for cost in costs}) == 1
    config.training.precision = "bf16"
    assert step_cost(config, (32, 32), CPU, num_images=8).saved_bytes < third


def test_operations_are_those_that_torch_counts():
    config = config_of("celeba64", (*SMALL, "training.precision=no"))
    _, run = forward(config, (32, 32), 2)
    with FlopCounterMode(display=False) as counter:
        loss = run()
        forward_flops = counter.get_total_flops()
        loss.backward()
    cost = step_cost(config, (32, 32), CPU, num_images=2)
    assert cost.forward_flops == forward_flops / 2
    assert cost.step_flops == counter.get_total_flops() / 2


def test_what_is_let_go_is_not_counted():
    with Abstract(CPU) as machine:
        x = torch.empty(1000)
        y = x + 1
        assert machine.live_bytes == 8000
        z = y[:10]
        del y
        assert machine.live_bytes == 8000  # z keeps it
        del z
        assert machine.live_bytes == 4000
        x += 1
    assert machine.peak_bytes == 8000


def test_an_operation_in_place_gives_back_its_tensor():
    with Abstract(CPU):
        x = torch.empty(3)
        y = x.add_(1)
    assert y is x


def test_estimate_imports_neither_the_compiler_nor_sympy():
    """Each costs half a second of a dry run."""
    code = (
        "import sys, torch\n"
        "from vae_dist.config.load import load_train_config\n"
        "from vae_dist.estimate import step_cost\n"
        "words = ['training.precision=bf16', 'perceptual.kind=structure']\n"
        "shapes = {'mnist': (28, 28), 'celeba64': (64, 64), 'imagenet256_kl_f8': (256, 256)}\n"
        "for name, size in shapes.items():\n"
        "    config = load_train_config([f'config={name}', *words])\n"
        "    step_cost(config, size, torch.device('cpu'), num_images=2)\n"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
