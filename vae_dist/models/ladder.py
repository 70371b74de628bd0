"""A ladder of latents: a VAE whose latent comes in groups, each given the ones before it.

    p(z) = prod_l p(z_l | z_<l),     q(z|x) = prod_l q(z_l | z_<l, x)        (Sonderby et al. 2016)

The encoder goes up once and leaves one feature map, a tap, at each level. The decoder starts from a
learned vector at every position of the top level and goes down; at each group (Child 2021, VDVAE)

    p_mean, p_s, h = prior(x)                       zero before training: p(z_l | .) = N(0, I)
    q_mean, q_s    = posterior(x, tap)              standard deviation sigma(s)
    z = q_mean + sigma(q_s) * noise                 from the prior: p_mean + sigma(p_s) * noise
    x = block(x + h + project(z))
    KL = log(sigma_p / sigma_q) + (sigma_q^2 + (q_mean - p_mean)^2) / (2 sigma_p^2) - 1/2

sigma(s) is a softplus that is 1 at 0 and grows linearly (Hazami et al. 2022), so that gradients do
not explode. From level to level a square of `factor` positions becomes one, by a convolution of
that stride, and one becomes a square; all else is a convolution, so any size works that the stride
divides. With `aggregate` the likelihood sees a sum of what each group projects, and no group can be
passed by. Moments, KL and last layers are float32 outside autocast.

All groups lie flat in one latent (B, 1, D), from the top level to the finest.

Legend: B images, K draws, G groups of a level, c channels of a group, D values of a latent. Lists
of the config (`factors` and `blocks` one number a step and a level) go from the finest level up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.config.schema import ModelConfig
from vae_dist.models.blocks import LABEL_DIMS, Block, group_norm, in_float32, zeroed
from vae_dist.models.vae import VAE, VAEOutput, each

SIGMA_FLOOR = 1e-3
LOG_2 = math.log(2.0)


def sigma(s: Tensor) -> Tensor:
    """Standard deviation of an output of a layer: positive, 1 at 0."""
    return SIGMA_FLOOR + (1 - SIGMA_FLOOR) / LOG_2 * F.softplus(LOG_2 * s)


def share_of_a_group(options: ModelConfig) -> float:
    """In what all of them add up to."""
    return sum(options.groups) ** -0.5


class LadderBlock(Block):
    """x + conv(silu(conv(silu(norm(x))))), the last one zero before training."""

    def __init__(self, width: int, kernel: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(norm_groups, width)
        self.conv1 = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.conv2 = zeroed(nn.Conv2d(width, width, kernel, padding=kernel // 2))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))
        return x + h


class Head(nn.Module):
    """conv(silu(norm(x))) in float32: the moments of a group."""

    def __init__(self, width: int, outputs: int, kernel: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(norm_groups, width)
        self.conv = nn.Conv2d(width, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(self.conv, F.silu(self.norm(x)))


class Found(NamedTuple):
    """Of a group, of all groups of a level, or of all levels."""

    z: Tensor  # (B, n)
    mean: Tensor  # (B, n), of q(z_l | z_<l, x), or of the prior without an image
    log_variance: Tensor
    kl: Tensor  # (B, groups), nats; 0 without an image
    log_ratio: Tensor  # (B, groups): log q - log p at z, nats

    @classmethod
    def of(cls, parts: Sequence[Found]) -> Found:
        return cls(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


Gaussian = tuple[Tensor, Tensor]  # mean and standard deviation, each (B, ...)


def draw(value: Tensor, prior: Gaussian, posterior: Gaussian, *, is_latent: bool = False) -> Found:
    """z = mean + sigma * value of the posterior, or `value` itself, and what one group costs."""
    (mean, spread), (p_mean, p_spread) = posterior, prior
    z = value if is_latent else mean + spread * value
    logs = torch.log(p_spread / spread)
    kl = logs + (spread.square() + (mean - p_mean).square()) / (2 * p_spread.square()) - 0.5
    distances = ((z - p_mean) / p_spread).square() - ((z - mean) / spread).square()
    per_image = (each.flatten(1).sum(1, keepdim=True) for each in (kl, logs + 0.5 * distances))
    return Found(z.flatten(1), mean.flatten(1), 2 * torch.log(spread).flatten(1), *per_image)


class Group(nn.Module):
    """One rung of the ladder at features x (B, w, h, w)."""

    def __init__(self, options: ModelConfig, level: int, kernel: int, *, is_last: bool) -> None:
        super().__init__()
        width, latent, norms = options.channels[level], options.latent_channels, options.norm_groups
        self.prior = Head(width, 2 * latent + width, kernel, norms)
        zeroed(self.prior.conv)
        self.posterior = Head(2 * width, 2 * latent, kernel, norms)
        self.collect = nn.Conv2d(latent, width, 1) if options.aggregate else None
        self.has_block = not (is_last and options.aggregate)  # whose output nothing would see
        if self.has_block:
            self.project = nn.Conv2d(latent, width, 1)
            with torch.no_grad():
                self.project.weight *= share_of_a_group(options)
            self.block = LadderBlock(width, kernel, norms)

    def forward(
        self, x: Tensor, collected: Tensor, value: Tensor, tap: Tensor | None, is_latent: bool
    ) -> tuple[Tensor, Tensor, Found]:
        """Features below, what is collected, and the latent: `value` (B, c, h, w) is the noise of a
        draw, of the posterior where there is a tap, or `is_latent`: z itself."""
        latent = value.shape[1]
        mean, s, h = self.prior(x).split([latent, latent, x.shape[1]], 1)
        prior = posterior = mean, sigma(s)
        if tap is not None:
            mean, s = self.posterior(torch.cat([x, tap], 1)).chunk(2, 1)
            posterior = mean, sigma(s)
        found = draw(value.float(), prior, posterior, is_latent=is_latent)
        z = found.z.view_as(value)
        if self.has_block:
            x = self.block(x + h + self.project(z))
        if self.collect is not None:
            collected = collected + self.collect(z)
        return x, collected, found


class Rise(nn.Module):
    """silu, then each position becomes factor x factor."""

    def __init__(self, width: int, next_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width, next_width * factor**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(F.silu(x)), self.factor)


class DecoderLevel(nn.Module):
    """The way down to this level, unless it is the top one, then its groups."""

    def __init__(self, options: ModelConfig, level: int, kernel: int) -> None:
        super().__init__()
        widths, is_top = options.channels, level + 1 == len(options.channels)
        change = () if is_top else (widths[level + 1], widths[level], options.factors[level])
        self.rise = Rise(*change) if change else None
        self.collected = Rise(*change) if change and options.aggregate else None
        last = options.groups[level] - 1
        self.groups = nn.ModuleList(
            Group(options, level, kernel, is_last=level == 0 and number == last)
            for number in range(last + 1)
        )

    def forward(
        self, x: Tensor, collected: Tensor, value: Tensor, tap: Tensor | None, is_latent: bool
    ) -> tuple[Tensor, Tensor, Found]:
        """`value` (B, G c h w) as a group's, one group after the other."""
        x = x if self.rise is None else self.rise(x)
        collected = collected if self.collected is None else self.collected(collected)
        values, parts = value.unflatten(1, (len(self.groups), -1, *x.shape[-2:])), []
        for number, group in enumerate(self.groups):
            x, collected, found = group(x, collected, values[:, number], tap, is_latent)
            parts.append(found)
        return x, collected, Found.of(parts)


