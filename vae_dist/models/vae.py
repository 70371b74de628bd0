"""The VAE: towers, posterior and likelihood behind one forward.

    images (B, C, H, W) in [-1, 1], noise (B, *latent_shape) ~ N(0, I)
    -> log p(x|z) and KL(q(z|x) || p(z)) in nats per image, z = mean + sigma * noise

    ELBO = log_likelihood - kl.sum(1)

Labels of a conditional model condition both towers, q(z|x, y) and p(x|z, y): int64 (B,), -1 for
none, which has an embedding of its own; p(z) stays N(0, I).

Where the `mask` (B, 1, H, W) of incomplete images is not 1, a pixel is missing: the encoder sees 0
(mid-grey) there and, if the model was built for it, the mask; the likelihood counts observed pixels
only, which makes the ELBO a bound of log p(x_observed) (MIWAE, Mattei and Frellsen 2019).

Noise (B, K, *latent_shape) asks for K draws of z per image: the encoder runs once for each image,
the decoder for each draw. Noise is an argument, so that draws are functions of (seed, step, slot)
and a compiled graph stays pure.

`latent_noise` is added to z before it is decoded, and the sum multiplied by `channel_mask`;
`half_size` asks for log p(x'|z') of image and latent averaged over squares of 2x2 (Kouzelis et al.
2025, EQ-VAE), (B,), nats, as a second output. All are for one draw of z. Sizes that the stride f
does not divide are padded by replication on the right and bottom; the decoder's outputs are cropped
before the likelihood sees them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_dist.models.blocks import LABEL_DIMS, in_float32
from vae_dist.models.latent import diagonal_gaussian, kl_to_standard_normal, sample_posterior
from vae_dist.models.likelihoods import Likelihood
from vae_dist.models.towers import Decoder, DenseDecoder, DenseEncoder, Encoder

NO_LABEL = -1


class VAEOutput(NamedTuple):
    """Plain tensors, float32, so a pytree for DDP, FSDP and compile."""

    log_likelihood: Tensor  # (B,) or (B, K): log p(x|z), nats per image
    kl: Tensor  # (B, U) KL(q || p) of each unit of the latent, nats per image
    mean: Tensor  # (B, *latent_shape) of q(z|x)
    log_variance: Tensor  # (B, *latent_shape) of q(z|x), bounded
    z: Tensor  # of the shape of the noise
    params: Tensor  # (B, [K,] likelihood.num_params, H, W) decoder outputs
    log_ratio: Tensor | None = None  # (B, [K]) log q - log p at z; None: follows from the moments
    projected: Tensor | None = None  # (B, width, h, w) of z, for alignment with a vision model


class VAE(nn.Module):
    """`encoder` and `decoder` agree on the latent; `quant_conv` and `post_quant_conv` are the 1x1
    layers around a spatial latent, None for a vector one or where `shortcuts` lead to and from the
    latent. `image_size` is the (H, W) that a vector latent is bound to, None where any size will
    do. `sees_mask`: the encoder's last input is the mask."""

    def __init__(
        self,
        encoder: Encoder | DenseEncoder,
        decoder: Decoder | DenseDecoder,
        likelihood: Likelihood,
        *,
        latent_channels: int,
        stride: int,
        image_size: tuple[int, int] | None,
        num_classes: int = 0,
        sees_mask: bool = False,
        shortcuts: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.latent_channels, self.stride, self.image_size = latent_channels, stride, image_size
        self.num_classes = num_classes  # 0: labels are ignored
        self.sees_mask = sees_mask
        # of a ladder of latents; 0: there is none, the units of z are independent
        self.num_levels = len(getattr(decoder, "levels", ()))
        self.quant_conv = self.post_quant_conv = None
        if image_size is None and not shortcuts:
            self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        # the last row is "no label"; drawn last, so that the other weights are those of a model
        # without labels
        self.label_embedding = nn.Embedding(num_classes + 1, LABEL_DIMS) if num_classes else None
        self.projection: nn.Module | None = None  # of z to features, in training with alignment

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        latent_noise: Tensor | None = None,
        channel_mask: Tensor | None = None,
        half_size: bool = False,
    ) -> VAEOutput | tuple[VAEOutput, Tensor]:
        mean, log_variance = self.encode(images, labels, mask)
        size = images.shape[-2], images.shape[-1]
        lead = noise.shape[: noise.ndim - mean.ndim + 1]  # (B,) or (B, K)
        draws = lead.numel() // len(images)
        z = sample_posterior(mean, log_variance, noise)  # (B, *latent) or (B, K, *latent)
        seen = z.flatten(0, len(lead) - 1)  # (B K, *latent)
        seen = seen if latent_noise is None else seen + latent_noise
        seen = seen if channel_mask is None else seen * channel_mask
        params = self.decode(seen, size, each(labels, draws))
        log_likelihood = self.likelihood.log_prob(params, each(images, draws), each(mask, draws))
        output = VAEOutput(
            log_likelihood.unflatten(0, lead),
            kl_to_standard_normal(mean, log_variance),
            mean,
            log_variance,
            z,
            params.unflatten(0, lead),
            projected=None if self.projection is None else in_float32(self.projection, z),
        )
        return (output, self._at_half_size(images, z, labels)) if half_size else output

    def _at_half_size(self, images: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        """log p(x'|z') of whole squares of 2x2 latent positions and the pixels that they cover."""
        rows, columns = (side // self.stride // 2 * 2 for side in images.shape[-2:])
        pixels = images[..., : rows * self.stride, : columns * self.stride]
        small, small_z = F.avg_pool2d(pixels, 2), F.avg_pool2d(z[..., :rows, :columns], 2)
        params = self.decode(small_z, (small.shape[-2], small.shape[-1]), labels)
        return self.likelihood.log_prob(params, small)

    def encode(
        self, images: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each float32 (B, *latent_shape)."""
        moments = self.encoder(self._shown(images, mask), self._condition(labels, len(images)))
        if self.quant_conv is not None:
            moments = in_float32(self.quant_conv, moments)
        return diagonal_gaussian(moments)

    def _shown(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """What the encoder sees: missing pixels grey, the mask, sizes replicated to multiples."""
        if mask is not None:
            images = torch.where(mask > 0, images, 0.0)
        if self.sees_mask:
            seen = torch.ones_like(images[:, :1]) if mask is None else mask.to(images.dtype)
            images = torch.cat([images, seen], 1)
        # what is replicated is as observed as the pixel that it repeats
        bottom, right = -images.shape[-2] % self.stride, -images.shape[-1] % self.stride
        if not (bottom or right):
            return images
        return F.pad(images, (0, right, 0, bottom), mode="replicate")

    def decode(
        self,
        z: Tensor,
        image_size: tuple[int, int],
        labels: Tensor | None = None,
        levels: int | None = None,
    ) -> Tensor:
        """z (B, *latent_shape) -> float32 parameters of p(x|z) for images of size (H, W); `levels`
        is for a ladder."""
        condition = self._condition(labels, len(z))
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        params: Tensor = self.decoder(z, condition)
        return params[:, :, : image_size[0], : image_size[1]]

    def _condition(self, labels: Tensor | None, batch: int) -> Tensor | None:
        """Embeddings (B, E) of the labels, None where the model has none."""
        table = self.label_embedding
        if table is None:
            return None
        if labels is None:
            labels = torch.full((batch,), NO_LABEL, device=table.weight.device)
        embedded: Tensor = table(torch.where(labels == NO_LABEL, self.num_classes, labels))
        return embedded

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's latent, for images of height x width pixels. Raises ValueError where
        the model does not take these."""
        if self.image_size is None:
            rows, columns = math.ceil(height / self.stride), math.ceil(width / self.stride)
            return (self.latent_channels, rows, columns)
        if (height, width) != self.image_size:
            raise ValueError(
                f"images of {height}x{width} pixels, but a model with model.latent=vector works at "
                f"the {self.image_size[0]}x{self.image_size[1]} that it was built for; train with "
                "model.latent=spatial to use other sizes"
            )
        return (self.latent_channels,)


def each(tensor: Any, draws: int) -> Any:
    """(B, ...) -> (B K, ...): once for each draw of an image; None stays None."""
    return tensor if tensor is None or draws == 1 else tensor.repeat_interleave(draws, 0)
