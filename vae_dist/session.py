"""A training session: from a config to a Trainer in its run folder, and to an exit code.

The order is: join the ranks; take the run folder; agree with the run that is in it; index the
data; build model, step and sinks; restore the newest checkpoint; train. Whatever can be refused is
refused before the model is built. Only the main process writes; its errors reach all ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from collections.abc import Iterator

import torch

from vae_dist.assembly import build_trainer, load_data, open_sinks, training_stream
from vae_dist.checkpoint import Checkpoint, step_name
from vae_dist.config import checks
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.models.build import build_vae
from vae_dist.plan import Data, costs, plan
from vae_dist.runfolder import EXIT_INTERRUPTED, RunFolder, RunLock
from vae_dist.runtime import Runtime, has_accelerator
from vae_dist.tracking.sinks import WandbSink
from vae_dist.training.guard import TrainingFailed
from vae_dist.training.loop import Trainer
from vae_dist.training.preemption import StopRequest
from vae_dist.training.resume import (
    as_in_run_folder,
    check_identity,
    initial_weights,
    is_finished,
    newest_checkpoint,
)
from vae_dist.training.signals import StopSignals
from vae_dist.training.startup import Startup
from vae_dist.training.watch import RankWatch


def run_session(config: TrainConfig, signals: StopSignals) -> int:
    """Train, or go on, or say that nothing is left to do. Returns the exit code."""
    startup = Startup()
    startup.mark("imports")
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2: where does it hang?
    folder = RunFolder(config.run)
    config = as_in_run_folder(config, folder)
    accelerated = has_accelerator(config.runtime)
    if config.training.precision == "auto":
        config.training.precision = "bf16" if accelerated else "no"
    runtime = Runtime.start(config.runtime, precision=config.training.precision)
    startup.mark("ranks")
    try:
        if config.dry_run:
            return _dry_run(config, runtime)
        with _locked(folder, runtime):
            stop = StopRequest(runtime, folder.stop_path, signals)
            code = _train(config, runtime, folder, stop, startup)
        if code != 1:
            # Nobody leaves before the main process has written all: srun and elastic agents end
            # the ranks that are left. After a failure there may be nobody to wait for.
            with contextlib.suppress(RuntimeError):  # status.json says already how it ended
                runtime.barrier()
        return code
    finally:
        runtime.stop()


@contextlib.contextmanager
def _locked(folder: RunFolder, runtime: Runtime) -> Iterator[None]:
    """The run folder, held by the main process and visible to all ranks."""
    with contextlib.ExitStack() as held:

        def take() -> str:
            folder.create()
            after_release = held.enter_context(contextlib.ExitStack())
            held.enter_context(RunLock(folder))
            after_release.callback(folder.remove_if_unused)
            folder.checkpoints.remove_leftovers()
            folder.stop_path.unlink(missing_ok=True)  # it asked the last session to stop
            return folder.write_token()

        token = runtime.on_main(take)
        if runtime.any_rank(not folder.sees_token(token)):
            raise ConfigError(
                f"run={folder.path} is not the same folder on all nodes; choose one on a file "
                "system that all nodes see"
            )
        yield


def _train(
    config: TrainConfig, runtime: Runtime, folder: RunFolder, stop: StopRequest, startup: Startup
) -> int:
    checkpoint = newest_checkpoint(runtime, folder)
    startup.mark("checkpoint")
    start_step = checkpoint.step if checkpoint is not None else 0
    if checkpoint is not None and is_finished(config, checkpoint):
        if runtime.is_main:
            folder.write_status("finished", step=checkpoint.step, reason="all steps are done")
            print(
                f"finished: {folder.path} stands at step {checkpoint.step} of "
                f"{config.training.steps}; nothing is left to do"
            )
        return 0
    if stop.agreed_now():
        return _stopped_before_training(runtime, folder, start_step, stop)
    data = load_data(config, runtime)
    config = checks.resolve(
        config,
        mean_sample_bytes=data.train.mean_sample_bytes,
        has_accelerator=has_accelerator(config.runtime),
    )
    if checkpoint is not None:
        check_identity(checkpoint, data.identity, config, folder)
    weights = None
    if checkpoint is None and config.init_from:
        with torch.device("meta"):
            weights = initial_weights(config.init_from, build_vae(config, data.image_size))
    startup.mark("data")
    if stop.agreed_now():
        return _stopped_before_training(runtime, folder, start_step, stop)
    sinks, console = open_sinks(config, runtime, folder, start_step)
    trainer = build_trainer(config, runtime, folder, data, sinks, console)
    if checkpoint is not None:
        _restore(trainer, checkpoint)
    elif weights is not None:
        trainer.initialize(weights)
    if runtime.is_main:
        folder.write_config(config)
    places = runtime.places()
    if console is not None:
        lines = [*plan(config, data, runtime, first_step=start_step), *places]
        console.banner("vae_dist", [*lines, f"output {folder.path}"])
    startup.mark("model and trackers")
    return _fit(trainer, data, stop, startup)


def _stopped_before_training(
    runtime: Runtime, folder: RunFolder, step: int, stop: StopRequest
) -> int:
    if runtime.is_main:
        folder.write_status("interrupted", step=step, reason=stop.reason)
        print(f"interrupted before training ({stop.reason}); the same command starts it again")
    return EXIT_INTERRUPTED


def _fit(trainer: Trainer, data: Data, stop: StopRequest, startup: Startup) -> int:
    """Run the loop; record in status.json how it ended."""
    config, runtime, folder = trainer.config, trainer.runtime, trainer.folder

    def record(status: str, reason: str, *, writes: bool = runtime.is_main) -> None:
        if not writes:
            return
        saved = trainer.writer.written_step if runtime.is_main else folder.newest_step()
        step = trainer.step if status == "running" else saved
        try:
            folder.write_status(status, step=max(0, step), reason=reason)
        except OSError as error:
            trainer.say(f"warning: cannot write {folder.status_path}: {error}")

    def on_lost(message: str, blamed: list[int]) -> None:
        able = [rank for rank in range(runtime.world) if rank not in blamed]
        record("failed", message, writes=able[:1] == [runtime.rank])
        print(f"rank {runtime.rank}: {message}", file=sys.stderr, flush=True)

    record("running", "")
    status = "failed"
    watch = RankWatch(runtime, timeout_s=config.runtime.timeout_s, on_lost=on_lost)
    try:
        with (
            contextlib.closing(training_stream(config, runtime, data, trainer.step)) as batches,
            watch,
        ):
            try:
                status = trainer.fit(batches, stop, watch, startup)
            except ConfigError as error:
                watch.fail(error)
                raise
            except (RuntimeError, OSError) as error:
                if isinstance(error, TrainingFailed) or not (cause := watch.explain(error)):
                    raise
                raise TrainingFailed(f"{cause} (noticed as {type(error).__name__})") from error
        record(status, stop.reason or "all steps are done")
    except TrainingFailed as failure:
        _settle(trainer)
        if folder.status().get("status") != "failed":  # by the rank that failed first
            record("failed", str(failure))
        trainer.say(f"failed: {failure}")
        return 1
    except ConfigError as error:  # a shard that this rank cannot read; the others only see it go
        _settle(trainer)
        record("failed", f"rank {runtime.rank}: {error}", writes=True)
        if not runtime.is_main:
            print(f"rank {runtime.rank}: {error}", file=sys.stderr, flush=True)
        raise
    except BaseException as error:
        _settle(trainer)
        if folder.status().get("status") != "failed":  # by the rank that failed first
            record("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        trainer.painter.close()
        for sink in trainer.sinks:
            if status == "finished" and config.wandb.artifacts and isinstance(sink, WandbSink):
                checkpoint = folder.checkpoints.folder / step_name(trainer.step)
                sink.artifacts(checkpoint, folder.images, step=trainer.step)
            with contextlib.suppress(OSError):
                sink.close(status)
    if runtime.is_main:
        for line in _farewell(trainer, status, stop.reason):
            print(line)
    return 0 if status == "finished" else EXIT_INTERRUPTED


def _settle(trainer: Trainer) -> None:
    """Wait for the checkpoint that is being written, before the run folder is given back."""
    with contextlib.suppress(Exception):
        trainer.writer.wait()


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    try:
        trainer.restore(checkpoint)
    except (RuntimeError, KeyError) as error:  # torch lists each name and shape that differs
        raise ConfigError(
            f"run={trainer.folder.path}: the weights of step {checkpoint.step} do not fit this "
            "config's model; take back what changed under model, likelihood and data.channels, or "
            f"start anew with run=OTHER_FOLDER ({error})"
        ) from None


# words


def _farewell(trainer: Trainer, status: str, reason: str) -> list[str]:
    run = trainer.folder.path
    if status == "interrupted":
        return [
            f"interrupted at step {trainer.writer.written_step} ({reason}); "
            "the same command goes on from there"
        ]
    return [
        f"finished: step {trainer.step}, validation {trainer.summary()} (averaged weights)",
        f"  pictures  {trainer.folder.images}",
        f"  report    python -m vae_dist.report run={run}",
        f"  next      python -m vae_dist.sample run={run} num_images=64 out=samples.png",
        f"            python -m vae_dist.reconstruct run={run}",
        f"            python -m vae_dist.evaluate run={run}",
    ]


def _dry_run(config: TrainConfig, runtime: Runtime) -> int:
    """Check everything, print the plan, leave the run folder alone."""
    data = load_data(config, runtime)
    config = checks.resolve(
        config,
        mean_sample_bytes=data.train.mean_sample_bytes,
        has_accelerator=has_accelerator(config.runtime),
    )
    if runtime.is_main:
        print(
            "\n".join([*plan(config, data, runtime, first_step=0), *costs(config, data, runtime)])
        )
    return 0
