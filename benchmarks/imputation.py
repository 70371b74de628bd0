"""How well are missing pixels of digits filled? Root mean squared errors over the missing ones.

    python -m benchmarks.imputation [run=runs/mnist_missing] [ordinary=runs/mnist] [num_images=500]
                                    [samples=200] [mask=random|half] [seed=0] [picture=FILE.png]

In: a finished run of mnist_missing and one of mnist, of which no digit was incomplete. Of the first
validation digits half of the pixels are hidden, single ones or one half, drawn by sample. Out, for
grey levels between 0 and 1, with standard errors over images:

    mean        each missing pixel is its mean over the training digits
    zero        the ordinary model encodes the digit with black (and with mid-grey) in place of what
                is missing, once, and decodes the posterior's mean
    single, importance, gibbs   `impute` with the run; gibbs with the ordinary one, which it is for

The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from vae_dist.config.commands import ImputeCommand
from vae_dist.data.index import load_index
from vae_dist.inference.impute import impute, prepared
from vae_dist.inference.load import Images, LoadedModel, first_examples, load_model, open_images
from vae_dist.tracking.images import grid, save_png, to_uint8, with_holes

SETTINGS = {
    "run": "runs/mnist_missing",
    "ordinary": "runs/mnist",
    "num_images": "500",
    "samples": "200",
    "mask": "random",
    "seed": "0",
    "picture": "",
}
SHOWN = 10  # digits of the picture


def error(filled: Tensor, truth: Tensor, missing: Tensor) -> tuple[float, float]:
    """Root mean squared error over missing pixels in [0, 1], and its standard error over images."""
    squares = ((filled - truth) / 2).square() * missing
    per_image = squares.flatten(1).sum(1) / missing.flatten(1).sum(1)
    root = per_image.mean().sqrt().item()
    return root, (per_image.std() / len(per_image) ** 0.5).item() / (2 * root)


@torch.inference_mode()
def encoded_once(loaded: LoadedModel, images: Tensor, missing: Tensor, fill: float) -> Tensor:
    """g(E[z|x]) of images whose missing pixels are `fill`."""
    height, width = images.shape[-2:]
    filled = torch.where(missing, fill, images)
    mean, _ = loaded.model.encode(filled)
    return loaded.model.likelihood.mean(loaded.model.decode(mean, (height, width)))


def main(argv: list[str] | None = None) -> int:
    given = dict(argument.split("=", 1) for argument in (sys.argv[1:] if argv is None else argv))
    if unknown := given.keys() - SETTINGS.keys():
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
        return 2
    settings = SETTINGS | given
    count, num_samples, seed = (int(settings[name]) for name in ("num_images", "samples", "seed"))
    aware = load_model(ImputeCommand(run=settings["run"], device="cpu"))
    ordinary = load_model(ImputeCommand(run=settings["ordinary"], device="cpu"))
    aware.config.data.mask = settings["mask"]  # type: ignore[assignment]
    validation = open_images(aware.config, "", create=True)
    examples = first_examples(validation, count)
    assert examples.masks is not None
    missing = examples.masks == 0
    truth = examples.images.float() / 127.5 - 1
    train = load_index(aware.config.data.train, key="data.train", create=True)
    digits = first_examples(Images(train, validation.settings), train.num_samples).images
    filled = {"mean": (digits.float().mean(0) / 127.5 - 1).expand_as(truth)}
    known = {
        name: prepared(m.model, examples.images) for name, m in (("a", aware), ("o", ordinary))
    }
    for name, fill in (("zero", -1.0), ("zero, mid-grey", 0.0)):
        filled[name] = encoded_once(ordinary, known["o"], missing, fill)
    seconds = {}
    made = {}
    for name, model, told, method in (
        ("single", aware, "a", "single"),
        ("importance", aware, "a", "importance"),
        ("importance, ordinary model", ordinary, "o", "importance"),
        ("gibbs, ordinary model", ordinary, "o", "gibbs"),
    ):
        steps = min(num_samples, 40) if method == "gibbs" else num_samples
        began = time.perf_counter()
        how = ImputeCommand(method=method, samples=steps, seed=seed)  # type: ignore[arg-type]
        numbers = examples.samples.tolist()
        made[name] = impute(
            model.model, known[told], examples.masks, how, labels=examples.labels, numbers=numbers
        )
        seconds[name] = time.perf_counter() - began
        filled[name] = made[name].mean
    errors = {name: error(values, truth, missing) for name, values in filled.items()}
    for name, (root, standard) in errors.items():
        took = f"  {seconds[name]:.0f} s" if name in seconds else ""
        print(f"{name:<28} RMSE {root:.4f} +- {standard:.4f}{took}")
    best = made["importance"]
    ratio = errors["importance"][0] / errors["mean"][0]
    print(f"importance / mean: {ratio:.3f}; effective draws {best.effective_samples.median():.1f}")
    if settings["picture"]:
        rows = [
            to_uint8(truth[:SHOWN]),
            with_holes(examples.images[:SHOWN], examples.masks[:SHOWN]),
            torch.where(missing, to_uint8(best.mean), examples.images)[:SHOWN],
            *(
                torch.where(missing, to_uint8(best.draws[:, draw]), examples.images)[:SHOWN]
                for draw in range(3)
            ),
            to_uint8(torch.where(missing, 2 * best.deviation - 1, -1.0)[:SHOWN]),
        ]
        save_png(grid(torch.cat(rows), columns=SHOWN), Path(settings["picture"]))
    figures = {name: round(root, 4) for name, (root, _) in errors.items()}
    print(
        json.dumps(
            {
                "num_images": len(truth),
                "samples": num_samples,
                "mask": settings["mask"],
                "rmse": figures,
                "importance_over_mean": round(ratio, 4),
                "importance_over_zero": round(errors["importance"][0] / errors["zero"][0], 4),
                "steps": [aware.step, ordinary.step],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
