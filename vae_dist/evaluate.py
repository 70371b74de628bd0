"""Evaluate a trained model on a data set, in float32: -ELBO, rate, distortion, bits/dim; with
`samples=` also log p(x) by importance sampling.

    python -m vae_dist.evaluate run=runs/mnist
    python -m vae_dist.evaluate run=runs/mnist samples=1000 max_images=1000
    accelerate launch --multi_gpu --num_processes 8 -m vae_dist.evaluate run=runs/celeba64

Writes `results.json` in the run folder, for a spatial latent also `latents.json`: the factors by
which a model of latents scales and shifts them. Of another checkpoint, other weights or data, or a
part of the images it writes a file of its own, as `results_first1000.json`. Figures that another
evaluation of the same left in the file stay. They do not depend on the number of processes. More
damaged images than the run's `data.max_skipped_fraction` are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_dist.cli import exit_process, run_command, writing
from vae_dist.config.checks import LATENT_METRICS, metric_names
from vae_dist.config.commands import EvaluateCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown

if TYPE_CHECKING:
    from vae_dist.data.loader import EvaluationBatch
    from vae_dist.distributed import Runtime
    from vae_dist.evaluation.metrics import Metric
    from vae_dist.evaluation.run import EvaluationResult
    from vae_dist.inference.load import Images, LoadedModel
    from vae_dist.inference.mixture import GaussianMixture
    from vae_dist.models.networks import PretrainedFile

USAGE = "python -m vae_dist.evaluate run=FOLDER [key=value ...]"
RESULTS = "results.json"
INTRO = "Evaluate a trained model on its validation shards, or others, and write results.json."


def evaluate(command: EvaluateCommand) -> None:
    from vae_dist.evaluation import run
    from vae_dist.inference.load import images_to_show, open_run_on_ranks
    from vae_dist.inference.mixture import fitted_prior

    with open_run_on_ranks(command) as (loaded, runtime):
        _check_metrics(command, loaded)
        if command.latents:
            return runtime.on_main(lambda: _evaluate_latents(command, loaded))
        images = images_to_show(loaded, command.data, runtime=runtime)
        prior = None
        if command.prior != "normal":
            prior = runtime.on_main(lambda: fitted_prior(loaded, command))
        metrics, files = _metrics(command, loaded, prior, runtime)
        limit, of_run = command.max_skipped_fraction, loaded.config.data.max_skipped_fraction
        result = run.evaluate(
            loaded.model,
            _batches(command, loaded, images, runtime),
            runtime=runtime,
            seed=command.seed,
            metrics=metrics,
            max_skipped_fraction=of_run if limit == "trained" else limit,
        )
        assert result is not None  # nothing asks it to stop
        out = runtime.on_main(lambda: _report(command, loaded, images, result, prior, files))
        can_show = loaded.config.data.channels in (1, 3)  # all that a picture has
        if "lattice" in metric_names(command.metrics) and can_show and runtime.is_main:
            _save_lattice(metrics, out)


def _check_metrics(command: EvaluateCommand, loaded: LoadedModel) -> None:
    """Raises ConfigError for metrics that this model or these images do not have."""
    names, mask = metric_names(command.metrics), loaded.config.data.mask
    of_latents = [name for name in names if name in LATENT_METRICS]
    of_pictures = [name for name in names if name not in (*LATENT_METRICS, "lattice")]
    reason = ""
    if command.latents and (not names or names != of_latents):
        raise ConfigError(f"latents={command.latents} is for metrics={','.join(LATENT_METRICS)}")
    if of_latents and loaded.model.num_levels:
        reason = f"{', '.join(of_latents)}: the latents of a ladder are no map of channels"
    if of_pictures and mask != "none":
        reason = f"{', '.join(of_pictures)} compare whole images, and data.mask={mask} hides pixels"
    if reason:
        raise ConfigError(f"metrics={shown(command.metrics)}: {reason}; leave them out")


def _evaluate_latents(command: EvaluateCommand, loaded: LoadedModel) -> None:
    """Figures of stored latents, by one process."""
    from vae_dist.evaluation.diffusability import LatentMetric
    from vae_dist.files import redacted
    from vae_dist.inference.latents import open_latents, read_latents

    metric = LatentMetric(metric_names(command.metrics))
    shards = open_latents(loaded.config, command.latents)
    count, fingerprint = command.max_images or shards.index.num_samples, shards.index.fingerprint
    for one in read_latents(shards, loaded.model, num_images=count):
        if not metric.add(one.latent[None], [one.number], [one.label]):
            break
    report = metric.report()
    record = {"run": str(Path(command.run).resolve()), "latents": redacted(command.latents)}
    record |= {"data_fingerprint": fingerprint, "step": loaded.step}
    record |= {"figures": report.figures, "notes": report.notes}
    out = Path(command.out or Path(command.run) / f"results_latents{fingerprint[:6]}.json")
    _print(report.figures, report.notes)
    _write(record, out)


def _save_lattice(metrics: list[Metric], out: Path) -> None:
    """Reconstructions of constant colours, as they are and with their deviations times 8."""
    from vae_dist.evaluation.diffusability import LatticeMetric
    from vae_dist.tracking.images import save_png, side_by_side

    (metric,) = (metric for metric in metrics if isinstance(metric, LatticeMetric))
    outputs, path = metric.reconstructions, out.with_name(f"{out.stem}_lattice.png")
    means = outputs.mean((2, 3), keepdim=True)
    stronger = (means + 8 * (outputs - means)).clamp(-1, 1)
    with writing(path):
        save_png(side_by_side(list(outputs), list(stronger)), path)
    print(f"constant colours, below with deviations times 8: {path}")


def _batches(
    command: EvaluateCommand, loaded: LoadedModel, images: Images, runtime: Runtime
) -> Iterator[EvaluationBatch]:
    """This rank's batches; the main process shows how far it is."""
    from vae_dist.files import progress_bar

    stream = images.stream(
        batch_size=command.batch_size,
        rank=runtime.rank,
        world=runtime.world,
        workers=loaded.config.data.workers,
        max_images=command.max_images or None,
    )
    if not runtime.is_main:
        yield from stream
        return
    with progress_bar("evaluated", len(stream), unit="batches") as bar:
        done = 0
        for batch in stream:
            yield batch
            done += batch.is_first
            bar(done)


