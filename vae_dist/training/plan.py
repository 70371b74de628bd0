"""What a run is going to do, in words: shown at its start and by `dry_run=true`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vae_dist.config.keys import value_of
from vae_dist.config.resolve import COMPILED, divisors
from vae_dist.config.schema import TrainConfig
from vae_dist.data.order import quotas
from vae_dist.distributed import Runtime, computes_bf16
from vae_dist.files import printable
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE
from vae_dist.tracking.throughput import peak_flops
from vae_dist.training.adversarial import first_step_of_generator
from vae_dist.training.compile import compiler_problem
from vae_dist.training.data import Data
from vae_dist.training.memory import largest_that_fits, step_cost

MANY_EPOCHS = 1000  # the shipped configs take 10 to 135 epochs of their data
ROUNDING = 0.05  # of a data set's share in a batch, that is not worth a note


def plan(
    config: TrainConfig,
    data: Data,
    runtime: Runtime,
    vae: VAE,
    *,
    first_step: int,
    microbatch: int,
) -> list[str]:
    """Model, data, steps and machine in a few lines. `config` is resolved."""
    training, (height, width) = config.training, data.image_size
    latent = "x".join(str(size) for size in vae.latent_shape(height, width))
    epochs = training.steps * training.batch_size / data.train.num_samples
    begin = f", going on at step {first_step}" if first_step else ""
    buckets = f" in {len(data.settings.buckets)} aspect buckets" if data.settings.buckets else ""
    likelihood = f"{config.likelihood.kind} likelihood"
    if config.likelihood.kind == "bernoulli" and config.likelihood.binarization == "soft":
        likelihood = "cross-entropy (soft targets: no likelihood)"
    device = runtime.device.type
    threads = f" (threads: {torch.get_num_threads()})" if device == "cpu" else ""
    return [
        f"config {config.config}: {_num_parameters(vae):,} parameters, {likelihood} "
        f"of {config.data.channels}x{height}x{width} images{buckets}, {latent} latents",
        f"data {config.data.train}: {data.train.num_samples:,} images (shards: "
        f"{len(data.train.paths)}); validation: {data.validation.num_samples:,}",
        f"steps {training.steps}{begin} ({epochs:.1f} epochs) of {training.batch_size} images in "
        f"{config.data.slots} slots, on {runtime.world} x {device}{threads}, "
        f"{', '.join(arithmetic(config, runtime, microbatch))}",
        *(f"beside the bound: {term}" for term in _added_terms(config, data)),
        *(f"note: {note}" for note in notes(config, data)),
    ]


def dry_run(config: TrainConfig, data: Data, runtime: Runtime) -> list[str]:
    """The plan with what a step costs, and the numbers of processes that can share the run; nothing
    is built on the device. Every rank takes part."""
    with torch.device("meta"):
        vae = build_vae(config, data.image_size)
    cost = step_cost(config, data.largest_size, runtime.device)
    asked = config.training.microbatch_size
    size = largest_that_fits(config, runtime, cost) if asked == "auto" else int(asked)
    sizes = {name: _num_parameters(part) for name, part in vae.named_children()}
    parts = ", ".join(f"{name} {number:,}" for name, number in sizes.items() if number)
    share = config.training.batch_size // runtime.world
    images = min(size or share, share)
    worlds = ", ".join(str(world) for world in divisors(config.data.slots))
    return [
        *plan(config, data, runtime, vae, first_step=0, microbatch=size),
        f"parameters: {parts}",
        f"arithmetic of an image: {cost.forward_flops / 1e9:,.3g} GFLOP forward, "
        f"{cost.step_flops / 1e9:,.3g} GFLOP with its backward",
        f"memory of one process: about {_megabytes(cost.peak_bytes(images))} of tensors: weights, "
        f"gradients, moments and average {_megabytes(cost.state_bytes)}, a microbatch of {images} "
        f"images {_megabytes(images * cost.image_bytes)}",
        f"numbers of processes that divide data.slots={config.data.slots}: {worlds}",
        "dry run: nothing was trained",
    ]


def peak_images_per_second(config: TrainConfig, data: Data, runtime: Runtime) -> float:
    """Images per second of one device at its peak arithmetic speed, 0.0 where that is not known.

    What is not a matrix product or a convolution is not counted.
    """
    peak = peak_flops(runtime.device, config.training.precision)
    return peak / step_cost(config, data.image_size, runtime.device).step_flops if peak else 0.0


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def notes(config: TrainConfig, data: Data) -> Iterator[str]:
    """What a config says that its writer may not have meant."""
    steps, batch_size = config.training.steps, config.training.batch_size
    for key in ("optimizer.warmup_steps", "objective.beta_warmup_steps", "adversarial.start_step"):
        if (needed := value_of(config, key)) > steps:
            yield f"the last step, {steps}, comes before {key}={needed} is reached"
    shown, num_samples = steps * batch_size, data.train.num_samples
    if shown < num_samples:
        yield f"the run ends within its first epoch, after {shown:,} of {num_samples:,} images"
    if shown > MANY_EPOCHS * num_samples:
        enough = max(1, MANY_EPOCHS * num_samples // batch_size)
        yield (
            f"each image is shown {shown // num_samples:,} times, more than most VAEs gain from; "
            f"training.steps={enough} makes {MANY_EPOCHS:,}"
        )
    key = "data.slots" if data.settings.buckets else "training.batch_size"
    number, weights = value_of(config, key), [weight for _, weight in data.train.parts]
    given = quotas(weights, number, key=key) if weights else []
    shares = [weight / sum(weights) * number for weight in weights]
    if any(abs(n - m) > ROUNDING * m for n, m in zip(given, shares, strict=True)):
        asked, gets = (":".join(f"{n:g}" for n in ns) for ns in (weights, given))
        yield (
            f"{key}={number} cannot be divided by the weights {asked} of data.train; the data sets "
            f"get {gets} of it instead; raise {key}, or weigh them so"
        )


def arithmetic(config: TrainConfig, runtime: Runtime, microbatch: int) -> Iterator[str]:
    """Precision, and how it is carried out."""
    is_emulated = config.training.precision == "bf16" and not computes_bf16(config.runtime)
    emulated = " (this CPU emulates it: training.precision=no is several times faster)"
    yield f"precision {config.training.precision}{emulated * is_emulated}"
    if config.runtime.compile in COMPILED:
        yield "compiled" + " block by block" * (config.runtime.compile == "blocks")
    elif runtime.device.type == "cuda" and (problem := compiler_problem(runtime.device)):
        yield f"not compiled ({problem})"
    if config.runtime.channels_last == "true":
        yield "channels last"
    if microbatch:
        yield f"microbatches of {microbatch}"


def _added_terms(config: TrainConfig, data: Data) -> Iterator[str]:
    """Networks that compare images, beside the bound; `perceptual.kind` is resolved."""
    perceptual, adversarial = config.perceptual, config.adversarial
    if perceptual.kind != "none":
        yield f"perceptual {perceptual.kind} x {perceptual.weight:g}"
    if adversarial.weight:
        heard = first_step_of_generator(adversarial)
        begin = f"discriminator from step {adversarial.start_step}, decoder from {heard}"
        yield f"adversarial x {adversarial.weight:g} ({begin})"
    if vision := config.objective.alignment:
        stored = ", whose features are in the shards" if data.settings.vision else ""
        yield f"alignment with {printable(vision)}{stored}"
