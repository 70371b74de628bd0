"""The rules of what is added to the bound: perceptual and adversarial terms, latent noise and
scale equivariance, and of training the decoder alone."""

from __future__ import annotations

from collections.abc import Iterator

from vae_dist.config.keys import keys
from vae_dist.config.rules import Violation, ignored, rule
from vae_dist.config.schema import TrainConfig

DENSITIES = ("gaussian", "laplace")


def added_terms(config: TrainConfig) -> Iterator[Violation]:
    yield from _perceptual(config)
    yield from _adversarial(config)
    yield from _scale_equivariance(config)
    if config.objective.latent_noise:
        yield from _one_draw(config, "objective.latent_noise")
    if config.training.train_only == "decoder":
        yield from _decoder_alone(config)


def _perceptual(config: TrainConfig) -> Iterator[Violation]:
    perceptual, channels = config.perceptual, config.data.channels
    kind = perceptual.kind
    if kind in ("none", "structure"):
        because = f"perceptual.kind={kind}"
        yield from ignored(config, "perceptual.weights", because)
        if kind == "none":
            yield from ignored(config, "perceptual.weight", because)
            return
    yield from _whole_images(config, "perceptual.kind")
    yield from _one_draw(config, "perceptual.kind")
    if kind != "structure" and channels not in (1, 3):
        sentence = (
            f"compares grey or RGB pictures, and data.channels={channels}; "
            "use perceptual.kind=structure"
        )
        yield rule("perceptual.kind", kind, sentence, "data.channels")


def _adversarial(config: TrainConfig) -> Iterator[Violation]:
    adversarial, steps = config.adversarial, config.training.steps
    if not adversarial.weight:
        for name in keys(TrainConfig):
            if name.startswith("adversarial.") and name != "adversarial.weight":
                yield from ignored(config, name, "adversarial.weight=0 (no discriminator)")
        return
    name, value = "adversarial.weight", adversarial.weight
    yield from _whole_images(config, name)
    yield from _one_draw(config, name)
    if config.model.arch == "dense":
        sentence = "needs convolutional towers: model.arch=conv"
        yield rule(name, value, sentence, "model.arch")
    begin = adversarial.start_step + adversarial.warmup_steps
    if begin >= steps:
        yield Violation(
            ("adversarial.start_step", "adversarial.warmup_steps", "training.steps"),
            f"adversarial.start_step={adversarial.start_step} and adversarial.warmup_steps="
            f"{adversarial.warmup_steps} leave no step of training.steps={steps} in which the "
            "decoder hears of the discriminator; lower them, or set adversarial.weight=0",
        )
    if len(adversarial.betas) != 2 or not all(0 <= beta < 1 for beta in adversarial.betas):
        yield rule("adversarial.betas", adversarial.betas, "must be two numbers in [0, 1)")
    if not adversarial.r1:
        yield from ignored(config, "adversarial.r1_every", "adversarial.r1=0")


def _scale_equivariance(config: TrainConfig) -> Iterator[Violation]:
    name, value = "objective.scale_equivariance", config.objective.scale_equivariance
    if not value:
        return
    yield from _whole_images(config, name)
    yield from _one_draw(config, name)
    if config.model.latent != "spatial":
        yield rule(name, value, "needs model.latent=spatial: a vector has no scale", "model.latent")
    if config.likelihood.kind not in DENSITIES:
        sentence = (
            "compares averages of pixels, which are no levels: likelihood.kind must be one of "
            f"{', '.join(DENSITIES)}"
        )
        yield rule(name, value, sentence, "likelihood.kind")


def _decoder_alone(config: TrainConfig) -> Iterator[Violation]:
    because = "training.train_only=decoder (the rate has no gradient)"
    for name in ("beta_warmup_steps", "beta_warmup", "beta_cycles", "free_bits", "gradient"):
        yield from ignored(config, f"objective.{name}", because)
    if not config.init_from:
        sentence = "would train a decoder for an encoder of random weights; give init_from=RUN"
        yield rule("training.train_only", "decoder", sentence, "init_from")


def _whole_images(config: TrainConfig, name: str) -> Iterator[Violation]:
    if config.data.mask != "none":
        yield Violation(
            (name, "data.mask"),
            f"{name} compares whole pictures, and data.mask={config.data.mask} says that pixels "
            f"are missing; leave {name} out, or set data.mask=none",
        )


def _one_draw(config: TrainConfig, name: str) -> Iterator[Violation]:
    samples = config.objective.importance_samples
    if samples != 1:
        yield Violation(
            (name, "objective.importance_samples"),
            f"{name} is for one draw of z: objective.importance_samples={samples} must be 1",
        )
