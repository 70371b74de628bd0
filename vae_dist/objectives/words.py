"""What is added to the bound, in words, for the plan of a run."""

from __future__ import annotations

from vae_dist.config.schema import TrainConfig
from vae_dist.objectives.adversarial import first_step_of_generator


def added_terms_in_words(config: TrainConfig) -> list[str]:
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
