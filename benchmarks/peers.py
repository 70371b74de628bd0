"""The same digits for the same seconds: ours and pythae's MNIST VAEs.

    PEERS_PYTHON=PYTHON python -m benchmarks.peers [seconds=60] [threads=2] [lr=1e-3] [latent=16]
        [key=value of config=mnist ...]

The 9,000 bundled digits, binarised anew at each use, and -ELBO of the 1,000 held-out ones, the same
binarised pictures for all. Ours is config=mnist with as many steps as `seconds` hold
(benchmarks/mnist_minute.py); pythae's are its dense default VAE and the convolutional one of its
MNIST benchmark, under its own trainer with batch 64, Adam at `lr`, `latent` dimensions, float32,
the precision that it has. benchmarks/autoencoder.py compares with diffusers.

PEERS_PYTHON: the Python of an environment with the peers, which need not be ours:

    python -m venv peers
    peers/bin/pip install -c constraints.txt torch==2.13.0 diffusers pydantic scipy scikit-learn \\
        cloudpickle imageio tqdm
    peers/bin/pip install --no-deps pythae==0.1.2

Peers that are not there are left out, with the reason. Out: options of each, tables; the last line
is a JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.autoencoder import peer_command
from benchmarks.mnist_minute import SCHEDULE, TRIAL_STEPS, run, steps_within
from benchmarks.report import finish, head, show, split_options
from benchmarks.setting import QUIET, make_setting, with_data
from benchmarks.turns import Arm
from vae_dist.data.loader import EvaluationStream
from vae_dist.randomness import draws

PYTHAE = ("pythae_dense", "pythae_conv")
OPTIONS = {"seconds": "60", "threads": "2", "lr": "1e-3", "latent": "16"}


def missing(package: str) -> str:
    """Why a peer is not there; empty where it is."""
    python = os.environ.get("PEERS_PYTHON", "")
    if not python or not Path(python).exists():
        return f"PEERS_PYTHON={python} is no Python; the head of benchmarks/peers.py has the lines"
    asked = subprocess.run([python, "-c", f"import {package}"], capture_output=True, text=True)
    last = asked.stderr.strip().splitlines()[-1:] or [""]
    return f"{python} cannot import {package} ({last[0]})" if asked.returncode else ""


def write_digits(folder: Path, words: list[str]) -> None:
    """`pool.npy`: training digits, grey; `held_out.npy`: the held-out ones, 0 or 1, with the draws
    of our evaluation. uint8 (N, 1, 28, 28)."""
    setting = make_setting(words)
    data, likelihood_seed = setting.data, setting.config.seed
    settings = data.evaluation_settings
    training = EvaluationStream(data.train, settings, batch_size=500)
    np.save(folder / "pool.npy", np.concatenate([batch.images.numpy() for batch in training]))
    binarised = []
    for batch in EvaluationStream(data.validation, settings, batch_size=500):
        samples, shape = batch.samples.tolist(), tuple(batch.images.shape[1:])
        uniform = draws(torch.rand, likelihood_seed, "eval-levels", samples, shape)
        binarised.append((uniform < batch.images / 255).to(torch.uint8).numpy())
    np.save(folder / "held_out.npy", np.concatenate(binarised))


def pythae(kind: str, folder: Path, options: dict[str, str]) -> dict[str, Any]:
    given = {
        "kind": kind,
        "threads": int(options["threads"]),
        "batch_size": 64,
        "lr": float(options["lr"]),
        "latent": int(options["latent"]),
        "seed": 0,
        "images": str(folder / "pool.npy"),
        "held_out": str(folder / "held_out.npy"),
    }
    file = folder / f"{kind}.json"
    file.write_text(json.dumps(given))
    arm = Arm(kind, peer_command(file), threads=given["threads"], log=folder / f"{kind}.log")
    try:
        print(f"  {kind}: {arm.options}", flush=True)
        arm.run(float(options["seconds"]))
        arm.finish(folder / f"{kind}.npy")
    finally:
        arm.close()
    values = np.load(folder / f"{kind}.npy")
    return {
        "model": kind,
        "parameters": arm.options["parameters"],
        "images_per_second": arm.rates[0],
        "seconds": arm.seconds,
        "neg_elbo_nats": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / len(values) ** 0.5),
    }


def digits(options: dict[str, str], keys: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="peers.") as temporary:
        folder = Path(temporary)
        words = ["config=mnist", *QUIET, f"runtime.threads={options['threads']}", SCHEDULE, *keys]
        words = with_data(words, "", folder / "data")
        write_digits(folder, words)
        rows = []
        for kind in PYTHAE:
            if problem := missing("pythae"):
                print(f"  {kind} is left out: {problem}")
            else:
                rows.append(pythae(kind, folder, options))
        trial, _, _ = run(folder / "trial", words, TRIAL_STEPS)
        steps = steps_within(float(options["seconds"]), trial)
        clock, figures, batch = run(folder / "run", words, steps)
        config = make_setting([*words, f"run={folder}/run"]).config
        print(
            f"  ours: {steps} steps of {batch}, precision {config.training.precision}, "
            f"{torch.get_num_threads()} threads, lr {config.optimizer.lr:g}, "
            f"{config.model.latent_channels} latents, loss {config.likelihood.kind} + kl"
        )
        rows.append(
            {
                "model": "ours, config=mnist",
                "parameters": clock.num_parameters,
                "images_per_second": steps * batch / clock.took_s,
                "seconds": clock.took_s,
                "neg_elbo_nats": figures["neg_elbo_nats"],
                "standard_error": figures["neg_elbo_se_nats"],
            }
        )
    return rows


def main(arguments: list[str]) -> int:
    options, keys = split_options(arguments, OPTIONS)
    facts = head("the same digits, the same seconds: ours and its peers")
    rows = digits(options, keys)
    show(rows)
    finish(facts, {"seconds": float(options["seconds"]), "mnist": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
