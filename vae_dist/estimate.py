"""What a training step costs, before it is taken: arithmetic and memory, exactly and at once.

In: the resolved config, the size of an image, the device. Out: operations of an image, and the
bytes of a process at the worst moment of its step:

    weights, gradients, Adam's two moments, average; what autograd keeps of the images; what is
    alive beside it at the worst moment; networks that compare pictures in training

Forward and backward are run on abstract tensors (`vae_dist.abstract`), so these are the tensors of
eager execution in this precision on this device. Not in it: what kernels use inside, fragments of
the allocator, the CUDA context, and the second derivatives of adversarial.r1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vae_dist.abstract import Abstract, AbstractTensor
from vae_dist.config.schema import PerceptualConfig, TrainConfig
from vae_dist.models.build import build_vae
from vae_dist.models.discriminator import build_discriminator
from vae_dist.objectives.adversarial import hinge_loss, mean_logits
from vae_dist.objectives.elbo import loss_terms, noise_shape
from vae_dist.objectives.perceptual import PerceptualTerm, distance_of
from vae_dist.training.optimizer import freeze_encoder

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepCost:
    """Of one microbatch of `num_images` images on one process."""

    num_images: int
    forward_flops: float  # products of matrices and convolutions, of one image; of the VAE alone
    step_flops: float  # the same with the backward, and what checkpointing computes again
    state_bytes: int  # weights, gradients, moments, average; a discriminator's, weights of LPIPS
    saved_bytes: int  # kept by autograd between forward and backward
    peak_bytes: int  # of all tensors at the worst moment of the step


def step_cost(
    config: TrainConfig,
    image_size: tuple[int, int],
    device: torch.device,
    *,
    num_images: int,
    share: int = 0,
) -> StepCost:
    """Forward, backward and update of `num_images` images of (H, W) pixels, a microbatch of the
    `share` images of a process. Nothing is computed and no memory taken on `device`; it decides
    what autocast and attention do."""
    distance = distance_of(config.perceptual.kind)
    with torch.device("meta"):
        vae, discriminator = build_vae(config, image_size), None
        if config.adversarial.weight:
            discriminator = build_discriminator(
                config.adversarial, image_channels=config.data.channels, seed=config.seed
            )
    if config.training.train_only == "decoder":
        freeze_encoder(vae)
    channels, latent = config.data.channels, vae.latent_shape(*image_size)
    with Abstract(device) as machine:
        tensors = _made_abstract(vae)
        weight_bytes = machine.live_bytes
        state = {_storage(tensor) for tensor in tensors}
        gradient_bytes = sum(t.numel() * 4 for t in tensors if t.requires_grad)
        average_bytes = sum(p.numel() * 4 for p in vae.parameters())
        images = torch.empty(num_images, channels, *image_size, device=device)
        noise = torch.empty(noise_shape(config.objective, num_images, latent), device=device)
        labels = mask = None
        if config.model.num_classes:
            labels = torch.empty(num_images, dtype=torch.int64, device=device)
        if config.data.mask != "none":
            mask = torch.empty(num_images, 1, *image_size, dtype=torch.uint8, device=device)
        more = {"half_size": True} if config.objective.scale_equivariance else {}
        saved: dict[int, int] = {}  # bytes of each storage

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if (key := _storage(tensor)) not in state:
                assert isinstance(tensor, AbstractTensor)
                saved[key] = tensor.shadow.untyped_storage().nbytes()
            return tensor

        precision = config.training.precision
        autocast = torch.autocast(
            device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast:
                result = vae(images, noise, labels, mask, **more)
            output, half_size = result if more else (result, None)
            loss = loss_terms(output, config.objective, beta=1.0, half_size=half_size).loss_sum
        forward_flops = machine.flops
        networks = _Networks(distance, discriminator, autocast)
        reconstructions = None
        if networks:
            means = vae.likelihood.mean(output.params)
            reconstructions = means.detach().requires_grad_()
            loss = loss + (means * networks.gradient(reconstructions, images)).sum()
            del means
        flops_of_networks = machine.flops - forward_flops
        del result, output, half_size
        loss.backward()
        step_flops = machine.flops - flops_of_networks
        del loss
        if reconstructions is not None:
            networks.learn(images, reconstructions)
    state_bytes = weight_bytes + 3 * gradient_bytes + average_bytes + networks.state_bytes
    peak_bytes = machine.peak_bytes + 2 * gradient_bytes + average_bytes + networks.moment_bytes
    if share > num_images:  # gradients of the microbatches before; the discriminator sees all last
        pictures = share if discriminator is not None else 0
        peak_bytes += gradient_bytes + 2 * pictures * (images.numel() // num_images) * 4
    # the update of the average holds the weights' size once more, when images are gone
    peak_bytes = max(peak_bytes, state_bytes + average_bytes)
    return StepCost(
        num_images=num_images,
        forward_flops=forward_flops / num_images,
        step_flops=step_flops / num_images,
        state_bytes=state_bytes,
        saved_bytes=sum(saved.values()),
        peak_bytes=peak_bytes,
    )


def _made_abstract(module: nn.Module) -> list[Tensor]:
    """Put abstract tensors in the place of a module's own: for good, as what checkpointing computes
    again in the backward reads them too."""
    made: list[Tensor] = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, own in tensors.items():
                if own is not None:
                    made.append(own.detach().requires_grad_(own.requires_grad))
                    tensors[name] = made[-1]  # type: ignore[assignment]
    return made


class _Networks:
    """What compares pictures in the steps that have all of it, as vae_dist.training.picture_terms
    does. Make it under Abstract."""

    def __init__(
        self, distance: nn.Module | None, discriminator: nn.Module | None, autocast: torch.autocast
    ) -> None:
        self._distance, self._discriminator, self._autocast = distance, discriminator, autocast
        weights, self._learned = [], []
        if distance is not None:
            weights = _made_abstract(distance.requires_grad_(False))
        if discriminator is not None:
            self._learned = _made_abstract(discriminator)
        learned_bytes = sum(t.numel() * 4 for t in self._learned)
        self.moment_bytes = 2 * learned_bytes
        self.state_bytes = 4 * learned_bytes + sum(t.numel() * 4 for t in weights)

    def __bool__(self) -> bool:
        return self._distance is not None or self._discriminator is not None

    def gradient(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Of all terms, at reconstructions that are a leaf."""
        total = torch.zeros_like(reconstructions)
        if self._distance is not None:
            term = PerceptualTerm(PerceptualConfig(), self._distance)(reconstructions, images).sum()
            total = torch.autograd.grad(term, reconstructions)[0]
        if self._discriminator is not None:
            self._learn(wanted=False)
            with self._autocast:
                term = -mean_logits(self._discriminator(reconstructions)).sum()
            total = total + torch.autograd.grad(term, reconstructions)[0]
        return total

    def learn(self, images: Tensor, reconstructions: Tensor) -> None:
        """Forward and backward of the discriminator, whose gradients stay."""
        if self._discriminator is None:
            return
        self._learn(wanted=True)
        pictures = torch.cat([images, reconstructions.detach()])
        with self._autocast:
            on_real, on_fake = self._discriminator(pictures).chunk(2)
        hinge_loss(on_real, on_fake).sum().backward()

    def _learn(self, *, wanted: bool) -> None:
        for weight in self._learned:
            weight.requires_grad_(wanted)


def _storage(tensor: torch.Tensor) -> int:
    assert isinstance(tensor, AbstractTensor)
    return tensor.shadow.untyped_storage()._cdata
