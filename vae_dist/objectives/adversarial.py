"""The adversarial terms: hinge loss and the weight that balances the generator's side.

    discriminator   1/2 mean relu(1 - D(x)) + 1/2 mean relu(1 + D(x^))           means over logits
    generator       w(k) * C*H*W * (-mean D(x^))          w(k) = weight * ramp(k) * lambda(k)
    lambda(k + 1) = min(|G_main(k)| / |G_adv(k)|, max_weight)

per image, with x^ the mean of p(x|z). G_main and G_adv are the gradients of distortion and
perceptual term, and of the generator's term at w = 1, at the weights of the decoder's last layer
(Esser et al. 2021), each summed over all images of step k and all ranks. The ratio is used from the
next step on, so that microbatches and ranks do not change it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_dist.config.schema import AdversarialConfig


def first_step_of_generator(config: AdversarialConfig) -> int:
    """The step from which the generator's term counts."""
    return config.start_step + config.warmup_steps


def ramp_at(config: AdversarialConfig, step: int) -> float:
    """Part of the weight that counts at step `step`: 0, then a linear rise, then 1."""
    since = step - first_step_of_generator(config)
    if since < 0:
        return 0.0
    return min(1.0, (since + 1) / max(config.ramp_steps, 1))


def mean_logits(logits: Tensor) -> Tensor:
    """(B, 1, H', W') -> (B,)."""
    return logits.flatten(1).mean(1)


def hinge_loss(on_real: Tensor, on_fake: Tensor) -> Tensor:
    """Of the discriminator, for each pair of a picture and its reconstruction, (B,)."""
    return 0.5 * (mean_logits(F.relu(1.0 - on_real)) + mean_logits(F.relu(1.0 + on_fake)))


def adaptive_weight(main: Tensor, adversarial: Tensor, *, largest: float) -> Tensor:
    """Ratio of the norms of two gradients, 0-dim; not finite where they are not."""
    tiny = torch.finfo(torch.float32).tiny
    ratio = torch.linalg.vector_norm(main) / (torch.linalg.vector_norm(adversarial) + tiny)
    # a comparison, not clamp: an infinite ratio of finite gradients is the largest one
    return torch.where(ratio > largest, largest, ratio)
