"""Random generators as a function of (seed, purpose, position): nothing depends on call history.

`position` is a tuple of integers such as (step, slot) or (sample,). The same triple gives the same
draws in every process, at every resume. The mixing is SHA-256-like in quality (BLAKE2b, 64 bits).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for one draw."""
    message = struct.pack(f"<{len(position) + 1}q", seed, *position) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def torch_generator(
    seed: int, purpose: str, *position: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    import torch

    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *position))


def numpy_generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, purpose, *position))


def draws(
    draw: Callable[..., torch.Tensor],
    seed: int,
    purpose: str,
    samples: Sequence[int],
    shape: tuple[int, ...],
    *position: int,
) -> torch.Tensor:
    """One draw per sample number (and position), (b, *shape), made on CPU so that devices agree."""
    import torch

    generators = [torch_generator(seed, purpose, sample, *position) for sample in samples]
    return torch.stack([draw(shape, generator=generator) for generator in generators])
