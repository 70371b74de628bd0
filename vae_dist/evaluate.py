"""Evaluate a trained model on a data set, in float32: -ELBO, rate, distortion, bits/dim; with
`samples=` also log p(x) by importance sampling.

    python -m vae_dist.evaluate run=runs/mnist
    python -m vae_dist.evaluate run=runs/mnist samples=1000 max_images=1000
    accelerate launch --multi_gpu --num_processes 8 -m vae_dist.evaluate run=runs/celeba64

Writes `results.json` in the run folder, for a spatial latent also `latents.json`: the factors by
which a model of latents scales and shifts them. Of another checkpoint, other weights or data, or a
part of the images it writes a file of its own, as `results_first1000.json`. Figures that another
evaluation of the same left in the file stay. They do not depend on the number of processes.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_dist.cli import exit_process, run_command
from vae_dist.config.commands import EvaluateCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.forms import metric_names
from vae_dist.config.schema import RuntimeConfig

if TYPE_CHECKING:
    from vae_dist.data.index import ShardIndex
    from vae_dist.data.loader import EvaluationBatch, EvaluationStream
    from vae_dist.distributed import Runtime
    from vae_dist.evaluation.metrics import Metric
    from vae_dist.evaluation.run import EvaluationResult
    from vae_dist.inference.load import LoadedModel
    from vae_dist.inference.mixture import FittedPrior
    from vae_dist.models.latent import LatentPrior
    from vae_dist.models.networks import Backbone, PretrainedFile
    from vae_dist.models.vae import VAE

USAGE = "python -m vae_dist.evaluate run=FOLDER [key=value ...]"
RESULTS = "results.json"
INTRO = "Evaluate a trained model on its validation shards, or others, and write results.json."


def evaluate(command: EvaluateCommand) -> None:
    from vae_dist.data.workers import deaths_explained
    from vae_dist.distributed import Runtime

    runtime = Runtime.start(
        RuntimeConfig(device=command.device, threads=command.threads),
        precision="no",
        launcher_decides_nothing=True,
    )
    try:
        with deaths_explained("ask for more memory"):
            _evaluate(command, runtime)
    finally:
        runtime.stop()


def _evaluate(command: EvaluateCommand, runtime: Runtime) -> None:
    import torch

    from vae_dist.data.loader import EvaluationStream
    from vae_dist.evaluation import run
    from vae_dist.inference.load import check_image_size, load_model, open_images, weights_digest
    from vae_dist.inference.mixture import fitted_prior
    from vae_dist.models.latent import STATISTICS_FILE, write_statistics

    loaded = runtime.on_all_ranks(lambda: load_model(command, device=runtime.device))
    # cuDNN's default rounds the inputs of convolutions to 10 bits
    torch.backends.cudnn.allow_tf32 = False

    def make_what_is_missing() -> None:
        open_images(loaded.config, command.data, create=True)

    runtime.on_main(make_what_is_missing)
    images = runtime.on_all_ranks(lambda: open_images(loaded.config, command.data, create=False))
    check_image_size(loaded.model, images.settings.size, key=f"data={images.index.paths[0]}")
    stream = EvaluationStream(
        images.index,
        images.settings,
        batch_size=command.batch_size,
        rank=runtime.rank,
        world=runtime.world,
        workers=loaded.config.data.workers,
        max_images=command.max_images or None,
    )
    prior = None
    if command.prior != "normal":
        prior = runtime.on_main(lambda: fitted_prior(loaded, command))
    files: dict[str, str] = {}
    metrics = _metrics(command, loaded.model, prior, runtime, files)
    result = run.evaluate(
        loaded.model,
        _watched(stream, runtime),
        runtime=runtime,
        seed=command.seed,
        metrics=metrics,
    )
    assert result is not None  # nothing asks it to stop
    name = _file_name(command, loaded, images.index)
    out = Path(command.out or Path(command.run) / name)
    figures = result.figures()
    record = {
        "run": str(Path(command.run).resolve()),
        "step": loaded.step,
        "weights": command.weights,
        "weights_digest": weights_digest(loaded.model),
        "data": command.data or loaded.config.data.validation,
        "data_fingerprint": images.index.fingerprint,
        "seed": command.seed,
        "precision": "float32",
        "mask": loaded.config.data.mask,  # figures count what it leaves
        "figures": figures,
        "conditions": run.conditions_of(
            figures,
            importance_samples=command.samples,
            prior=prior.description if prior else "",
        ),
        "latents": result.statistics.record(),
        "notes": result.notes,
        "metric_weights": files,
        "world": runtime.world,
        "device": runtime.device.type,
        "versions": _versions(),
    }
    runtime.on_main(lambda: _write(out, record))
    is_spatial = loaded.model.image_size is None
    if is_spatial and not command.out and name == RESULTS:
        facts = {"step": loaded.step, "weights": command.weights, "of": "samples"}
        runtime.on_main(
            lambda: write_statistics(Path(command.run) / STATISTICS_FILE, result.statistics, facts)
        )
    if runtime.is_main:
        print(f"{command.run}, step {loaded.step}, {command.weights} weights, float32")
        if prior:
            print(prior.description)
        _print_table(result)
        if loaded.config.data.mask != "none":
            print(f"of observed pixels only (data.mask={loaded.config.data.mask})")
        print(f"written to {out}")
        if is_spatial:
            print(
                f"scaling_factor={result.statistics.scaling_factor:.5f} "
                f"shift_factor={result.statistics.shift_factor:.5f} of the latents"
            )


def _watched(stream: EvaluationStream, runtime: Runtime) -> Iterable[EvaluationBatch]:
    """The stream, with a progress bar where a person looks on."""
    if not runtime.is_main or not sys.stderr.isatty():
        return stream
    from rich.console import Console
    from rich.progress import track

    return track(stream, "batches", total=len(stream), console=Console(stderr=True))


def _metrics(
    command: EvaluateCommand,
    model: VAE,
    prior: FittedPrior | None,
    runtime: Runtime,
    files: dict[str, str],
) -> list[Metric]:
    """What was asked for beside the bound; `files` is told of the weights that it uses."""
    from vae_dist.evaluation.frechet import FrechetMetric
    from vae_dist.evaluation.importance import ImportanceMetric
    from vae_dist.evaluation.metrics import (
        PriorMetric,
        ReconstructionMetric,
        comparisons,
        lpips_comparison,
    )
    from vae_dist.models import networks

    metrics: list[Metric] = []
    priors = {"gmm": prior.mixture.to(runtime.device)} if prior else {}
    metrics += [PriorMetric(name, mixture, runtime.device) for name, mixture in priors.items()]
    if command.samples:
        metrics.append(
            ImportanceMetric(
                model,
                runtime.device,
                num_samples=command.samples,
                seed=command.seed,
                chunk=command.chunk,
                priors=priors,
            )
        )
    names = metric_names(command.metrics)
    compare = comparisons(names)
    lpips: dict[str, Backbone] = {"lpips": "vgg", "lpips_alex": "alex"}
    for name in [name for name in lpips if name in names]:
        path = _weights(command, networks.FILES[lpips[name]], runtime)
        files[name] = str(path)
        network = networks.load_lpips(lpips[name], path).to(runtime.device)
        compare[name] = (lpips_comparison(network), networks.SMALLEST_SIDE[lpips[name]])
    if compare:
        metrics.append(ReconstructionMetric(compare, runtime.device))
    if "rfid" in names or "fid" in names:
        path = _weights(command, networks.INCEPTION, runtime)
        files["frechet"] = str(path)
        priors_of_fid: dict[str, LatentPrior | None] = {}
        if "fid" in names:
            # latents are drawn on the CPU
            priors_of_fid = {"fid": None} | ({"fid_gmm": prior.mixture} if prior else {})
        metrics.append(
            FrechetMetric(
                networks.load_inception(path).to(runtime.device),
                networks.NUM_FEATURES,
                model,
                runtime.device,
                of_reconstructions="rfid" in names,
                priors=priors_of_fid,
                seed=command.seed,
            )
        )
    return metrics


def _weights(command: EvaluateCommand, file: PretrainedFile, runtime: Runtime) -> Path:
    """The file, fetched by the main process, then by those of nodes that do not see its disk."""
    from vae_dist.models.networks import fetch

    folder = Path(command.metric_weights) if command.metric_weights else None
    runtime.on_main(lambda: fetch(file, folder))
    path, problem = None, ""
    try:
        path = fetch(file, folder)
    except ConfigError as error:
        problem = str(error)
    problems = [problem for problem in runtime.gather(problem) if problem]
    if problems:  # on every rank, or the others would wait for this one
        raise ConfigError(problems[0])
    assert path is not None
    return path


def _file_name(command: EvaluateCommand, loaded: LoadedModel, index: ShardIndex) -> str:
    """results.json is about the run as it stands, all of its validation images; what differs from
    that is in the file's name."""
    from vae_dist.run.folder import RunFolder

    newest = RunFolder(command.run).newest_step()
    is_own = command.data in ("", loaded.config.data.validation)
    is_part = 0 < command.max_images < index.num_samples
    parts = [
        "" if loaded.step == newest else f"step{loaded.step}",
        "" if command.weights == "ema" else command.weights,
        "" if is_own else f"data{index.fingerprint[:6]}",
        f"first{command.max_images}" if is_part else "",
        f"seed{command.seed}" if command.seed else "",
    ]
    return "_".join([Path(RESULTS).stem, *filter(None, parts)]) + ".json"


