"""Every knob of a training run: its default, its unit, and whether it may change at a resume.

The classes below are OmegaConf structured configs; `vae_dist.config.load` fills them from YAML and
the command line, `vae_dist.config.checks` holds the rules between keys. Defaults live here alone.
No torch is imported, so that `--help` and config errors come at once.

A knob is `neutral` when another value gives the same numbers (how often to log, where to write,
how much memory to use): such a knob may differ when a run is resumed. All others may not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def knob(default: Any, help: str, *, neutral: bool = False) -> Any:
    """A dataclass field with its one-line description (with unit), for `--help` and for resume."""
    metadata = {"help": help, "neutral": neutral}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    return field(default_factory=cls)


@dataclass
class DataConfig:
    # neutral: a checkpoint knows the shards by their fingerprint, wherever they lie
    train: Any = knob(
        "???",
        "training shards: folder of *.tar, brace pattern, URL, or list of these; several data sets "
        "mixed: [{path: SHARDS, weight: NUMBER}, ...]",
        neutral=True,
    )
    validation: Any = knob("???", "validation shards, given as data.train is", neutral=True)
    bundled: Literal["none", "digits"] = knob(
        "none", "digits: write the shards from the digits that ship with vae_dist if missing"
    )
    channels: int = knob(3, "channels of an image (1 grey, 3 RGB)")
    resolution: Any = knob(
        "native", "N or [H, W]: resize and crop, pixels; native: images share a size"
    )
    crop: Literal["center", "random"] = knob("center", "where training images are cropped")
    flip: bool = knob(False, "mirror training images left to right with probability 1/2")
    dequantize: bool = knob(True, "add uniform noise of one level (gaussian likelihood only)")
    slots: int = knob(
        0,
        "parts of a batch that stay together; the number of processes divides it (0: automatic)",
    )
    window: Any = knob(
        "auto", "samples that are read and shuffled together in one lane (auto: up to 32)"
    )
    window_bytes: int = knob(
        4 * 2**30, "bytes over all processes that window=auto may hold at once"
    )
    workers: int = knob(1, "loader processes of each rank (0: load in the main one)", neutral=True)
    max_skipped_fraction: float = knob(
        0.01, "part of the samples that may be unreadable before the run fails", neutral=True
    )
    max_pixels: int = knob(2**26, "images with more pixels are refused before decoding")


@dataclass
class ModelConfig:
    latent: Literal["spatial", "vector"] = knob(
        "spatial", "spatial: C x H/f x W/f, any image size; vector: one vector, fixed image size"
    )
    latent_channels: int = knob(4, "channels of a spatial latent, dimensions of a vector one")
    channels: list[int] = knob(
        [64, 128, 256], "width of each level; each level after the first halves the resolution"
    )
    patch: int = knob(
        1, "squares of patch x patch pixels are folded into channels before the first level"
    )
    blocks: int = knob(2, "residual blocks of a level in the encoder; the decoder has one more")
    attention: bool = knob(True, "self-attention in the middle of both towers")
    norm_groups: int = knob(32, "groups of GroupNorm; must divide every width")


@dataclass
class LikelihoodConfig:
    kind: Literal["gaussian", "bernoulli"] = knob(
        "gaussian", "p(x|z); bernoulli: dynamically binarised grey images"
    )
    variance: Literal["fixed", "shared", "per_pixel"] = knob(
        "shared", "gaussian: fixed sigma, one learned sigma, or sigma_g(z) of every pixel"
    )
    sigma: float = knob(0.1, "gaussian, variance=fixed: standard deviation; images span [-1, 1]")
    min_sigma: float = knob(
        1 / 256, "gaussian, learned variance: floor of sigma (1/256: half a level of 8 bits)"
    )


@dataclass
class ObjectiveConfig:
    beta: float = knob(1.0, "weight of the rate KL(q(z|x) || p(z)) in the loss; 1 is the ELBO")
    beta_warmup_steps: int = knob(0, "steps over which beta rises linearly from 0")


@dataclass
class OptimizerConfig:
    lr: float = knob(2e-4, "peak learning rate of AdamW")
    warmup_steps: int = knob(100, "steps of linear learning-rate warm-up")
    schedule: Literal["cosine", "constant"] = knob("cosine", "learning rate after the warm-up")
    final_lr_fraction: float = knob(0.0, "cosine: learning rate at the last step, part of lr")
    betas: list[float] = knob([0.9, 0.999], "decay rates of Adam's two moments")
    eps: float = knob(1e-8, "added to the denominator of Adam")
    weight_decay: float = knob(0.01, "decoupled weight decay of matrices and kernels")
    clip_grad_norm: float = knob(
        0.0, "largest norm of the gradient of the loss (nats per image); 0: no clipping"
    )


@dataclass
class TrainingConfig:
    steps: int = knob(10_000, "optimizer steps of the whole run", neutral=True)
    batch_size: int = knob(256, "images per optimizer step, over all processes")
    microbatch_size: int = knob(
        0,
        "images per forward of one process (0: its whole share); changes memory, not results",
        neutral=True,
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = knob(
        "auto", "autocast of the forward; auto: bf16 on an accelerator, no (float32) on CPU"
    )
    ema_decay: float = knob(0.999, "decay per step of the averaged weights")
    max_consecutive_nonfinite: int = knob(
        20,
        "steps in a row whose gradient is skipped (not finite, or a spike) before the run fails",
        neutral=True,
    )
    spike_factor: float = knob(
        0.0, "skip a gradient of this many times the 0.9 quantile of recent norms (0: never)"
    )
    checksum_every: int = knob(
        1000, "steps between comparisons of the weights across ranks (0: never)", neutral=True
    )


@dataclass
class EvaluationConfig:
    every: int = knob(1000, "steps between evaluations (0: only at the end)", neutral=True)
    batch_size: int = knob(256, "images per forward of one process", neutral=True)


@dataclass
class CheckpointConfig:
    every: int = knob(1000, "steps between checkpoints (0: only at the end)", neutral=True)
    keep_last: int = knob(2, "newest checkpoints that are kept", neutral=True)
    keep_best: bool = knob(
        True, "also keep the one of the lowest eval/neg_elbo_nats, named best", neutral=True
    )


@dataclass
class LogConfig:
    every: int = knob(50, "steps between rows of log.jsonl, the console and W&B", neutral=True)
    images_every: int = knob(0, "steps between picture grids (0: at each evaluation)", neutral=True)
    num_images: int = knob(64, "images of a picture grid", neutral=True)
    tensorboard: bool = knob(
        False, "also write TensorBoard files (extra tensorboard) to RUN/tensorboard", neutral=True
    )


@dataclass
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = knob(
        "auto", "auto: online when logged in and reachable, else offline", neutral=True
    )
    project: str = knob("vae_dist", "W&B project", neutral=True)
    entity: str | None = knob(None, "W&B team or user (none: your default)", neutral=True)
    group: str | None = knob(None, "W&B group of this run", neutral=True)
    tags: list[str] = knob([], "W&B tags of this run", neutral=True)
    artifacts: bool = knob(
        False, "upload the last checkpoint and pictures as W&B artifacts at the end", neutral=True
    )
    finish_timeout_s: int = knob(
        60, "longest wait for W&B at the end, seconds; the rest stays on disk", neutral=True
    )


@dataclass
class RuntimeConfig:
    device: Literal["auto", "cpu"] = knob(
        "auto", "auto: the accelerator if there is one; cpu: never", neutral=True
    )
    threads: int = knob(
        0, "CPU threads of one process (0: this machine's cores / its processes)", neutral=True
    )
    timeout_s: int = knob(600, "seconds that a rank waits for the others", neutral=True)
    parallel: Literal["ddp", "fsdp"] = knob(
        "ddp", "ddp: each process holds the model; fsdp: it is cut over the processes", neutral=True
    )


@dataclass
class ResumeConfig:
    allow_changes: bool = knob(
        False,
        "go on although the config differs from the run's in ways that change numbers",
        neutral=True,
    )


@dataclass
class TrainConfig:
    """What `vae_dist.train` reads, from schema defaults < base < file < command line."""

    config: str = knob("???", "name of a shipped config, or a path to a YAML file", neutral=True)
    run: str = knob(
        "", "run folder (default: runs/<config name>); all nodes must see it", neutral=True
    )
    init_from: str = knob(
        "", "weights that a run begins with: run folder, checkpoint folder or .safetensors file"
    )
    dry_run: bool = knob(False, "check everything, print the plan, train nothing", neutral=True)
    seed: int = knob(0, "every random draw is a function of this seed and its position")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    likelihood: LikelihoodConfig = section(LikelihoodConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    training: TrainingConfig = section(TrainingConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    wandb: WandbConfig = section(WandbConfig)
    runtime: RuntimeConfig = section(RuntimeConfig)
    resume: ResumeConfig = section(ResumeConfig)


@dataclass
class RunCommand:
    """Keys that every command on a run folder takes."""

    run: str = knob("???", "run folder, for example runs/mnist")
    checkpoint: str = knob("latest", "latest, best, or a step number")
    weights: Literal["ema", "model"] = knob("ema", "averaged weights, or those of the last step")
    device: Literal["auto", "cpu"] = knob("auto", "auto: the accelerator if there is one")
    seed: int = knob(0, "seed of the draws")


@dataclass
class SampleCommand(RunCommand):
    num_images: int = knob(64, "images to draw from the prior")
    out: str = knob("samples.png", "PNG grid to write; a name without .png: a folder of PNGs")
    temperature: float = knob(1.0, "standard deviation of the prior draws")
    resolution: Any = knob("trained", "trained, N or [H, W] (spatial latents only), pixels")
    batch_size: int = knob(256, "images per forward")


@dataclass
class ReconstructCommand(RunCommand):
    data: Any = knob("", "shards to take images from (default: the run's validation shards)")
    num_images: int = knob(32, "images to reconstruct, from the first on")
    out: str = knob("reconstructions.png", "PNG grid to write: inputs above their reconstructions")
    batch_size: int = knob(256, "images per forward")


@dataclass
class EvaluateCommand(RunCommand):
    data: Any = knob("", "shards to evaluate (default: the run's validation shards)")
    out: str = knob("", "JSON file to write (default: results.json in the run folder)")
    batch_size: int = knob(256, "images per forward of one process")


@dataclass
class IndexCommand:
    data: Any = knob("???", "shards: folder of *.tar, brace pattern, or list of these")
    out: str = knob("", "folder for the index of shards that lie elsewhere (URLs, pipes)")
    overwrite: bool = knob(False, "index shards again that have an index already")
    verify: bool = knob(False, "decode every sample; report damage, double keys and image sizes")
    max_pixels: int = knob(2**26, "verify: images with more pixels are damage")


@dataclass
class PackCommand:
    source: Any = knob(
        "???",
        "folder of pictures, archive or list of archives, MNIST or CIFAR-10 files, CelebA folder, "
        "parquet files, or the word mnist (downloads it)",
    )
    out: str = knob("???", "folder to write: OUT/train, OUT/validation, OUT/test")
    labels: str = knob("", "CSV file with the columns path, label and, if wanted, split")
    validation: float = knob(
        0.05, "part (below 1) or number of training pictures set aside if the source sets none"
    )
    size: Any = knob(0, "0: as they are; N: shorter side, pixels; [H, W]: cropped from the centre")
    format: Literal["keep", "png", "jpg", "webp"] = knob(
        "keep", "keep: byte for byte where nothing has to change"
    )
    quality: int = knob(95, "of pictures that are encoded as JPEG or WebP, 1 to 100")
    background: Literal["none", "white", "black"] = knob(
        "none", "colour behind transparent pixels; none: keep them"
    )
    max_pixels: int = knob(2**26, "pictures with more pixels are left out")
    max_skipped_fraction: float = knob(0.01, "part of the pictures that may be left out as damaged")
    shard_mb: float = knob(256.0, "bytes of a shard, megabytes")
    shard_range: str = knob("0/1", "i/n: write the shards k with k mod n = i, for job arrays")
    shuffle: bool = knob(True, "write the pictures in an order drawn from the seed")
    seed: int = knob(0, "seed of the order and of the choice of validation pictures")
    workers: int = knob(0, "processes (0: one for each core)")


@dataclass
class ReportCommand:
    run: Any = knob("???", "run folder, or several: runs/a,runs/b")
    out: str = knob("", "HTML file to write (default: report.html in the run folder)")
    picture_megabytes: float = knob(1.6, "pictures take at most this many MB of the page")


@dataclass
class DashboardCommand:
    project: str = knob("vae_dist", "W&B project")
    entity: str = knob("", "W&B team or user (default: yours)")
    name: str = knob("vae_dist", "name of the saved view")
