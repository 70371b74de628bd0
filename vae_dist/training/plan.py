"""What a run is going to do, in words: shown at its start and by `dry_run=true`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from vae_dist.config.keys import value_of
from vae_dist.config.resolve import COMPILED, divisors
from vae_dist.config.schema import TrainConfig
from vae_dist.data.cache import bytes_cached
from vae_dist.data.index import ShardIndex
from vae_dist.data.order import quotas
from vae_dist.data.transforms import ImageSettings
from vae_dist.distributed import Runtime, computes_bf16
from vae_dist.models.build import build_vae
from vae_dist.models.discriminator import build_discriminator
from vae_dist.objectives.adversarial import first_step_of_generator
from vae_dist.tracking.throughput import peak_flops
from vae_dist.training.compile import compiler_problem
from vae_dist.training.memory import StepCost, estimated_microbatch, step_cost

# the shipped configs take 10 to 135 epochs of their data
MANY_EPOCHS = 1000
ROUNDING = 0.05  # of a data set's share in a batch, that is not worth a note


@dataclass(frozen=True)
class Data:
    """What the shards hold. `identity` ties a run to them: it is kept in each checkpoint."""

    train: ShardIndex
    validation: ShardIndex
    settings: ImageSettings  # of training images

    any_size: bool = False  # will do for the model, so that evaluation may mix sizes

    @property
    def evaluation_settings(self) -> ImageSettings:
        settings = self.settings.without_augmentation()
        return replace(
            settings,
            any_size=self.any_size and not settings.resize,
            needs=tuple(need for need in settings.needs if need.in_evaluation),
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """H, W of every image that the model sees, or of a typical one where sizes differ."""
        return self.settings.size

    @property
    def num_dims(self) -> int:
        return math.prod(self.settings.shape)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "image_size": list(self.image_size),
            "train_data": self.train.fingerprint,
            "validation_data": self.validation.fingerprint,
        }


def dry_run(config: TrainConfig, data: Data, runtime: Runtime) -> list[str]:
    """The plan with what a step costs; nothing is built on the device. Every rank takes part."""
    cost = step_cost(config, largest_size(data), runtime.device)
    asked = config.training.microbatch_size
    size = estimated_microbatch(config, cost, runtime) if asked == "auto" else asked
    lines = plan(config, data, runtime, first_step=0, microbatch_size=size)
    return lines + _costs(config, data, runtime, cost, microbatch_size=size)


def plan(
    config: TrainConfig, data: Data, runtime: Runtime, *, first_step: int, microbatch_size: int
) -> list[str]:
    """Model, data, steps and machine in a few lines. `config` is resolved."""
    with torch.device("meta"):
        vae = build_vae(config, data.image_size)
    num_parameters = sum(p.numel() for p in vae.parameters())
    height, width = data.image_size
    latent = "x".join(str(size) for size in vae.latent_shape(height, width))
    training = config.training
    epochs = training.steps * training.batch_size / data.train.num_samples
    begin = f", going on at step {first_step}" if first_step else ""
    buckets = f" in {len(data.settings.buckets)} aspect buckets" if data.settings.buckets else ""
    is_cpu = runtime.device.type == "cpu"
    threads = f" ({_counted(torch.get_num_threads(), 'thread')})" if is_cpu else ""
    return [
        f"config {config.config}: {num_parameters:,} parameters, {_likelihood(config)} "
        f"of {config.data.channels}x{height}x{width} images{buckets}, {latent} latents",
        f"data {config.data.train}: {data.train.num_samples:,} images in "
        f"{_counted(len(data.train.paths), 'shard')}; validation: {data.validation.num_samples:,}",
        f"steps {training.steps}{begin} ({epochs:.1f} epochs) of {training.batch_size} images in "
        f"{config.data.slots} slots, on {runtime.world} x {runtime.device.type}{threads}, "
        f"{_arithmetic(config, runtime, microbatch_size)}",
        *describe_added_terms(config),
        *_unfinished_warmups(config),
        *_unusual_epochs(config, data.train.num_samples),
        *_rounded_weights(config, data),
    ]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _unfinished_warmups(config: TrainConfig) -> list[str]:
    """Of a trial of a few steps, or of a slip of the pen."""
    return [
        f"note: the last step, {config.training.steps}, comes before the end of {name}={steps}"
        for name in ("optimizer.warmup_steps", "objective.beta_warmup_steps")
        if (steps := value_of(config, name)) > config.training.steps
    ]


def _unusual_epochs(config: TrainConfig, num_samples: int) -> list[str]:
    """Of a config that was made for a larger data set, or a run that sees a part of its own."""
    batch_size, steps = config.training.batch_size, config.training.steps
    shown = steps * batch_size
    if shown < num_samples:
        return [
            f"note: the run ends within its first epoch, after {shown:,} of {num_samples:,} images"
        ]
    if shown > MANY_EPOCHS * num_samples:
        enough = max(1, MANY_EPOCHS * num_samples // batch_size)
        return [
            f"note: each image is shown {shown // num_samples:,} times, more than most VAEs gain "
            f"from; training.steps={enough} makes {MANY_EPOCHS:,}"
        ]
    return []


def _rounded_weights(config: TrainConfig, data: Data) -> list[str]:
    """Of a mixture of which a batch holds clearly other shares than the weights say."""
    is_bucketed = bool(data.settings.buckets)
    key = "data.slots" if is_bucketed else "training.batch_size"
    lanes, weights = value_of(config, key), [weight for _, weight in data.train.parts]
    given = quotas(weights, lanes, key=key) if weights else []
    shares = [weight / sum(weights) * lanes for weight in weights]
    if all(abs(n - m) <= ROUNDING * m for n, m in zip(given, shares, strict=True)):
        return []
    asked, gets = (":".join(f"{number:g}" for number in numbers) for numbers in (weights, given))
    return [
        f"note: the weights {asked} of data.train cannot divide the {lanes} "
        f"{'slots' if is_bucketed else 'images'} of a batch; the data sets get {gets} of them "
        f"instead; raise {key}, or weigh them so"
    ]


def _arithmetic(config: TrainConfig, runtime: Runtime, microbatch_size: int) -> str:
    """Precision, and how it is carried out."""
    words = [f"precision {config.training.precision}"]
    if config.training.precision == "bf16" and not computes_bf16(config.runtime):
        words[0] += " (this CPU emulates it: training.precision=no is several times faster)"
    if config.runtime.compile in COMPILED:
        words.append("compiled" if config.runtime.compile == "true" else "compiled block by block")
    elif runtime.device.type == "cuda" and (problem := compiler_problem(runtime.device)):
        words.append(f"not compiled ({problem})")
    if config.runtime.channels_last == "true":
        words.append("channels last")
    if microbatch_size:
        words.append(f"microbatches of {microbatch_size}")
    return ", ".join(words)


def _likelihood(config: TrainConfig) -> str:
    if config.likelihood.kind == "bernoulli" and config.likelihood.binarization == "soft":
        return "cross-entropy (soft targets: no likelihood)"
    return f"{config.likelihood.kind} likelihood"


def _costs(
    config: TrainConfig, data: Data, runtime: Runtime, cost: StepCost, *, microbatch_size: int
) -> list[str]:
    """Arithmetic of an image, memory of one process, and the numbers of processes that can share
    the run."""
    with torch.device("meta"):
        vae = build_vae(config, data.image_size)
        networks = dict(vae.named_children())
        if config.adversarial.weight:
            networks["discriminator"] = build_discriminator(
                config.adversarial, image_channels=config.data.channels, seed=config.seed
            )
    parts = ", ".join(
        f"{name} {sum(p.numel() for p in part.parameters()):,}"
        for name, part in networks.items()
        if any(True for _ in part.parameters())
    )
    share = config.training.batch_size // runtime.world
    images = min(microbatch_size or share, share)
    # a lane is an image of a step, with aspect buckets a slot
    lanes = config.data.slots if data.settings.buckets else config.training.batch_size
    window_bytes = 2 * config.data.window * lanes * data.train.mean_sample_bytes
    workers = min(config.data.workers, lanes // runtime.world)
    kept_bytes = bytes_cached(
        data.train.num_samples,
        data.settings,
        cache_bytes=config.data.cache_bytes,
        workers=workers,
    )
    kept = f", decoded images that are kept {_megabytes(kept_bytes)}" if kept_bytes else ""
    worlds = ", ".join(str(world) for world in divisors(config.data.slots))
    return [
        f"parameters: {parts}",
        f"arithmetic of an image: {_operations(cost.forward_flops)} forward, "
        f"{_operations(cost.step_flops)} with its backward",
        f"memory of one process: about {_megabytes(cost.peak_bytes(images))} of tensors: weights, "
        f"gradients, moments and average {_megabytes(cost.state_bytes)}, a microbatch of {images} "
        f"images {_megabytes(images * cost.image_bytes)}; undecoded samples "
        f"{_megabytes(window_bytes / runtime.world)} (window {config.data.window}){kept}",
        f"numbers of processes that divide data.slots={config.data.slots}: {worlds}",
        "dry run: nothing was trained",
    ]


def largest_size(data: Data) -> tuple[int, int]:
    """H, W of the image that costs most memory, as far as that is known before it is read."""
    return max(data.settings.buckets or (data.image_size,), key=math.prod)


def peak_images_per_second(config: TrainConfig, data: Data, runtime: Runtime) -> float:
    """Images per second of one device at its peak arithmetic speed, 0.0 where that is not known.

    What is not a matrix product or a convolution is not counted.
    """
    peak = peak_flops(runtime.device, config.training.precision)
    if not peak:
        return 0.0
    return peak / step_cost(config, data.image_size, runtime.device).step_flops


def _operations(flops: float) -> str:
    return f"{flops / 1e9:,.3g} GFLOP"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def describe_added_terms(config: TrainConfig) -> list[str]:
    """Lines, none for the bound alone. `perceptual.kind` is resolved."""
    parts, perceptual, adversarial = [], config.perceptual, config.adversarial
    if perceptual.kind != "none":
        parts.append(f"perceptual {perceptual.kind} x {perceptual.weight:g}")
    if adversarial.weight:
        parts.append(
            f"adversarial x {adversarial.weight:g} (discriminator from step "
            f"{adversarial.start_step}, decoder from {first_step_of_generator(adversarial)})"
        )
    if config.objective.scale_equivariance:
        parts.append(f"half size x {config.objective.scale_equivariance:g}")
    if config.objective.latent_noise:
        parts.append(f"latent noise {config.objective.latent_noise:g}")
    lines = [f"beside the bound: {', '.join(parts)}"] if parts else []
    if config.training.train_only == "decoder":
        lines.append(
            "decoder alone: encoder, quant_conv and label embedding keep their weights, the rate "
            "has no gradient"
        )
    return lines