def _write(out: Path, record: dict[str, Any]) -> None:
    from vae_dist.evaluation.run import as_json, merged_with_earlier
    from vae_dist.files import write_durably

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, as_json(merged_with_earlier(record, out)))
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror})") from None


def _print_table(result: EvaluationResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", box=None, pad_edge=False, padding=(0, 2))
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    table.add_column("unit")
    figures = result.figures()
    for name, value in figures.items():
        if name.removesuffix("_se_nats") + "_nats" in figures and name.endswith("_se_nats"):
            continue
        error = figures.get(name.removesuffix("_nats") + "_se_nats")
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        if name.endswith("_nats"):
            shown = f"{value:.3f}"
        table.add_row(name, shown, "" if error is None else f"{error:.3f}", _unit(name))
    Console(soft_wrap=True).print(table)
    for reason in result.notes.values():
        print(f"  {reason}")


def _unit(name: str) -> str:
    if name.endswith("_nats"):
        return "nats per image"
    if name.endswith("_db"):
        return "dB"
    if "bits_per_dim" in name:
        return "bits per value"
    return ""


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("vae_dist", "torch", "accelerate", "webdataset", "numpy", "torchmetrics"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # an extra, or a checkout that is not installed
            versions[name] = "not installed"
    return versions


def main(argv: list[str] | None = None) -> int:
    return run_command(EvaluateCommand, evaluate, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    exit_process(main())
