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
        "training shards: folder of *.tar, brace pattern, URL, or list of these; with an index "
        "elsewhere: {path: SHARDS, index: FOLDER}; several data sets mixed: "
        "[{path: SHARDS, weight: NUMBER}, ...]",
        neutral=True,
    )
    validation: Any = knob("???", "validation shards, given as data.train is", neutral=True)
    bundled: Literal["none", "digits"] = knob(
        "none", "digits: write the shards from the digits that ship with vae_dist if missing"
    )
    channels: int = knob(3, "channels of an image (1 grey, 3 RGB; any number in .npy and TIFF)")
    label_key: str = knob(
        "cls",
        "cls: the .cls member; else the field of the .json member that is the label, nested ones "
        "with dots, for example attributes.Smiling",
    )
    mask: Literal["none", "member", "alpha", "nan", "random", "rectangle", "half"] = knob(
        "none",
        "pixels that are missing: black in .mask.png, less than half opaque, NaN, or drawn for "
        "each sample and epoch: random ones, a rectangle, half of the image",
    )
    mask_fraction: float = knob(0.5, "mask=random, rectangle: part of the pixels that is missing")
    bits: int = knob(
        8, "bits of a value: 8, 16, 32 (floats in [-1, 1]), or 5 (8-bit files cut to 32 levels)"
    )
    resolution: Any = knob(
        "native",
        "N or [H, W]: resize and crop, pixels; native: as stored; aspect buckets: {area: PIXELS, "
        "multiple: PIXELS, max_aspect: RATIO}",
    )
    crop: Literal["center", "random"] = knob("center", "where training images are cropped")
    flip: bool = knob(False, "mirror training images left to right with probability 1/2")
    dequantize: bool = knob(True, "gaussian, laplace: levels get uniform noise of one level")
    slots: int = knob(
        0,
        "parts of a batch that stay together; the number of processes divides it (0: automatic)",
    )
    window: Any = knob(
        "auto",
        "samples that are read and shuffled together in one lane (auto: up to 32, with aspect "
        "buckets up to 32 slots)",
    )
    window_bytes: int = knob(
        4 * 2**30, "bytes over all processes that window=auto may hold at once"
    )
    cache_bytes: int = knob(
        256 * 2**20,
        "memory of a rank in which the decoded images of a small data set stay, if all have room",
        neutral=True,
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
    arch: Literal["conv", "dense"] = knob(
        "conv", "conv: residual convolutions; dense: the textbook's linear layers, vector latent"
    )
    latent_channels: int = knob(4, "channels of a spatial latent, dimensions of a vector one")
    channels: list[int] = knob(
        [64, 128, 256],
        "width of each level; each level after the first halves the resolution (dense: width of "
        "each hidden layer)",
    )
    patch: int = knob(
        1, "squares of patch x patch pixels are folded into channels before the first level"
    )
    blocks: Any = knob(
        2,
        "residual blocks of a level in the encoder, one number or one for each level; the decoder "
        "has one more",
    )
    dc_shortcuts: bool = knob(
        False,
        "space-to-channel shortcuts around each change of resolution and around a spatial latent "
        "(DC-AE), for strides of 16 and more",
    )
    attention: bool = knob(True, "self-attention in the middle of both towers")
    norm_groups: int = knob(32, "groups of GroupNorm; must divide every width")
    gradient_checkpointing: bool = knob(
        False,
        "keep the inputs of blocks alone and compute their insides again in the backward: less "
        "memory, a third more time",
        neutral=True,
    )
    initial_sigma: float = knob(
        1.0,
        "standard deviation of q(z|x) before training, about; small ones suit an autoencoder whose "
        "objective.beta is far below 1",
    )
    num_classes: int = knob(
        0, "labels 0, ..., N-1 that both towers are told; 0: an unconditional model"
    )
    label_dropout: float = knob(
        0.0, "probability that a training image's label is hidden, so that one model gives both"
    )


@dataclass
class LikelihoodConfig:
    kind: Literal[
        "gaussian", "laplace", "discretized_gaussian", "discretized_logistic_mixture", "bernoulli"
    ] = knob(
        "gaussian",
        "p(x|z): a density (gaussian: squared errors, laplace: absolute ones), probabilities of "
        "levels, or black and white",
    )
    variance: Literal["fixed", "shared", "per_channel", "per_pixel"] = knob(
        "shared",
        "gaussian, laplace, discretized_gaussian: fixed sigma, one learned sigma, one of each "
        "channel, or sigma_g(z) of every pixel",
    )
    sigma: float = knob(0.1, "variance=fixed: standard deviation; images span [-1, 1]")
    min_sigma: float = knob(
        1 / 256, "learned variance: floor of sigma (1/256: half a level of 8 bits)"
    )
    mixtures: int = knob(10, "discretized_logistic_mixture: components of each pixel")
    binarization: Literal["dynamic", "static", "threshold", "soft"] = knob(
        "dynamic",
        "bernoulli: grey levels drawn anew at each use, once for each image, cut at one half, or "
        "kept as targets of a cross-entropy (no likelihood)",
    )


@dataclass
class ObjectiveConfig:
    beta: float = knob(1.0, "weight of the rate KL(q(z|x) || p(z)) in the loss; 1 is the bound")
    beta_warmup_steps: int = knob(0, "steps over which beta rises from 0")
    beta_warmup: Literal["linear", "cosine"] = knob("linear", "shape of that rise")
    beta_cycles: int = knob(
        1, "times that beta rises from 0; it stays up as long as a rise before the next one"
    )
    free_bits: float = knob(
        0.0,
        "nats of each latent unit (dimension of a vector, channel of a spatial latent) that the "
        "loss does not charge, in each image",
    )
    importance_samples: int = knob(
        1, "draws of z for each image: 1 is the ELBO, more the importance-weighted bound"
    )
    gradient: Literal["standard", "doubly_reparameterized"] = knob(
        "standard", "importance_samples > 1: how the encoder's gradient is estimated"
    )
    scale_equivariance: float = knob(
        0.0,
        "weight of -log p(image at half size | z at half size), nats of its values: latents whose "
        "coarse structure is that of the image (0: off)",
    )
    latent_noise: float = knob(
        0.0,
        "noise that the decoder learns to undo, added to z in training; standard deviation "
        "latent_noise * |N(0, 1)|, drawn for each image (0: none)",
    )


@dataclass
class PerceptualConfig:
    kind: Literal["none", "auto", "structure", "lpips", "lpips_alex"] = knob(
        "none",
        "distance of reconstructions added to the loss: structure (SSIM and gradients at three "
        "scales, no weights), LPIPS on VGG16 or AlexNet; auto: lpips if its weights are on this "
        "machine, else structure",
    )
    weight: float = knob(1.0, "nats of each value of an image (C*H*W) for a distance of 1")
    weights: str = knob(
        "",
        "folder of the LPIPS weight files (default: where torch.hub keeps downloads)",
        neutral=True,
    )


@dataclass
class AdversarialConfig:
    weight: float = knob(
        0.0,
        "adversarial gradient at the decoder's last layer, as a part of the other terms' (0: no "
        "discriminator; usual: 0.5)",
    )
    start_step: int = knob(0, "step from which the discriminator learns")
    warmup_steps: int = knob(1000, "steps that it learns before the decoder hears of it")
    ramp_steps: int = knob(1000, "steps over which the term then rises to its weight")
    max_weight: float = knob(
        10.0, "largest adaptive weight, nats of each value of an image for a logit of 1"
    )
    lr: float = knob(2e-4, "peak learning rate of the discriminator; has optimizer's schedule")
    betas: list[float] = knob([0.5, 0.9], "decay rates of its Adam's two moments")
    clip_grad_norm: float = knob(0.0, "largest norm of its gradient (0: no clipping)")
    channels: int = knob(64, "width of its first layer; each layer doubles it, up to 8 times")
    layers: int = knob(3, "strided layers: a logit sees 16, 34, 70, 142 pixels with 1, 2, 3, 4")
    r1: float = knob(
        0.0, "weight of |d logits / d real images|^2 / 2, sum over an image, mean over logits"
    )
    r1_every: int = knob(16, "steps between uses of r1, each with that many times its weight")


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
    microbatch_size: Any = knob(
        0,
        "images per forward of one process (0: its whole share; auto: as many as fit into memory); "
        "changes memory, not results",
        neutral=True,
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = knob(
        "auto",
        "autocast of the forward; auto: bf16 where every device computes in it, else no (float32)",
    )
    ema_decay: float = knob(0.999, "decay per step of the averaged weights")
    train_only: Literal["all", "decoder"] = knob(
        "all", "decoder: fine-tune decoder and likelihood; the encoder keeps init_from's weights"
    )
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
    compile: Literal["auto", "true", "blocks", "false"] = knob(
        "auto",
        "torch.compile of both towers, for fixed shapes; results differ by rounding only; blocks: "
        "of each block by itself, a shorter start (auto: true on CUDA where a compiler is there "
        "and images share sizes; not on CPU or under fsdp)",
        neutral=True,
    )
    channels_last: Literal["auto", "true", "false"] = knob(
        "auto",
        "memory layout of weights and images (auto: on CUDA in 16 bits when compiled)",
        neutral=True,
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
        "",
        "weights that a run begins with: run folder, checkpoint folder, .safetensors file, or the "
        "folder of a diffusers AutoencoderKL or of a pipeline with one",
    )
    dry_run: bool = knob(False, "check everything, print the plan, train nothing", neutral=True)
    seed: int = knob(0, "every random draw is a function of this seed and its position")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    likelihood: LikelihoodConfig = section(LikelihoodConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    perceptual: PerceptualConfig = section(PerceptualConfig)
    adversarial: AdversarialConfig = section(AdversarialConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    training: TrainingConfig = section(TrainingConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    wandb: WandbConfig = section(WandbConfig)
    runtime: RuntimeConfig = section(RuntimeConfig)
    resume: ResumeConfig = section(ResumeConfig)