def _metrics(
    command: EvaluateCommand, loaded: LoadedModel, prior: GaussianMixture | None, runtime: Runtime
) -> tuple[list[Metric], dict[str, str]]:
    """What was asked for beside the bound, and by name the files of weights that it uses."""
    from vae_dist.evaluation import diffusability, metrics
    from vae_dist.evaluation.frechet import FrechetMetric
    from vae_dist.evaluation.importance import ImportanceMetric
    from vae_dist.models import networks

    names, model, device = metric_names(command.metrics), loaded.model, runtime.device
    priors = {"gmm": prior.to(device)} if prior else {}
    seed, files = command.seed, dict[str, str]()
    asked: list[Metric] = [metrics.PriorMetric(name, p, device) for name, p in priors.items()]
    if command.samples:
        draws = {"num_samples": command.samples, "chunk": command.chunk}
        asked.append(ImportanceMetric(model, device, **draws, seed=seed, priors=priors))

    def fetched(name: str, file: PretrainedFile) -> Path:
        """By the main process, then by those of nodes that do not see its disk."""
        folder = command.metric_weights
        runtime.on_main(lambda: networks.fetch(file, folder))
        path = runtime.on_all_ranks(lambda: networks.fetch(file, folder))
        files[name] = str(path)
        return path

    compare = metrics.comparisons(names)
    for name in [name for name in networks.TRUNKS if name in names]:
        trunk = networks.TRUNKS[name]
        network = networks.load_lpips(name, fetched(name, trunk.file)).to(device)
        compare[name] = metrics.lpips_comparison(network, trunk.smallest_side)
    if compare:
        asked.append(metrics.ReconstructionMetric(compare, device))
    if "rfid" in names or "fid" in names:
        fids = {"fid": None} | ({"fid_gmm": prior} if prior else {})  # drawn on the CPU
        asked.append(
            FrechetMetric(
                networks.load_inception(fetched("frechet", networks.INCEPTION)).to(device),
                networks.NUM_FEATURES,
                model,
                device,
                of_reconstructions="rfid" in names,
                priors=fids if "fid" in names else {},
                seed=seed,
            )
        )
    if set(names) & set(LATENT_METRICS):
        asked.append(diffusability.LatentMetric(names))
    if "lattice" in names:
        channels = loaded.config.data.channels
        asked.append(diffusability.LatticeMetric(model, loaded.image_size, channels=channels))
    return asked, files


