"""Every key of the other commands: `evaluate`, `sample`, `pack` and the rest.

Dataclasses as in `vae_dist.config.schema`, filled by `vae_dist.config.load`; the rules
between their keys are in `vae_dist.config.checks`. No torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vae_dist.config.keys import knob


@dataclass
class CheckpointCommand:
    """Which weights of which run."""

    run: str = knob("???", "run folder, for example runs/mnist")
    checkpoint: str = knob("latest", "latest, best, or a step number", form="latest best INDEX")
    weights: Literal["ema", "model"] = knob("ema", "averaged weights, or those of the last step")


@dataclass
class RunCommand(CheckpointCommand):
    """Keys that every command takes that runs a model."""

    device: Literal["auto", "cpu"] = knob("auto", "auto: the accelerator if there is one")


@dataclass
class PriorCommand(RunCommand):
    """Keys of the commands that draw from a prior."""

    seed: int = knob(0, "seed of the draws", ge=0, le=2**63 - 1)
    prior: str = knob(
        "normal",
        "normal: N(0, I); gmm:K[:full|:diagonal]: K Gaussians fitted to vector latents of training "
        "images (covariance full up to 64 latents)",
        form="PRIOR",
    )
    prior_images: int = knob(50_000, "that gmm:K is fitted to (0: all)", ge=0, when="prior!=normal")


@dataclass
class TiledCommand(RunCommand):
    """Keys of the commands that take images of any size."""

    tile: int = knob(0, "side of overlapping tiles for larger images, pixels (0: whole)", ge=0)


@dataclass
class SampleCommand(PriorCommand):
    num_images: int = knob(64, "images to draw from the prior", ge=1)
    label: Any = knob(
        "auto", "a class; all: a row for each; auto: drawn", form="auto all none INDEX"
    )
    out: str = knob("samples.png", "PNG grid to write; a name without .png: a folder of images")
    temperature: Any = knob(
        1.0, "spread of the draws, or [T, ...] of each level of a ladder", form="NUMBER NUMBERS"
    )
    compare: bool = knob(False, "draws of N(0, I) left, of the mixture right", when="prior!=normal")
    resolution: Any = knob("trained", "trained, N or [H, W], pixels", form="trained SIZE")
    batch_size: int = knob(256, "images per forward", ge=1)


@dataclass
class ReconstructCommand(TiledCommand):
    data: Any = knob("", "shards of images (default: the run's validation shards)", form="PATHS")
    num_images: int = knob(32, "images to reconstruct, from the first on", ge=1)
    levels: int = knob(0, "latents of so many levels of a ladder, from the top (0: all)", ge=0)
    out: str = knob("reconstructions.png", "PNG grid to write: inputs above their reconstructions")
    batch_size: int = knob(256, "images per forward", ge=1)


@dataclass
class ImputeCommand(RunCommand):
    seed: int = knob(0, "seed of the draws", ge=0, le=2**63 - 1)
    data: Any = knob("", "shards, or folder of pictures (default: validation shards)", form="PATHS")
    mask: Literal["auto", "member", "alpha", "nan", "random", "rectangle", "half"] = knob(
        "auto", "as data.mask; auto: as in training, in a folder as its files say"
    )
    mask_fraction: float = knob(0.5, "part of the pixels", ge=0, le=1, when="mask=random|rectangle")
    method: Literal["importance", "single", "gibbs"] = knob(
        "importance", "importance-weighted mean over draws of z, one draw, or pseudo-Gibbs chains"
    )
    samples: int = knob(1000, "draws of z, or steps of a chain", ge=2, when="method!=single")
    draws: int = knob(4, "draws to show for each image; gibbs: chains", ge=1)
    num_images: int = knob(16, "images to fill, from the first on", ge=1)
    out: str = knob("imputed", "folder to write: a picture of all, and a folder for each image")
    batch_size: int = knob(256, "latents per forward", ge=1)


@dataclass
class EvaluateCommand(PriorCommand):
    data: Any = knob("", "shards to evaluate (default: the run's validation shards)", form="PATHS")
    max_images: int = knob(0, "images to evaluate, from the first on (0: all)", ge=0)
    samples: int = knob(0, "draws of q(z|x) for importance-sampled log p(x) (0: leave out)", ge=0)
    chunk: int = knob(0, "images x draws of a forward (0: by size)", ge=0, when="samples!=0")
    metrics: Any = knob(
        "",
        "words with commas: psnr, ssim, ms_ssim, lpips, lpips_alex, rfid, fid; latents: viv, lnc, "
        "sec and lattice",
        form="METRICS",
    )
    latents: Any = knob(
        "", "shards that encode wrote: viv, lnc and sec of these, not of data", form="PATHS"
    )
    metric_weights: str = knob("", "folder of weights of lpips, rfid, fid (default: torch.hub's)")
    max_skipped_fraction: Any = knob(
        "trained", "of damaged images; trained: as the run's", form="trained NUMBER", le=1
    )
    out: str = knob("", "JSON file to write (default: in the run folder, results*.json)")
    batch_size: int = knob(256, "images per forward of one process", ge=1)
    threads: int = knob(0, "CPU threads of one process (0: cores / processes)", ge=0)


@dataclass
class ExportCommand(CheckpointCommand):
    out: str = knob("???", "folder to write")
    format: Literal["diffusers", "flux2", "safetensors"] = knob(
        "diffusers",
        "folder for AutoencoderKL.from_pretrained or AutoencoderKLFlux2, or one file of any model",
    )
    normalization: Literal["channel", "scalar"] = knob(
        "channel",
        "latents_mean and latents_std of each channel (SDXL), or scaling_factor and shift_factor",
        when="format=diffusers",
    )
    push: str = knob("", "repository of the Hugging Face Hub to upload it to: OWNER/NAME")


LATENTS, OF_FEATURES = "run!=", "features!="


@dataclass
class EncodeCommand(TiledCommand):
    run: str = knob("", "run folder whose latents are written, for example runs/photos64_kl_f4")
    features: str = knob(
        "", "instead, vision model whose features are: a folder, or OWNER/NAME on the hub"
    )
    seed: int = knob(0, "seed of the draws", ge=0, le=2**63 - 1, when="content=sample")
    data: Any = knob("???", "shards of images, as data.train of a run", form="PATHS")
    out: str = knob("???", "folder to write: shards, their index, latents.json")
    content: Literal["moments", "mean", "sample"] = knob(
        "moments", "of q(z|x): mean and log-variance, the mean, or one draw", when=LATENTS
    )
    dtype: Literal["fp16", "bf16", "fp32"] = knob("fp16", "type of the latents", when=LATENTS)
    flip: bool = knob(False, "store the latents of the mirrored images too", when=LATENTS)
    resolution: Any = knob(
        "trained", "or native (as is trained with features=), pixels", form="trained native SIZE"
    )
    image_key: str = knob("", "which of several images, as data.image_key", when=OF_FEATURES)
    background: Literal["none", "white", "black"] = knob(
        "none", "colour behind transparent pixels, as data.background", when=OF_FEATURES
    )
    keep_images: bool = knob(False, "keep the images, as all other members", when=LATENTS)
    shard_mb: float = knob(64.0, "bytes of a shard, megabytes, about", gt=0)
    max_skipped_fraction: float = knob(0.01, "largest part of damaged images", ge=0, le=1)
    precision: Literal["no", "bf16"] = knob("no", "autocast, on accelerators", when=LATENTS)
    batch_size: int = knob(32, "images per forward of one process", ge=1)
    threads: int = knob(0, "CPU threads of one process (0: cores / processes)", ge=0)


@dataclass
class DecodeCommand(TiledCommand):
    data: Any = knob("???", "shards of latents that vae_dist.encode wrote", form="PATHS")
    num_images: int = knob(64, "images to decode, from the first on", ge=1)
    out: str = knob("decoded.png", "PNG grid to write; a name without .png: a folder of images")
    batch_size: int = knob(32, "images per forward", ge=1)


@dataclass
class IndexCommand:
    data: Any = knob("???", "folder of *.tar, brace pattern, or list of these", form="PATHS")
    out: str = knob("", "folder for the index of shards that lie elsewhere (URLs, pipes)")
    overwrite: bool = knob(False, "index shards again that have an index already")
    verify: bool = knob(False, "decode every sample; report damage, double keys and image sizes")
    max_pixels: int = knob(2**26, "verify: images with more pixels are damage", ge=1)
    image_key: str = knob("", "verify: which of several images of a sample, as data.image_key")


@dataclass
class PackCommand:
    source: Any = knob(
        "???",
        "folder of pictures or archives, archive, pattern or list of these, MNIST files, "
        "CelebA folder, parquet files, hf://datasets/OWNER/NAME, mnist or cifar10",
        form="PATHS",
    )
    out: str = knob("???", "folder to write: OUT/train, OUT/validation, OUT/test")
    labels: str = knob("", "CSV file with the columns path, label and, if wanted, split")
    label_column: str = knob("", "column of labels= or of parquet files that is the class")
    image_column: str = knob("", "column of parquet files that holds the pictures")
    image_key: str = knob("", "which of several images of a sample: jpg, depth.png, npy")
    validation: float = knob(0.05, "part (below 1) or number set aside, if there is none", ge=0)
    size: Any = knob(0, "0: as they are; N: shorter side, pixels; [H, W]: cropped from the centre")
    format: Literal["keep", "png", "jpg", "webp"] = knob("keep", "keep: byte for byte if unchanged")
    quality: int = knob(95, "of JPEG and WebP that is written, 1 to 100", ge=1, le=100)
    background: Literal["none", "white", "black"] = knob("none", "colour behind transparent pixels")
    max_pixels: int = knob(2**26, "pictures with more pixels are left out", ge=1)
    max_skipped_fraction: float = knob(0.01, "largest part of damaged pictures", ge=0, le=1)
    shard_mb: float = knob(256.0, "bytes of a shard, megabytes", gt=0)
    shard_range: str = knob("0/1", "i/n: write the shards k with k mod n = i, for job arrays")
    shuffle: bool = knob(True, "write the pictures in an order drawn from the seed")
    seed: int = knob(0, "seed of order and validation pictures", ge=0, le=2**63 - 1)
    workers: int = knob(0, "processes (0: one for each core)", ge=0)


@dataclass
class ReportCommand:
    run: str = knob("???", "run folder, or several: runs/a,runs/b")
    out: str = knob("", "HTML file to write (default: report.html in the run folder)")


@dataclass
class DashboardCommand:
    project: str = knob("vae_dist", "W&B project")
    entity: str = knob("", "W&B team or user (default: yours)")
    name: str = knob("vae_dist", "name of the saved view")
