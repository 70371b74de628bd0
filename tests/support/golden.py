"""Golden values: numbers that a change of structure must not move, to the last bit.

    python -m tests.support.golden write FILE       what this tree computes, as JSON
    python -m tests.support.golden compare FILE     the differences; exit code 1 if there are any

Six short trainings on one process and on two, evaluations, an export, a packed and an encoded shard
run through the commands, on pictures that the script draws. Written down are digests of what
reaches the model in each forward, of weights and of files, and every logged number that is a
function of the step. Values hold for one kind of CPU and one version of torch.
"""

import hashlib
import json
import os
import sys
import tempfile
from difflib import unified_diff
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.distributed import run_ranks
from vae_dist import encode, evaluate, export, pack, train
from vae_dist.models.vae import VAE
from vae_dist.tracking.sinks import read_rows

WHOLE = "evaluation.batch_size=256"  # the digests of inputs are of batches
DIGITS = f"log.num_images=8 training.batch_size=16 data.slots=8 training.steps=6 {WHOLE}"
PHOTOS = (
    "data.train=photos/train data.validation=photos/validation training.batch_size=8 "
    "log.num_images=4 evaluation.batch_size=4 data.workers=0"
)
BUCKETS = 'data.resolution={"area":4096,"multiple":8,"max_aspect":2.0} model.channels=[32,32,32]'
ADVERSARIAL = (
    "adversarial.weight=0.5 adversarial.start_step=1 adversarial.warmup_steps=1 "
    "adversarial.ramp_steps=1 adversarial.channels=16"
)
TRAININGS = {
    "debug": f"config=debug training.steps=20 evaluation.every=10 {WHOLE}",
    "conditional": f"config=mnist_conditional {DIGITS}",
    "missing": f"config=mnist_missing {DIGITS}",
    "photos64": f"config=photos64 {PHOTOS} training.steps=2 model.channels=[32,32,64]",
    "buckets": f"config=photos_buckets {PHOTOS} data.slots=4 training.steps=3 {BUCKETS}",
    "adversarial": f"config=photos64_kl_f4 {PHOTOS} training.steps=5 {ADVERSARIAL}",
}
ON_TWO_RANKS = ("debug", "missing", "buckets", "adversarial")
FIXED = f"log.every=1 {WHOLE} wandb.mode=disabled training.precision=no runtime.threads=1"
OF_THE_STEP = ("train/", "eval/", "optim/", "latent/", "data/")


def digest(parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()[:20]


def tensor_bytes(value):
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    tensor = value.detach().cpu().contiguous()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()


def tensors_of(folder):
    """Digests of the tensors of each safetensors file."""
    return {
        path.name: digest(k.encode() + tensor_bytes(v) for k, v in sorted(load_file(path).items()))
        for path in folder.glob("*.safetensors")
    }


def draw_pictures(folder, count=60):
    """JPEGs of several sizes in three class folders: smooth colours, edges and noise."""
    rng = np.random.default_rng(7)
    for number in range(count):
        height, width = rng.integers(70, 160, 2)
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        pixels = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        left, top = rng.integers(0, 40, 2)
        pixels[top : top + 25, left : left + 25] = rng.integers(0, 256, 3)
        noise = rng.integers(-12, 13, pixels.shape)
        image = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
        path = folder / "abc"[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image if number % 15 else image.convert("L")).save(path, quality=92)


def _traced_training(arguments):
    """Train in this process; a digest of each forward's inputs."""
    seen, forward = [], VAE.forward

    def traced(self, *args, **kwargs):
        given = [*args, *(kwargs[name] for name in sorted(kwargs))]
        seen.append(digest(tensor_bytes(value) for value in given if value is not None))
        return forward(self, *args, **kwargs)

    VAE.forward = traced
    assert train.main(arguments) == 0
    return seen


def training(name, world):
    run = f"runs/{name}_{world}"
    arguments = [f"run={run}", *FIXED.split(), *TRAININGS[name].split()]
    inputs = run_ranks(world, _traced_training, arguments, timeout_s=500)
    logged = {
        f"{step}:{key}": value
        for step, row in read_rows(Path(run, "log.jsonl"))
        for key, value in row.items()
        if key.startswith(OF_THE_STEP)
    }
    last = Path(run, "checkpoints", Path(run, "checkpoints", "latest").read_text().strip())
    return {"inputs": inputs, "logged": logged, "weights": tensors_of(last)}


def run(command, arguments):
    """In a process of its own, as a launched rank: some settings hold for a whole process."""
    assert run_ranks(1, command, arguments.split(), timeout_s=500) == [0], arguments


def bytes_of(folder):
    paths = Path(folder).rglob("*.tar")
    return {str(path.relative_to(folder)): digest([path.read_bytes()]) for path in paths}


def everything():
    """All values; writes below the current folder."""
    draw_pictures(Path("pictures"))
    run(pack.main, "source=pictures out=photos validation=12 size=96 workers=1")
    values = {"packed": bytes_of(".")}
    for name in TRAININGS:
        for world in (1, 2) if name in ON_TWO_RANKS else (1,):
            values[f"{name}_{world}"] = training(name, world)
    one = "threads=1 device=cpu"
    for name in ("debug", "missing", "buckets"):
        out = f"results_{name}.json"
        run(evaluate.main, f"run=runs/{name}_1 samples=7 max_images=20 {one} out={out}")
        found = json.loads(Path(out).read_text())["figures"]
        values[f"evaluate_{name}"] = {k: v for k, v in found.items() if isinstance(v, float)}
    run(export.main, "run=runs/adversarial_1 out=exported")
    config = json.loads(Path("exported/config.json").read_text())
    values["export"] = {"config": config, **tensors_of(Path("exported"))}
    data = "data=photos/validation out=latents"
    run(encode.main, f"run=runs/adversarial_1 {data} {one} batch_size=4")
    return values | {"encoded": bytes_of("latents")}


def main(argv):
    verb, path = argv[0], Path(argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        values = everything()
        os.chdir(path.parent)
    text = json.dumps(values, indent=1, sort_keys=True)  # floats are equal when all their bits are
    if verb == "write":
        path.write_text(text)
        return 0
    before = json.dumps(json.loads(path.read_text()), indent=1, sort_keys=True)
    found = list(unified_diff(before.splitlines(), text.splitlines(), "before", "now", lineterm=""))
    print("\n".join(found[:80]) or "golden: all values equal, bit for bit")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
