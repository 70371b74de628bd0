"""Our autoencoder training against a plain loop around diffusers' AutoencoderKL: PSNR, images/s.

    PEERS_PYTHON=PYTHON python -m benchmarks.autoencoder [seconds=600] [turn_s=30] [threads=1]
        [arms=ours,adversarial,diffusers] [data=FOLDER] [image_pixels=80] [out=FILE.png]
        [config=photos64_kl_f4] [key=value ...]

Each arm trains for `seconds` in a process of its own; they take turns of `turn_s` seconds, so one
trains at a time, on `threads` threads. `ours` is the trainer, data loading and logging included;
`adversarial` the same with `adversarial_keys` (words with spaces between them), `shortcuts` with
`shortcuts_keys`, the towers of imagenet256_f16_dc at first; `diffusers` a loop
over `pool` images in memory, drawn from our stream with its crops and mirrors, with an L2 loss,
kl_weight and gradient clipping at `clip`, and from the same keys widths, blocks, latent channels,
batch, precision, learning rate, warm-up, weight decay, averaging, compile. The learning rate is
constant after the warm-up: nobody knows how many steps the seconds hold.

At the end `num_images` held-out images are reconstructed in float32 by the averaged weights from
E[z|x], rounded to 8 bits; PSNR is one function on the same images for all arms. data=FOLDER: shards
as `pack` writes them, else synthetic pictures of image_pixels a side. PEERS_PYTHON: the Python of
an environment made by

    python -m venv peers && peers/bin/pip install -c constraints.txt torch==2.13.0 diffusers

Without it the diffusers arm is left out. Out: options of each arm, a table, a PNG of held-out
images above each arm's reconstructions; the last line is a JSON object.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
from benchmarks.turns import Arm, Finished, Turn, take_turns
from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Batch, EvaluationStream
from vae_dist.evaluation.metrics import psnr_db
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.tracking.images import grid, save_png, to_uint8
from vae_dist.training.data import training_stream
from vae_dist.training.loop import Trainer

OPTIONS = {
    "seconds": "600",
    "turn_s": "30",
    "threads": "1",
    "arms": "ours,adversarial,diffusers",
    "data": "",
    "image_pixels": "80",
    "out": "",
    "pool": "16384",
    "num_images": "200",
    "kl_weight": "1e-6",
    "clip": "1.0",
    "adversarial_keys": "perceptual.kind=structure perceptual.weight=0.3 adversarial.weight=0.25 "
    "adversarial.start_step=800 adversarial.warmup_steps=200 adversarial.ramp_steps=300 "
    "adversarial.channels=32",
    "shortcuts_keys": "model.latent_channels=32 model.patch=2 model.channels=[128,256,512,512] "
    "model.blocks=[2,2,4,4] model.dc_shortcuts=true",
    "arm": "",  # of the process that trains: the folder of its files
}
# a loader process would be one thread more
BUDGET = (*QUIET, "optimizer.schedule=constant", "data.workers=0")
COLUMNS = 12  # of the PNG
HOW_TO_INSTALL = (
    "python -m venv peers && peers/bin/pip install -c constraints.txt torch==2.13.0 diffusers, "
    "then PEERS_PYTHON=peers/bin/python"
)


# our arms


def run_ours(folder: Path, keys: list[str]) -> None:
    """An arm's process: the trainer, until its turns are over."""
    setting = make_setting([*keys, f"run={folder}/run"])
    config, device = setting.config, setting.runtime.device
    turn = Turn(num_images_per_step=config.training.batch_size)
    written = [""]

    def around(trainer: Trainer, stream: Iterator[Batch]) -> Iterator[Batch]:
        vae = trainer.training_step.vae
        turn.ready(
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            device=device.type,
            parameters=sum(p.numel() for p in vae.parameters()),
            loss=f"{config.likelihood.kind}, sigma {config.likelihood.variance}, "
            f"beta {config.objective.beta:g}",
            **architecture(config),
            **shared_options(config),
            clip=config.optimizer.clip_grad_norm,
            adversarial=config.adversarial.weight,
        )
        for batch in stream:
            try:
                turn.before_step(lambda: synchronize(device))
            except Finished as finished:
                written[0] = finished.path
                raise Enough from None
            yield batch

    trainer = train(setting, folder / "run", around)
    if written[0]:
        held_out = torch.from_numpy(np.load(folder / "held_out.npy"))
        model: Any = trainer.training_step.ema.module
        reconstructed = BatchedVAE(model, batch_size=32).reconstruct(held_out)
        np.save(written[0], to_uint8(reconstructed).numpy())


def architecture(config: TrainConfig) -> dict[str, Any]:
    model = config.model
    return {
        "image_channels": config.data.channels,
        "channels": list(model.channels),
        "blocks": model.blocks,
        "latent_channels": model.latent_channels,
        "norm_groups": model.norm_groups,
        "attention": model.attention,
    }


def shared_options(config: TrainConfig) -> dict[str, Any]:
    optimizer, training = config.optimizer, config.training
    return {
        "batch_size": training.batch_size,
        "precision": training.precision,
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "warmup_steps": max(1, optimizer.warmup_steps),
        "ema_decay": training.ema_decay,
        "compile": is_compiled(config),
        "channels_last": is_channels_last(config),
    }


# the comparison


def peer_command(options: Path) -> list[str]:
    return [os.environ["PEERS_PYTHON"], "-m", "benchmarks.peer_arm", str(options)]