class LadderEncoder(nn.Module):
    """Images (B, C, H, W), sides multiples of the stride -> a tap of each level, the top first."""

    def __init__(self, in_channels: int, options: ModelConfig, kernels: Sequence[int]) -> None:
        super().__init__()
        self.patch, widths, norms = options.patch, options.channels, options.norm_groups
        changes = [nn.Conv2d(in_channels * self.patch**2, widths[0], 3, padding=1)] + [
            nn.Conv2d(above, below, factor, stride=factor)
            for above, below, factor in zip(widths, widths[1:], options.factors, strict=False)
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(change, *(LadderBlock(width, kernel, norms) for _ in range(count)))
            for change, width, kernel, count in zip(
                changes, widths, kernels, options.blocks, strict=True
            )
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        x, taps = F.pixel_unshuffle(images, self.patch), []
        for level in self.levels:
            x = level(x)
            taps.append(x)
        return taps[::-1]


class LadderDecoder(nn.Module):
    """The way down, and the float32 parameters of the likelihood at its end."""

    def __init__(self, num_params: int, options: ModelConfig, kernels: Sequence[int]) -> None:
        super().__init__()
        finest, top, norms = options.channels[0], options.channels[-1], options.norm_groups
        self.options = options
        self.start = nn.Parameter(torch.zeros(1, top, 1, 1))
        self.label_in = zeroed(nn.Linear(LABEL_DIMS, top)) if options.num_classes else None
        order = reversed(list(enumerate(kernels)))
        self.levels = nn.ModuleList(DecoderLevel(options, *level) for level in order)
        blocks = (LadderBlock(finest, kernels[0], norms) for _ in range(1 + options.aggregate))
        self.last_blocks = nn.Sequential(*blocks)
        self.head = Head(finest, num_params * options.patch**2, 3, norms)

    def sizes(self, rows: int, columns: int) -> list[int]:
        """Values of each level's latents, the top first, for a top level of rows x columns."""
        options, sizes, values = self.options, [], rows * columns * self.options.latent_channels
        for groups, factor in zip(options.groups[::-1], [1, *options.factors[::-1]], strict=True):
            values *= factor**2
            sizes.append(groups * values)
        return sizes

    def forward(
        self,
        value: Tensor,
        top_size: tuple[int, int],
        taps: Sequence[Tensor] | None = None,
        condition: Tensor | None = None,
        num_given: int = 0,
    ) -> tuple[Tensor, Found]:
        """`value` (B, D): z at the first `num_given` levels, noise at the others, of the posterior
        with `taps` and of the prior without."""
        x: Tensor = self.start.expand(len(value), -1, *top_size)
        if self.label_in is not None:
            x = x + self.label_in(condition)[:, :, None, None]
        collected, parts = value.new_zeros(()), []
        for number, part in enumerate(value.split(self.sizes(*top_size), 1)):
            tap = None if taps is None else taps[number]
            x, collected, found = self.levels[number](x, collected, part, tap, number < num_given)
            parts.append(found)
        if self.options.aggregate:
            x = collected * share_of_a_group(self.options)
        x = self.head(self.last_blocks(x))
        return F.pixel_shuffle(x, self.options.patch), Found.of(parts)


class LadderVAE(VAE):
    """A VAE whose latent (1, D) is a ladder's; `kl` of its output is that of each group."""

    encoder: LadderEncoder  # type: ignore[assignment]
    decoder: LadderDecoder  # type: ignore[assignment]

    def forward(  # type: ignore[override]  # checks refuse what else a VAE takes
        self,
        images: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> VAEOutput:
        lead, draws = noise.shape[:-2], noise.shape[:-2].numel() // len(images)  # (B,) or (B, K)
        taps = [each(tap, draws) for tap in self.encoder(self._shown(images, mask))]
        value, known = noise.flatten(0, -2), each(labels, draws)
        params, found = self._down(value, images.shape, known, taps=taps)
        log_likelihood = self.likelihood.log_prob(params, each(images, draws), each(mask, draws))
        kl = found.kl.unflatten(0, lead)  # (B, [K,] groups)
        mean, log_variance, z = (
            part.unsqueeze(1).unflatten(0, lead)
            for part in (found.mean, found.log_variance, found.z)
        )
        return VAEOutput(
            log_likelihood.unflatten(0, lead),
            kl.mean(1) if kl.ndim > 2 else kl,
            mean,
            log_variance,
            z,
            params.unflatten(0, lead),
            found.log_ratio.sum(1).unflatten(0, lead),
        )

    def encode(
        self, images: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means and log-variances (B, 1, D) on the path of the means: of each group given the means
        of those above."""
        noise = images.new_zeros(len(images), sum(self._sizes(images.shape)))
        taps = self.encoder(self._shown(images, mask))
        _, found = self._down(noise, images.shape, labels, taps=taps)
        return found.mean.unsqueeze(1), found.log_variance.unsqueeze(1)

    def decode(
        self,
        z: Tensor,
        image_size: tuple[int, int],
        labels: Tensor | None = None,
        levels: int | None = None,
    ) -> Tensor:
        """z (B, 1, D) of the top `levels` levels (None: all), the others at their prior's means ->
        float32 parameters of p(x|z) for images of size (H, W)."""
        count = self.num_levels if levels is None else levels
        given = sum(self._sizes(image_size)[:count])
        value = F.pad(z[:, 0, :given], (0, z.shape[2] - given))
        return self._down(value, image_size, labels, num_given=count)[0]

    def from_prior(
        self,
        noise: Tensor,
        image_size: tuple[int, int],
        labels: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
    ) -> Tensor:
        """Draws z (B, 1, D) of the prior from normal noise; a temperature of all levels, or of each
        from the top, scales the standard deviations."""
        parts = noise[:, 0].split(self._sizes(image_size), 1)
        factors = temperature if isinstance(temperature, Sequence) else [temperature] * len(parts)
        value = torch.cat([part * t for part, t in zip(parts, factors, strict=True)], 1)
        return self._down(value, image_size, labels)[1].z.unsqueeze(1)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (1, sum(self._sizes((height, width))))

    def _sizes(self, image_size: Sequence[int]) -> list[int]:
        return self.decoder.sizes(*self._top_size(image_size))

    def _top_size(self, image_size: Sequence[int]) -> tuple[int, int]:
        return -(-image_size[-2] // self.stride), -(-image_size[-1] // self.stride)

    def _down(
        self, value: Tensor, image_size: Sequence[int], labels: Tensor | None, **more: Any
    ) -> tuple[Tensor, Found]:
        condition = self._condition(labels, len(value))
        top_size = self._top_size(image_size)
        params, found = self.decoder(value, top_size, condition=condition, **more)
        return params[..., : image_size[-2], : image_size[-1]], found
