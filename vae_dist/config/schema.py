"""Every knob of a training run: default, unit, range, choices, effect on the numbers.

The classes below are dataclasses; `vae_dist.config.load` fills them from YAML and
the command line, `vae_dist.config.checks` holds the rules between keys. Defaults live here alone.
No torch is imported, so that `--help` and config errors come at once.

A knob is `neutral` when another value gives the same numbers (how often to log, where to write,
how much memory to use): such a knob may differ when a run is resumed. All others may not. A knob
whose `when` does not hold has no effect; another value than the default is then refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vae_dist.config.keys import Section, knob, section


@dataclass
class DataConfig(Section):
    # neutral: a checkpoint knows the shards by their fingerprint, wherever they lie
    train: Any = knob(
        "???",
        "shards: folder of *.tar, brace pattern, URL, or a list of these; {path: SHARDS, index: "
        "FOLDER}; or to mix data sets [{path: SHARDS, weight: NUMBER}, ...]",
        neutral=True,
        form="PATHS MIXTURE",
    )
    validation: Any = knob("???", "as data.train", neutral=True, form="PATHS")
    bundled: Literal["none", "digits"] = knob("none", "digits: write those that ship")
    channels: int = knob(3, "image channels (1 grey, 3 RGB; any number in .npy and TIFF)", ge=1)
    image_key: str = knob("", "which of several images of a sample: jpg, depth.png, npy")
    label_key: str = knob("cls", "the .cls member, or a field of .json, as in attributes.Smiling")
    mask: Literal["none", "member", "alpha", "nan", "random", "rectangle", "half"] = knob(
        "none", "missing pixels: black in .mask.png, transparent, NaN, or drawn in each epoch"
    )
    mask_fraction: float = knob(0.5, "part of the pixels", ge=0, lt=1, when="mask=random|rectangle")
    background: Literal["none", "white", "black"] = knob(
        "none", "behind transparent pixels", when="mask!=alpha channels=1|3 bits!=32"
    )
    bits: Literal[5, 8, 16, 32] = knob(8, "bits of a value; 32: floats in [-1, 1]; 5: cut from 8")
    resolution: Any = knob(
        "native",
        "N or [H, W]: resize and crop, pixels; native: as stored; {area: PIXELS, multiple: PIXELS, "
        "max_aspect: RATIO}: aspect buckets",
        form="native SIZE BUCKETS",
    )
    crop: Literal["center", "random"] = knob("center", "in training", when="resolution!=native")
    flip: bool = knob(False, "mirror training images left to right with probability 1/2")
    dequantize: bool = knob(
        True, "add uniform noise of one level", when="likelihood.kind=gaussian|laplace bits!=32"
    )
    slots: int = knob(0, "parts of a batch; the processes divide it (0: automatic)", ge=0)
    window: Any = knob("auto", "samples in a shuffle (auto: up to 32)", form="auto COUNT")
    cache_bytes: int = knob(2**28, "for decoded images of a rank, if they fit", neutral=True, ge=0)
    retry_s: float = knob(600.0, "seconds that a remote read is tried again", neutral=True, ge=0)
    workers: int = knob(1, "loader processes of a rank (0: the main process)", neutral=True, ge=0)
    max_skipped_fraction: float = knob(0.01, "of unreadable samples", neutral=True, ge=0, le=1)
    max_pixels: int = knob(2**26, "images with more pixels are refused before decoding", ge=1)


@dataclass
class ModelConfig(Section):
    latent: Literal["spatial", "vector"] = knob(
        "spatial", "spatial: C x H/f x W/f, any image size; vector: fixed image size"
    )
    arch: Literal["conv", "dense", "ladder"] = knob(
        "conv", "residual convolutions, the textbook's linear layers, a hierarchy of latents"
    )
    latent_channels: int = knob(4, "channels (of a ladder's group), or dimensions, of z", ge=1)
    channels: list[int] = knob(
        [64, 128, 256], "width of each level; each after the first halves the size", form="COUNTS"
    )
    groups: list[int] = knob([1], "groups of each level", form="COUNTS", when="arch=ladder")
    factors: Any = knob(
        2, "sides of squares that become one place", form="COUNT COUNTS", when="arch=ladder"
    )
    aggregate: bool = knob(False, "p(x|z) sees what all groups add up to", when="arch=ladder")
    patch: int = knob(1, "patch x patch pixels become channels first", ge=1, when="arch!=dense")
    blocks: Any = knob(2, "residual blocks of a level", form="COUNT COUNTS", when="arch!=dense")
    dc_shortcuts: bool = knob(False, "space-to-channel shortcuts of DC-AE", when="arch=conv")
    attention: bool = knob(True, "self-attention in the middle of both towers", when="arch=conv")
    norm_groups: int = knob(32, "groups of GroupNorm; divides widths", ge=1, when="arch!=dense")
    gradient_checkpointing: bool = knob(
        False, "less memory, a third more time", neutral=True, when="arch!=dense"
    )
    initial_sigma: float = knob(1.0, "of q(z|x) before training", gt=0, when="arch!=ladder")
    num_classes: int = knob(0, "labels 0, ..., N-1 that both towers see; 0: unconditional", ge=0)
    label_dropout: float = knob(0.0, "part of labels hidden", ge=0, le=1, when="num_classes!=0")


@dataclass
class LikelihoodConfig(Section):
    kind: Literal[
        "gaussian", "laplace", "discretized_gaussian", "discretized_logistic_mixture", "bernoulli"
    ] = knob("gaussian", "p(x|z): a density, probabilities of levels, or black and white")
    variance: Literal["fixed", "shared", "per_channel", "per_pixel"] = knob(
        "shared",
        "of p(x|z): given, learned, learned for each channel, or sigma_g(z) of every pixel",
        when="kind=gaussian|laplace|discretized_gaussian",
    )
    sigma: float = knob(0.1, "standard deviation; images span [-1, 1]", gt=0, when="variance=fixed")
    min_sigma: float = knob(
        1 / 256, "floor of a learned sigma", gt=0, when="kind!=bernoulli variance!=fixed"
    )
    mixtures: int = knob(10, "for each pixel", ge=1, when="kind=discretized_logistic_mixture")
    binarization: Literal["dynamic", "static", "threshold", "soft"] = knob(
        "dynamic", "drawn at each use, once, cut at one half, or soft", when="kind=bernoulli"
    )


ALIGNED = "alignment!="


@dataclass
class ObjectiveConfig(Section):
    beta: float = knob(1.0, "weight of the rate KL(q(z|x) || p(z)) in the loss; 1: the bound", ge=0)
    beta_warmup_steps: int = knob(
        0, "steps of its rise from 0", ge=0, when="training.train_only=all"
    )
    beta_cycles: int = knob(1, "rises, each held as long", ge=1, when="beta_warmup_steps!=0")
    free_bits: float = knob(
        0.0, "nats of each latent unit that are free", ge=0, when="beta!=0 training.train_only=all"
    )
    importance_samples: int = knob(1, "draws of z; 1: ELBO; more: importance-weighted bound", ge=1)
    gradient: Literal["standard", "doubly_reparameterized"] = knob(
        "standard", "of the encoder", when="importance_samples!=1 training.train_only=all"
    )
    scale_equivariance: float = knob(
        0.0, "weight of -log p(image at half size | z at half size), nats of its values", ge=0
    )
    latent_noise: float = knob(0.0, "noise on z: standard deviation latent_noise * |N(0, 1)|", ge=0)
    channel_masking: float = knob(
        0.0, "part of the images of which the decoder sees only the first channels of z", ge=0, le=1
    )
    alignment: str = knob(
        "", "vision model (transformers) that z is aligned with: a folder, or OWNER/NAME on the hub"
    )
    alignment_weight: float = knob(
        0.5, "of the gradient of the other terms, at the first step", gt=0, when=ALIGNED
    )
    alignment_final_weight: float = knob(0.1, "at the last step", ge=0, when=ALIGNED)
    alignment_margins: list[float] = knob(
        [0.5, 0.25], "of cosines to features, of those between positions", form="PAIR", when=ALIGNED
    )
    alignment_width: Any = knob("auto", "values of a feature", form="auto COUNT", when=ALIGNED)


@dataclass
class PerceptualConfig(Section):
    kind: Literal["none", "auto", "structure", "lpips", "lpips_alex"] = knob(
        "none", "distance in the loss; auto: lpips if its weights are here, else structure"
    )
    weight: float = knob(1.0, "nats of each value for a distance of 1", gt=0, when="kind!=none")
    weights: str = knob(
        "", "LPIPS folder (default: torch.hub's)", neutral=True, when="kind=auto|lpips|lpips_alex"
    )


@dataclass
class AdversarialConfig(Section):
    weight: float = knob(0.0, "gradient at the last layer, part of the other terms' (0: off)", ge=0)
    start_step: int = knob(0, "step from which the discriminator learns", ge=0)
    warmup_steps: int = knob(1000, "steps that it learns before the decoder hears of it", ge=0)
    ramp_steps: int = knob(1000, "steps over which the term then rises to its weight", ge=0)
    max_weight: float = knob(10.0, "largest weight, nats of each value for a logit of 1", gt=0)
    lr: float = knob(2e-4, "peak learning rate, on optimizer's schedule", gt=0)
    betas: list[float] = knob([0.5, 0.9], "decay rates of Adam's moments", form="PAIR", lt=1)
    clip_grad_norm: float = knob(0.0, "largest norm of its gradient (0: no clipping)", ge=0)
    channels: int = knob(64, "width of its first layer; later ones double it up to 8 times", ge=1)
    layers: int = knob(3, "strided: a logit sees 16, 34, 70, 142 pixels with 1 to 4", ge=1, le=8)


@dataclass
class OptimizerConfig(Section):
    lr: float = knob(2e-4, "peak learning rate of AdamW", gt=0)
    warmup_steps: int = knob(100, "steps of linear learning-rate warm-up", ge=0)
    schedule: Literal["cosine", "constant"] = knob("cosine", "learning rate after the warm-up")
    final_lr_fraction: float = knob(0.0, "of lr, at the end", ge=0, le=1, when="schedule=cosine")
    betas: list[float] = knob([0.9, 0.999], "decay rates of Adam's moments", form="PAIR", lt=1)
    eps: float = knob(1e-8, "added to the denominator of Adam", gt=0)
    weight_decay: float = knob(0.01, "decoupled weight decay of matrices and kernels", ge=0)
    clip_grad_norm: float = knob(0.0, "largest gradient norm, nats per image (0: any)", ge=0)


@dataclass
class TrainingConfig(Section):
    steps: int = knob(10_000, "optimizer steps of the whole run", neutral=True, ge=1)
    batch_size: int = knob(256, "images per optimizer step, over all processes", ge=1)
    microbatch_size: Any = knob(
        0,
        "images per forward; memory only (0: all; auto: what fits)",
        neutral=True,
        form="auto INDEX",
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = knob(
        "auto", "autocast; no: float32; auto: bf16 where every device computes in it"
    )
    ema_decay: float = knob(0.999, "decay per step of the averaged weights", ge=0, lt=1)
    train_only: Literal["all", "decoder"] = knob(
        "all", "decoder: fine-tune decoder and likelihood of init_from"
    )
    max_consecutive_nonfinite: int = knob(
        20, "steps in a row that may be skipped before the run fails", neutral=True, ge=1
    )
    spike_factor: float = knob(0.0, "skip gradients of so many times the usual (0: none)", ge=0)
    checksum_every: int = knob(
        1000, "steps between comparisons of the ranks' weights (0: never)", neutral=True, ge=0
    )


@dataclass
class EvaluationConfig(Section):
    every: int = knob(1000, "steps between evaluations (0: only at the end)", ge=0)
    batch_size: Any = knob("auto", "images per forward (auto: microbatch)", form="auto COUNT")


@dataclass
class CheckpointConfig(Section):
    every: int = knob(1000, "steps between checkpoints (0: only at the end)", ge=0)
    keep_last: int = knob(2, "newest checkpoints that are kept", ge=1)
    keep_best: bool = knob(True, "also keep the one of the lowest eval/neg_elbo_nats, named best")


@dataclass
class LogConfig(Section):
    every: int = knob(50, "steps between rows of log.jsonl, the console and W&B", ge=1)
    images_every: int = knob(0, "steps between picture grids (0: at each evaluation)", ge=0)
    num_images: int = knob(64, "images of a picture grid", ge=1)
    tensorboard: bool = knob(False, "also write TensorBoard files to RUN/tensorboard")


@dataclass
class WandbConfig(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = knob(
        "auto", "auto: online when logged in and reachable, else offline"
    )
    project: str = knob("vae_dist", "W&B project")
    entity: str | None = knob(None, "W&B team or user (none: your default)")
    group: str | None = knob(None, "W&B group of this run")
    tags: list[str] = knob([], "W&B tags of this run")
    finish_timeout_s: int = knob(60, "longest wait for W&B at the end, seconds", ge=0)


@dataclass
class RuntimeConfig(Section):
    device: Literal["auto", "cpu"] = knob("auto", "auto: the accelerator if there is one")
    threads: int = knob(0, "CPU threads of one process (0: cores / processes)", ge=0)
    timeout_s: int = knob(600, "seconds that a rank waits for the others", ge=1)
    parallel: Literal["ddp", "fsdp"] = knob("ddp", "fsdp: the model is cut over the processes")
    compile: Literal["auto", "true", "blocks", "false"] = knob(
        "auto", "torch.compile; auto: true on CUDA under ddp where images share sizes"
    )
    channels_last: Literal["auto", "true", "false"] = knob(
        "auto", "memory layout of weights and images (auto: on CUDA in 16 bits when compiled)"
    )


@dataclass
class ResumeConfig(Section):
    allow_changes: bool = knob(False, "go on although changed keys change the numbers")


@dataclass
class TrainConfig(Section):
    """What `vae_dist.train` reads, from schema defaults < base < file < command line."""

    config: str = knob("???", "name of a shipped config, or a path to a YAML file", neutral=True)
    run: str = knob("", "run folder (default: runs/<config name>), seen by all nodes", neutral=True)
    init_from: str = knob(
        "", "run, checkpoint, .safetensors file, diffusers folder, hf://OWNER/NAME[/SUBFOLDER]"
    )
    dry_run: bool = knob(False, "check everything, print the plan, train nothing", neutral=True)
    seed: int = knob(0, "every draw is a function of seed and position", ge=0, le=2**63 - 1)
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    likelihood: LikelihoodConfig = section(LikelihoodConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    perceptual: PerceptualConfig = section(PerceptualConfig)
    adversarial: AdversarialConfig = section(AdversarialConfig, when="adversarial.weight!=0")
    optimizer: OptimizerConfig = section(OptimizerConfig)
    training: TrainingConfig = section(TrainingConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig, neutral=True)
    checkpoint: CheckpointConfig = section(CheckpointConfig, neutral=True)
    log: LogConfig = section(LogConfig, neutral=True)
    wandb: WandbConfig = section(WandbConfig, neutral=True)
    runtime: RuntimeConfig = section(RuntimeConfig, neutral=True)
    resume: ResumeConfig = section(ResumeConfig, neutral=True)