def peer_problem(config: TrainConfig) -> str:
    """Why there is no diffusers arm; empty where there can be one."""
    python = os.environ.get("PEERS_PYTHON", "")
    if not python:
        return f"PEERS_PYTHON is not set: {HOW_TO_INSTALL}"
    if not Path(python).exists():
        return f"PEERS_PYTHON={python} does not exist: {HOW_TO_INSTALL}"
    model = config.model
    same = model.latent == "spatial" and model.patch == 1 and isinstance(model.blocks, int)
    return "" if same and not model.dc_shortcuts else "AutoencoderKL has no such architecture"


def write_images(setting: Setting, folder: Path, *, pool: int, num_images: int) -> None:
    """`pool.npy`: images of our training stream; `held_out.npy`: those of validation. uint8."""
    config, data = setting.config, setting.data
    steps = -(-pool // config.training.batch_size)
    batches = itertools.islice(training_stream(config, setting.runtime, data, 0), steps)
    found = [batch.groups[0].images.numpy() for batch in batches]
    np.save(folder / "pool.npy", np.ascontiguousarray(np.concatenate(found)[:pool]))
    stream = EvaluationStream(
        data.validation, data.evaluation_settings, batch_size=64, max_images=num_images
    )
    held_out = [batch.images[batch.weights > 0].numpy() for batch in stream]
    np.save(folder / "held_out.npy", np.ascontiguousarray(np.concatenate(held_out)))


def start_arm(
    name: str, folder: Path, setting: Setting, options: dict[str, str], keys: list[str]
) -> Arm:
    threads = int(options["threads"])
    log = folder / f"{name}.log"
    mine = folder / name
    mine.mkdir()
    (mine / "held_out.npy").symlink_to(folder / "held_out.npy")
    if name == "diffusers":
        config = setting.config
        given = {
            "kind": "diffusers",
            **architecture(config),
            **shared_options(config),
            "clip": float(options["clip"]),
            "kl_weight": float(options["kl_weight"]),
            "threads": threads,
            "seed": config.seed,
            "images": str(folder / "pool.npy"),
            "held_out": str(folder / "held_out.npy"),
        }
        (mine / "options.json").write_text(json.dumps(given))
        command = peer_command(mine / "options.json")
    else:
        more = shlex.split(options.get(f"{name}_keys", ""))
        command = [sys.executable, "-m", "benchmarks.autoencoder", f"arm={mine}", *keys, *more]
    return Arm(name, command, threads=threads, log=log)


def compare(options: dict[str, str], keys: list[str]) -> dict[str, Any]:
    """Figures of each arm by its name, and why an arm is missing."""
    with tempfile.TemporaryDirectory(prefix="autoencoder.") as temporary:
        folder = Path(temporary)
        words = [] if any(key.startswith("config=") for key in keys) else ["config=photos64_kl_f4"]
        words = [*words, *BUDGET, f"runtime.threads={options['threads']}", *keys]
        side = int(options["image_pixels"])
        words = with_data(words, options["data"], folder / "data", (side, side))
        setting = make_setting(words)
        write_images(
            setting, folder, pool=int(options["pool"]), num_images=int(options["num_images"])
        )
        names, missing = options["arms"].split(","), {}
        if "diffusers" in names and (problem := peer_problem(setting.config)):
            missing["diffusers"] = problem
            print(f"  diffusers is left out: {problem}")
        arms: list[Arm] = []
        try:
            for name in names:
                if name not in missing:
                    arms.append(start_arm(name, folder, setting, options, words))
                    print(f"  {name}: {arms[-1].options}", flush=True)
            seconds, turn_s = float(options["seconds"]), float(options["turn_s"])
            for _ in take_turns(arms, seconds=1.0, turn_s=1.0):  # first steps are not measured
                pass
            for arm in arms:
                arm.images, arm.steps, arm.seconds, arm.rates = 0, arm.steps, 0.0, []
            for done in take_turns(arms, seconds=seconds, turn_s=turn_s):
                rates = ", ".join(f"{arm.name} {arm.rates[-1]:.1f}" for arm in arms)
                print(f"  {done:.0f} s: images/s {rates}", file=sys.stderr, flush=True)
            return _figures(arms, folder, options, missing)
        finally:
            for arm in arms:
                arm.close()


def _figures(
    arms: list[Arm], folder: Path, options: dict[str, str], missing: dict[str, str]
) -> dict[str, Any]:
    held_out = torch.from_numpy(np.load(folder / "held_out.npy"))
    peer = next((arm for arm in arms if arm.name == "diffusers"), None)
    rows, pictures = [], [held_out[:COLUMNS]]
    for arm in arms:
        made = folder / f"{arm.name}.npy"
        arm.finish(made)
        images = torch.from_numpy(np.load(made))
        pictures.append(images[:COLUMNS])
        rows.append(
            {
                "arm": arm.name,
                "parameters": arm.options["parameters"],
                "images_per_second": statistics.median(arm.rates),
                "ratio": None if peer is None else median_ratio(arm.rates, peer.rates),
                "steps": arm.steps,
                "seconds": round(arm.seconds, 1),
                "psnr_db": float(psnr_db(held_out / 255, images / 255).mean()),
            }
        )
    if options["out"]:
        save_png(grid(torch.cat(pictures), columns=COLUMNS), options["out"])
    return {
        "seconds": float(options["seconds"]),
        "threads": int(options["threads"]),
        "held_out_images": len(held_out),
        "arms": rows,
        "options": {arm.name: arm.options for arm in arms},
        "missing": missing,
    }


def main(arguments: list[str]) -> int:
    options, keys = split_options(arguments, OPTIONS)
    if options["arm"]:
        run_ours(Path(options["arm"]), keys)
        return 0
    facts = head("autoencoders: our trainer, and a plain loop around diffusers' AutoencoderKL")
    figures = compare(options, keys)
    show(figures["arms"])
    finish(facts, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