def _file_name(command: EvaluateCommand, loaded: LoadedModel, images: Images) -> str:
    """results.json is about the run as it stands, all of its validation images; what differs from
    that is in the file's name."""
    from vae_dist.run.folder import RunFolder

    is_own = command.data in ("", loaded.config.data.validation)
    is_part = 0 < command.max_images < images.index.num_samples
    parts = {
        f"step{loaded.step}": loaded.step != RunFolder(command.run).newest_step(),
        command.weights: command.weights != "ema",
        f"data{images.index.fingerprint[:6]}": not is_own,
        f"first{command.max_images}": is_part,
        f"seed{command.seed}": command.seed,
    }
    return "_".join([Path(RESULTS).stem, *(part for part in parts if parts[part])]) + ".json"


def _report(
    command: EvaluateCommand,
    loaded: LoadedModel,
    images: Images,
    result: EvaluationResult,
    prior: GaussianMixture | None,
    files: dict[str, str],
) -> Path:
    """Write the results and print them; where they are written."""
    from vae_dist.evaluation import run
    from vae_dist.files import redacted
    from vae_dist.inference.load import weights_digest
    from vae_dist.models.latent import STATISTICS_FILE, write_statistics

    figures, statistics, mask = result.figures, result.statistics, loaded.config.data.mask
    rates = result.latent.kl_nats_per_unit
    of = {"step": loaded.step, "weights": command.weights}
    fitted = prior.description if prior else ""
    record = {
        "run": str(Path(command.run).resolve()),
        **of,
        "weights_digest": weights_digest(loaded.model),
        "data": redacted(command.data or loaded.config.data.validation),
        "data_fingerprint": images.index.fingerprint,
        "seed": command.seed,
        "mask": mask,  # figures count what it leaves
        "figures": figures,
        "conditions": _conditions(figures, command.samples, fitted),
        "latents": {**statistics, "kl_nats_per_unit": rates},
        "notes": result.notes,
        "metric_weights": files,
    }
    out = Path(command.out or Path(command.run) / _file_name(command, loaded, images))
    print(f"{command.run}, step {loaded.step}, {command.weights} weights, float32")
    if fitted:
        print(fitted)
    _print(figures, result.notes)
    if loaded.model.num_levels:
        print(f"rate of each group, from the top: {' '.join(f'{rate:.2f}' for rate in rates)}")
    if mask != "none":
        print(f"of observed pixels only (data.mask={mask})")
    _write(run.merged_with_earlier(record, out), out)
    if loaded.model.image_size is None and out == Path(command.run) / RESULTS:
        path = Path(command.run) / STATISTICS_FILE
        with writing(path):
            write_statistics(path, statistics | of | {"of": "samples"})
    return out


def _print(figures: dict[str, float], notes: dict[str, str]) -> None:
    for name, value in figures.items():
        print(f"{name:<28}" + (f"{value:>15,}" if isinstance(value, int) else f"{value:>15.4f}"))
    for note in notes.values():
        print(f"  {note}")


def _write(record: dict[str, Any], out: Path) -> None:
    from vae_dist.evaluation.run import as_json
    from vae_dist.files import write_durably

    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, as_json(record))
    print(f"written to {out}")


def _conditions(figures: dict[str, float], samples: int, prior: str) -> dict[str, dict[str, Any]]:
    """By figure: how many draws it rests on, and which prior, where it is of any."""
    draws = {name: {"importance_samples": samples} for name in figures if name[:3] == "is_"}
    priors = {name: {"prior": prior} for name in figures if "gmm" in name}
    return {name: draws.get(name, {}) | priors.get(name, {}) for name in {**draws, **priors}}


def main(argv: list[str] | None = None) -> int:
    return run_command(EvaluateCommand, evaluate, argv, usage=USAGE, intro=INTRO)


if __name__ == "__main__":
    exit_process(main())
