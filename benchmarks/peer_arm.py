"""The peers' side of benchmarks/autoencoder.py and benchmarks/peers.py, in the peers' environment.

    PEERS_PYTHON -m benchmarks.peer_arm OPTIONS.json

In: a JSON file of options, with the paths of uint8 arrays (N, C, H, W): images to train on and
held-out ones. Out: turns as benchmarks/turns.py has them; at the end what the caller judges, as an
.npy.

    diffusers  AutoencoderKL in a plain loop, L2 + kl_weight * KL, fused AdamW, averaged weights;
               writes reconstructions of the held-out images from E[z|x], uint8
    pythae     its VAE (dense, or with its convolutional MNIST benchmark's networks) under its own
               trainer, binary cross-entropy; writes -ELBO of each held-out image in nats, float64
"""

from __future__ import annotations

import copy
import ctypes
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.turns import Finished, Turn

Options = dict[str, Any]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# diffusers


def autoencoder(options: Options) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    levels = len(options["channels"])
    return AutoencoderKL(
        in_channels=options["image_channels"],
        out_channels=options["image_channels"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(options["channels"]),
        layers_per_block=options["blocks"],
        latent_channels=options["latent_channels"],
        norm_num_groups=options["norm_groups"],
        mid_block_add_attention=options["attention"],
    )


class PlainLoop:
    """What a user of diffusers would write, with every option that ours gets."""

    def __init__(self, options: Options, model: torch.nn.Module) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        memory = torch.channels_last if options["channels_last"] else torch.contiguous_format
        self.model = model.to(self.device, memory_format=memory)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        wrap = torch.compile if options["compile"] else lambda function: function
        self.encode, self.decode = wrap(self.model.encode), wrap(self.model.decode)
        self.images = torch.from_numpy(np.load(options["images"], mmap_mode="r"))
        self.parameters = list(self.model.parameters())
        decayed = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": options["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=options["lr"],
            betas=tuple(options["betas"]),
            eps=options["eps"],
            fused=True,
        )
        self.order = np.random.default_rng(options["seed"])
        self.memory = memory
        self.step = 0

    def one(self) -> None:
        options = self.options
        places = self.order.integers(len(self.images), size=options["batch_size"])
        batch = self.images[np.sort(places)].to(self.device)
        images = batch.float().div_(127.5).sub_(1.0).contiguous(memory_format=self.memory)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options["precision"])
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            posterior = self.encode(images).latent_dist
            output = self.decode(posterior.sample()).sample
        loss = torch.nn.functional.mse_loss(output.float(), images)
        loss = loss + options["kl_weight"] * posterior.kl().float().mean() / images[0].numel()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = options["lr"] * min(1.0, (self.step + 1) / options["warmup_steps"])
        if options["clip"]:
            torch.nn.utils.clip_grad_norm_(self.parameters, options["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(options["ema_decay"], (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages = list(self.average.parameters())
            torch._foreach_lerp_(averages, self.parameters, 1 - decay)
        self.step += 1

    @torch.inference_mode()
    def reconstructions(self, images: np.ndarray) -> np.ndarray:
        parts = []
        for first in range(0, len(images), 32):
            batch = torch.from_numpy(images[first : first + 32]).to(self.device)
            z = self.average.encode(batch.float() / 127.5 - 1.0).latent_dist.mode()
            output = self.average.decode(z).sample
            parts.append(((output + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy())
        return np.concatenate(parts)


def run_diffusers(options: Options) -> None:
    import diffusers

    torch.manual_seed(options["seed"])
    loop = PlainLoop(options, autoencoder(options))
    turn = Turn(num_images_per_step=options["batch_size"])
    turn.ready(
        diffusers=diffusers.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=loop.device.type,
        parameters=sum(p.numel() for p in loop.parameters),
        loss=f"mse + {options['kl_weight']:g} kl / values",
        **{key: options[key] for key in SHOWN},
    )
    try:
        while True:
            turn.before_step(synchronize)
            loop.one()
    except Finished as finished:
        if finished.path:
            held_out = np.load(options["held_out"])
            np.save(finished.path, loop.reconstructions(held_out))


SHOWN = (
    "channels",
    "blocks",
    "latent_channels",
    "batch_size",
    "precision",
    "lr",
    "betas",
    "weight_decay",
    "warmup_steps",
    "clip",
    "ema_decay",
    "compile",
    "channels_last",
)


# pythae


def run_pythae(options: Options) -> None:
    from pythae.data.datasets import BaseDataset, DatasetOutput
    from pythae.models import VAE, VAEConfig
    from pythae.models.nn.benchmarks.mnist import Decoder_Conv_AE_MNIST, Encoder_Conv_VAE_MNIST
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Binarised(BaseDataset):
        """Digits, black or white by their grey level, drawn anew at each use."""

        def __getitem__(self, index: int) -> Any:
            image = self.data[index]
            drawn = (torch.rand_like(image) < image).float()
            return DatasetOutput(data=drawn, labels=self.labels[index])

    torch.manual_seed(options["seed"])
    config = VAEConfig(
        input_dim=(1, 28, 28), latent_dim=options["latent"], reconstruction_loss="bce"
    )
    networks = {}
    if options["kind"] == "pythae_conv":
        networks = {
            "encoder": Encoder_Conv_VAE_MNIST(config),
            "decoder": Decoder_Conv_AE_MNIST(config),
        }
    model = VAE(config, **networks)
    digits = torch.from_numpy(np.load(options["images"])).float() / 255
    turn = Turn(num_images_per_step=options["batch_size"])

    class Turns(TrainingCallback):
        def on_train_step_end(self, training_config: Any, **kwargs: Any) -> None:
            turn.before_step()

    with tempfile.TemporaryDirectory(prefix="pythae.") as folder:
        training = BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=options["batch_size"],
            num_epochs=10_000,
            learning_rate=options["lr"],
            seed=options["seed"],
            no_cuda=not torch.cuda.is_available(),
        )
        trainer = BaseTrainer(
            model,
            train_dataset=Binarised(digits, torch.zeros(len(digits))),
            training_config=training,
            callbacks=[Turns()],
        )
        turn.ready(
            pythae="0.1.2",
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            model=options["kind"],
            parameters=sum(p.numel() for p in model.parameters()),
            latent=options["latent"],
            batch_size=options["batch_size"],
            lr=options["lr"],
            precision="float32, as pythae has it",
            loss="bce + kl, dynamic binarisation",
        )
        try:
            trainer.train()
        except Finished as finished:
            if finished.path:
                np.save(finished.path, neg_elbo_nats(model, np.load(options["held_out"])))


@torch.inference_mode()
def neg_elbo_nats(model: Any, digits: np.ndarray) -> np.ndarray:
    """One draw of z for each binarised digit (N, 1, 28, 28) of 0 and 1."""
    model.eval()
    device = next(model.parameters()).device
    values = []
    for first in range(0, len(digits), 100):
        x = torch.from_numpy(digits[first : first + 100]).float().to(device)
        encoded = model.encoder(x)
        mean, log_variance = encoded.embedding, encoded.log_covariance
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        probability = model.decoder(z)["reconstruction"].reshape(len(x), -1).double()
        probability = probability.clamp(1e-7, 1 - 1e-7)
        flat = x.reshape(len(x), -1).double()
        likelihood = flat * probability.log() + (1 - flat) * (1 - probability).log()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).double().sum(1)
        values.append((kl - likelihood.sum(1)).cpu().numpy())
    found = np.concatenate(values)
    assert math.isfinite(float(found.sum()))
    return found


def main() -> int:
    options = json.loads(Path(sys.argv[1]).read_text())
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if not torch.cuda.is_available():
        libc = ctypes.CDLL(None)
        for parameter, value in ((-1, -1), (-4, 0)):  # keep freed memory, as our arms do
            libc.mallopt(parameter, value)
    run = run_diffusers if options["kind"] == "diffusers" else run_pythae
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
