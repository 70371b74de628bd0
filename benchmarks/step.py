"""What does the trainer cost? Our whole training loop against a bare PyTorch loop.

    python -m benchmarks.step [shapes=mnist,celeba64] [rounds=5] [data=FOLDER]
        [bare_compile=whole] [key=value ...]

`ours` is the Trainer that `train` builds, with shards, decoding, draws by slot, guards, and rows
for log.jsonl and W&B's offline queue as often as the config says. `bare` is a loop around the same
module, with the same precision, batch, fused AdamW, learning rate, average and clipping, on images
that lie in memory as bytes, and noise drawn in one call. Both take turns in one run: a slice is
`steps` optimizer steps of each. A data set that has room in `data.cache_bytes` is decoded once, in
the slices before the first round (`warmup`), whose ratio is printed apart.

data=FOLDER: photographs as `pack` writes them (else synthetic JPEGs). On a CPU all but mnist run at
a reduced batch. Keys of a training run go to both. `mfu`, on GPUs whose peak speed is known, is the
part of it that our loop makes use of (`time/mfu` of a run). Where ours compiles its towers, the
bare loop compiles the whole module; bare_compile=towers: what ours compiles, towers or blocks, and
one compilation serves both. Out: a table; the last line is a JSON object. Ratios are medians over
rounds of bare seconds / our seconds; 1.0: the trainer is free.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import finish, head, median_ratio, show, split_options
from benchmarks.setting import (
    QUIET,
    Enough,
    Setting,
    is_channels_last,
    is_compiled,
    make_setting,
    synchronize,
    train,
    with_data,
)
from vae_dist.data.loader import Batch
from vae_dist.models.build import build_vae
from vae_dist.objectives.elbo import beta_at, loss_terms, noise_shape
from vae_dist.training.compile import compile_towers
from vae_dist.training.data import training_stream
from vae_dist.training.loop import Trainer
from vae_dist.training.optimizer import build_optimizer, lr_at
from vae_dist.training.plan import peak_images_per_second

GOAL = 0.97
OPTIONS = {"shapes": "mnist,celeba64", "rounds": "5", "data": ""}
OPTIONS |= {"steps": "0", "warmup": "0", "bare_compile": "whole"}


@dataclass(frozen=True)
class Shape:
    keys: tuple[str, ...]  # of the config
    on_cpu: tuple[str, ...]  # added where there is no accelerator
    steps: int  # of a slice
    warmup: int  # steps before the first round
    image_size: tuple[int, int]  # of synthetic photographs


SHAPES = {
    "mnist": Shape(("config=mnist",), (), 50, 150, (28, 28)),
    "celeba64": Shape(("config=celeba64",), ("training.batch_size=16",), 10, 20, (109, 89)),
    **{
        name: Shape(
            # the bound alone, which both loops have
            (f"config={name}", "perceptual.kind=none", "adversarial.weight=0"),
            ("training.batch_size=2", "training.microbatch_size=0", "data.slots=2"),
            10,
            20,
            (300, 280),
        )
        for name in ("celeba256_kl_f8", "imagenet256_kl_f8", "imagenet256_f16_dc")
    },
}


class BareLoop:
    """The step that anybody would write: nothing of the trainer, the same module and arithmetic."""

    def __init__(self, setting: Setting, images: torch.Tensor, *, compiles_whole: bool) -> None:
        self.config, self.device = setting.config, setting.runtime.device
        self.images = images  # uint8 (batches, B, C, H, W) on the device
        self.vae = build_vae(self.config, setting.data.image_size).to(self.device)
        if is_channels_last(self.config):
            self.vae.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.vae).requires_grad_(False)
        self.optimizer = build_optimizer(self.vae, self.config.optimizer)
        self.model: Any = self.vae
        if is_compiled(self.config) and compiles_whole:
            self.model = torch.compile(self.vae)
        elif is_compiled(self.config):
            compile_towers(self.vae, self.config)
        self.parameters = [p for p in self.vae.parameters() if p.requires_grad]
        self.averages = list(self.average.parameters())
        self.microbatch = 0  # images of a forward, as ours has found them; 0: all
        self.step = 0

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._one()

    def _one(self) -> None:
        config = self.config
        levels = self.images[self.step % len(self.images)]
        for part in levels.split(self.microbatch or len(levels)):
            self._backward(part)
        if config.optimizer.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(config.optimizer, config.training.steps, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - config.training.ema_decay)
        self.step += 1

    def _backward(self, levels: torch.Tensor) -> None:
        config, device = self.config, self.device
        likelihood = self.vae.likelihood
        uniform = torch.rand(levels.shape, device=device) if likelihood.needs_uniform else None
        images = likelihood.prepare(levels, uniform)
        latent = self.vae.latent_shape(*levels.shape[-2:])
        noise = torch.randn(noise_shape(config.objective, len(levels), latent), device=device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.training.precision)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model(images, noise)
        terms = loss_terms(output, config.objective, beta=beta_at(config.objective, self.step))
        (terms.loss_sum / config.training.batch_size).backward()


@dataclass
class Turns:
    """Hands our trainer its batches, and lets the bare loop run between two slices.

    A slice of ours goes from the request of its first batch to that of the next slice's, so that
    all that the trainer does in between counts.
    """

    bare: BareLoop
    steps: int  # of a slice
    warmup: int
    rounds: int
    ours_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)  # of ours, waiting for the batch
    warmup_s: float = 0.0

    def around(self, trainer: Trainer, stream: Iterator[Batch]) -> Iterator[Batch]:
        self.bare.microbatch = trainer.training_step.microbatch_size
        self.bare.run(3)
        yield from self._slice(stream, 2)  # imports, caches, lazy states
        began = self._now()
        yield from self._slice(stream, self.warmup)
        self.warmup_s = self._now() - began
        for number in range(self.rounds):
            for arm in ("ours", "bare") if number % 2 else ("bare", "ours"):
                began = self._now()
                if arm == "ours":
                    self.data_s.append(0.0)
                    yield from self._slice(stream, self.steps)
                    self.ours_s.append(self._now() - began)
                else:
                    self.bare.run(self.steps)
                    self.bare_s.append(self._now() - began)
        raise Enough

    def _slice(self, stream: Iterator[Batch], num_steps: int) -> Iterator[Batch]:
        for _ in range(num_steps):
            began = time.perf_counter()
            batch = next(stream)
            if self.data_s:
                self.data_s[-1] += time.perf_counter() - began
            yield batch

    def _now(self) -> float:
        synchronize(self.bare.device)
        return time.perf_counter()


def images_in_memory(setting: Setting, num_batches: int = 4) -> torch.Tensor:
    """The first batches of the run, in one tensor on the device."""
    with contextlib.closing(
        training_stream(setting.config, setting.runtime, setting.data, 0)
    ) as stream:
        batches = list(itertools.islice(stream, num_batches))
    images = torch.stack([batch.groups[0].images for batch in batches])
    return images.contiguous().to(setting.runtime.device)


def measure(name: str, options: dict[str, str], keys: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="step.") as temporary:
        out, shape = Path(temporary), SHAPES[name]
        steps = int(options["steps"]) or shape.steps
        warmup = int(options["warmup"]) or shape.warmup
        words = list(shape.keys)
        if not torch.accelerator.is_available():
            words += [*shape.on_cpu, "data.workers=0"] if shape.on_cpu else []
        words = [*QUIET, *words, "wandb.mode=offline", f"run={out}/run", *keys]
        setting = make_setting(with_data(words, options["data"], out / "data", shape.image_size))
        whole = options["bare_compile"] == "whole"
        bare = BareLoop(setting, images_in_memory(setting), compiles_whole=whole)
        turns = Turns(bare, steps, warmup, int(options["rounds"]))
        train(setting, out / "run", turns.around)
        return _figures(name, setting, turns)


def _figures(name: str, setting: Setting, turns: Turns) -> dict[str, Any]:
    config = setting.config
    batch = config.training.batch_size
    ours, plain = (statistics.median(s) / turns.steps for s in (turns.ours_s, turns.bare_s))
    peak = peak_images_per_second(config, setting.data, setting.runtime)
    data_wait = statistics.median(a / b for a, b in zip(turns.data_s, turns.ours_s, strict=True))
    return {
        "shape": name,
        "batch_size": batch,
        "microbatch": min(turns.bare.microbatch or batch, batch),
        "precision": config.training.precision,
        "compile": config.runtime.compile,
        "channels_last": is_channels_last(config),
        "threads": torch.get_num_threads(),
        "bare_ms": 1e3 * plain,
        "ours_ms": 1e3 * ours,
        "ours_images_per_second": batch / ours,
        **({"mfu": batch / ours / peak} if peak else {}),
        "data_wait_fraction": data_wait,
        "ratio": median_ratio(turns.bare_s, turns.ours_s),
        "ratios": [round(b / a, 4) for a, b in zip(turns.ours_s, turns.bare_s, strict=True)],
        "first_steps_ratio": plain / (turns.warmup_s / turns.warmup),
    }


def main(arguments: list[str]) -> int:
    options, keys = split_options(arguments, OPTIONS)
    facts = head("the whole training loop against a bare one")
    found = [measure(name, options, keys) for name in options["shapes"].split(",")]
    show(found)
    for row in found:
        print(f"{row['shape']}: {row['ratio']:.3f} of the bare loop (goal {GOAL})")
    finish(facts, {"goal": GOAL, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
