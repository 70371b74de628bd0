"""Large images through a spatial model in overlapping square tiles: memory is that of one tile.

In: images (B, C, H, W) in [-1, 1], or latents (B, c, h, w). Out: the mean and log-variance of
q(z|x), or the decoder's outputs, of the whole image, float32. All tiles have one size; the last of
a row or column is moved back to the edge. Next to a neighbour, a tile's outer quarter of the
overlap is not used, because convolutions see zeros past its edge; over the middle half the weights
of both go from 0 to 1, linearly:

    y = sum_t w_t y_t / sum_t w_t,     w_t(row, column) = ramp_t(row) * ramp_t(column)

How far that is from the untiled result: an image that fits one tile is the untiled one, bit for
bit. Where every layer looks at positions up to r away, and r is at most a quarter of the overlap,
tiles are exact to rounding. GroupNorm and attention look at the whole feature map, so each tile
has its own mean, variance and keys, and y is a convex combination of results that differ by that:

    |y - untiled| <= max_t |y_t - untiled|     at each position

The overlap blends the steps between tiles, it does not remove the difference; larger tiles do.
benchmarks/RESULTS.md has the measured size of it for a trained model.
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
    """`model.encode` with tiles of about `tile` x `tile` pixels, whole with tile=0: mean and
    log-variance of q(z|x), each float32 (B, *latent_shape). Raises ConfigError for a vector latent
    or too small a tile."""
    height, width = images.shape[-2:]
    side = tile_side(model, tile)
    if not tile or max(height, width) <= side * model.stride:
        return model.encode(images, labels, mask)
    bottom, right = -height % model.stride, -width % model.stride
    images = F.pad(images, (0, right, 0, bottom), mode="replicate")
    if mask is not None:
        mask = F.pad(mask.float(), (0, right, 0, bottom), mode="replicate")

    def moments(rows: slice, columns: slice) -> Tensor:
        inside = _scaled(rows, model.stride), _scaled(columns, model.stride)
        part = None if mask is None else mask[..., inside[0], inside[1]]
        return torch.cat(model.encode(images[..., inside[0], inside[1]], labels, part), 1)

    _, rows, columns = model.latent_shape(height, width)
    mean, log_variance = _blended(moments, (rows, columns), side, scale=1).chunk(2, dim=1)
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
    """`model.decode` with tiles of about `tile` x `tile` pixels, whole with tile=0: float32
    parameters of p(x|z) for images of size (H, W). Raises ConfigError for a vector latent or too
    small a tile."""
    height, width = image_size
    side, stride = tile_side(model, tile), model.stride
    if not tile or max(height, width) <= side * stride:
        return model.decode(z, image_size, labels)

    def params(rows: slice, columns: slice) -> Tensor:
        part = z[..., rows, columns]
        size = part.shape[-2] * stride, part.shape[-1] * stride
        return model.decode(part, size, labels)

    whole = _blended(params, (z.shape[-2], z.shape[-1]), side, scale=stride)
    return whole[..., :height, :width]


def tile_side(model: VAE, tile: int) -> int:
    """The side of a tile in latent positions, 0 for tile=0. Raises ConfigError where no tiles can
    be."""
    if tile and model.image_size is not None:
        raise ConfigError(
            f"tile={tile}: a vector latent holds the whole image; tiles are for model.latent="
            "spatial"
        )
    side = tile // model.stride
    if tile and side < 8:
        raise ConfigError(
            f"tile={tile} pixels are {side} positions of a latent of stride {model.stride}, too "
            f"few to overlap; give at least tile={8 * model.stride}"
        )
    return side


def _blended(
    compute: Callable[[slice, slice], Tensor], size: tuple[int, int], side: int, *, scale: int
) -> Tensor:
    """Tiles of `compute`, which maps latent positions to results of `scale` times their size, as
    one result. `size` is that of the latent, `side` a tile's."""
    total: Tensor | None = None
    weights: Tensor | None = None
    for rows, down in _spans(size[0], side, scale):
        for columns, across in _spans(size[1], side, scale):
            result = compute(rows, columns)
            if total is None or weights is None:
                shape = size[0] * scale, size[1] * scale
                total = result.new_zeros(*result.shape[:2], *shape)
                weights = result.new_zeros(*shape)
            weight = down.to(result.device)[:, None] * across.to(result.device)[None, :]
            place = ..., _scaled(rows, scale), _scaled(columns, scale)
            total[place] += result * weight
            weights[place] += weight
    assert total is not None and weights is not None
    return total / weights


def _spans(length: int, side: int, scale: int) -> Iterator[tuple[slice, Tensor]]:
    """Tiles along an axis of `length` latent positions, with a weight for each position of what
    they give, `scale` times as many."""
    side = min(side, length)
    overlap = max(4, math.ceil(side * OVERLAP))
    starts = [*range(0, length - side, side - overlap), length - side]
    unused, rise = overlap * scale // 4, overlap * scale // 2
    ramp = ((torch.arange(side * scale) - unused + 0.5) / rise).clamp(0.0, 1.0)
    for start in starts:
        weight = torch.ones(side * scale)
        if start > 0:
            weight = weight * ramp
        if start + side < length:
            weight = weight * ramp.flip(0)
        yield slice(start, start + side), weight


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
