"""Large images through a spatial model in overlapping square tiles: memory is that of one tile.

In: images (B, C, H, W) in [-1, 1], or latents (B, c, h, w). Out: the mean and log-variance of
q(z|x), or the decoder's outputs, of the whole image, float32. All tiles have one size; the last of
a row or column is moved back to the edge. Next to a neighbour, a tile's outer quarter of the
overlap is not used, because convolutions see zeros past its edge; over the middle half the weights
of both go from 0 to 1, linearly:

    y = sum_t w_t y_t / sum_t w_t,     w_t(row, column) = ramp_t(row) * ramp_t(column)

An image that fits one tile is the untiled one, bit for bit. Where every layer looks at positions up
to r away, and r is at most a quarter of the overlap, tiles are exact to rounding. GroupNorm and
attention look at the whole feature map, so each tile has its own mean, variance and keys, and y is
a convex combination of results that differ by that:

    |y - untiled| <= max_t |y_t - untiled|     at each position

benchmarks/RESULTS.md has the measured size of it for a trained model; larger tiles reduce it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_dist.config.errors import ConfigError
from vae_dist.models.vae import VAE

OVERLAP = 0.25  # of a tile's side


@torch.inference_mode()
def encode(
    model: VAE,
    images: Tensor,
    *,
    tile: int,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`model.encode` in tiles of about `tile` x `tile` pixels, whole with tile=0: mean and
    log-variance of q(z|x), each float32 (B, *latent_shape). Raises ConfigError as `tile_side`."""
    side, stride = tile_side(model, tile), model.stride
    if not tile:
        return model.encode(images, labels, mask)
    padding = (0, -images.shape[-1] % stride, 0, -images.shape[-2] % stride)
    images = F.pad(images, padding, mode="replicate")
    mask = None if mask is None else F.pad(mask.float(), padding, mode="replicate")

    def moments(rows: slice, columns: slice) -> Tensor:
        place = ..., _scaled(rows, stride), _scaled(columns, stride)
        return torch.cat(
            model.encode(images[place], labels, mask if mask is None else mask[place]), 1
        )

    size = images.shape[-2] // stride, images.shape[-1] // stride
    mean, log_variance = _blended(moments, size, side, scale=1).chunk(2, dim=1)
    return mean, log_variance


@torch.inference_mode()
def decode(
    model: VAE,
    z: Tensor,
    image_size: tuple[int, int],
    *,
    tile: int,
    labels: Tensor | None = None,
) -> Tensor:
    """`model.decode` in tiles of about `tile` x `tile` pixels, whole with tile=0: float32
    parameters of p(x|z) for images of (H, W). Raises ConfigError as `tile_side`."""
    side, stride = tile_side(model, tile), model.stride
    if not tile:
        return model.decode(z, image_size, labels)

    def params(rows: slice, columns: slice) -> Tensor:
        part = z[..., rows, columns]
        return model.decode(part, (part.shape[-2] * stride, part.shape[-1] * stride), labels)

    size = z.shape[-2], z.shape[-1]
    return _blended(params, size, side, scale=stride)[..., : image_size[0], : image_size[1]]


def tile_side(model: VAE, tile: int) -> int:
    """The side of a tile in latent positions, 0 for tile=0. Raises ConfigError for a vector latent
    and for tiles that are too small."""
    least = 8 * model.stride
    reasons = {
        "a vector latent holds the whole image; leave tile out": model.image_size is not None,
        "the latents of a ladder are not cut; leave tile out": model.num_levels > 0,
        f"tiles have too few positions to overlap; give at least tile={least}": tile < least,
    }
    for reason, is_so in reasons.items():
        if tile and is_so:
            raise ConfigError(f"tile={tile}: {reason}")
    return tile // model.stride


def _blended(
    compute: Callable[[slice, slice], Tensor], size: tuple[int, int], side: int, *, scale: int
) -> Tensor:
    """Tiles of `side` positions of a latent of `size`, each mapped by `compute` to a result of
    `scale` times its size, as one result."""
    total = weights = torch.zeros(())
    for rows, down in _spans(size[0], side, scale):
        for columns, across in _spans(size[1], side, scale):
            result = compute(rows, columns)
            if not total.ndim:
                total = result.new_zeros(*result.shape[:2], size[0] * scale, size[1] * scale)
                weights = torch.zeros_like(total[0, 0])
            weight = (down[:, None] * across[None, :]).to(result)
            place = ..., _scaled(rows, scale), _scaled(columns, scale)
            total[place] += result * weight
            weights[place] += weight
    return total / weights


def _spans(length: int, side: int, scale: int) -> Iterator[tuple[slice, Tensor]]:
    """Tiles along an axis of `length` latent positions, with a weight for each position of what
    they give, `scale` times as many."""
    side = min(side, length)
    overlap = max(4, math.ceil(side * OVERLAP))
    unused, rise = overlap * scale // 4, overlap * scale // 2
    ramp = ((torch.arange(side * scale) - unused + 0.5) / rise).clamp(0.0, 1.0)
    for start in (*range(0, length - side, side - overlap), length - side):
        weight = torch.ones(side * scale)
        if start > 0:
            weight = weight * ramp
        if start + side < length:
            weight = weight * ramp.flip(0)
        yield slice(start, start + side), weight


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
