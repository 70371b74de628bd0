"""The sinks of a run: opened for the main process, closed with the way in which the run ended."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping

from vae_dist.config.schema import TrainConfig
from vae_dist.distributed import Runtime
from vae_dist.files import write_durably
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.console import ConsoleSink, say
from vae_dist.tracking.environment import add_session, describe_environment
from vae_dist.tracking.metrics import Value
from vae_dist.tracking.sinks import JsonlSink, Sink, TensorBoardSink
from vae_dist.tracking.wandb import WandbSink


class Trackers:
    """The sinks of the main process, none on other ranks. What they cannot write is a warning."""

    def __init__(self) -> None:
        self.sinks: list[Sink] = []
        self.console: ConsoleSink | None = None
        self._warned = ""  # the last warning, which is not repeated

    def add(self, sink: Sink) -> None:
        self.sinks.append(sink)
        if isinstance(sink, ConsoleSink):
            self.console = sink

    def open(
        self, config: TrainConfig, runtime: Runtime, folder: RunFolder, start_step: int
    ) -> None:
        """Those of the config, on the main process. Raises ConfigError about W&B."""
        console = ConsoleSink(start_step=start_step, stop_step=config.training.steps)
        self.add(console)
        self.add(JsonlSink(folder.log_path, resume_step=start_step))
        session = describe_environment(
            first_step=start_step, world=runtime.world, device=runtime.device
        )
        add_session(folder.path / "environment.json", session)
        wandb = WandbSink(
            config,
            folder.path,
            resume_step=start_step,
            say=console.say,
            on_stop=lambda: write_durably(folder.stop_path, b"the stop button of W&B"),
            environment=session,
        )
        self.add(wandb)
        if config.log.tensorboard:
            self.add(TensorBoardSink(folder.path / "tensorboard", resume_step=start_step))

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        for sink in self.sinks:
            with self.warned_of("log", step):
                sink.log(step, row)

    def advance(self, step: int) -> None:
        if self.console is not None:
            self.console.advance(step)

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.say(text)
        else:  # a rank other than the main one
            say(text, sys.stderr)

    @contextlib.contextmanager
    def warned_of(self, what: str, step: int) -> Iterator[None]:
        """What goes wrong inside, as a disk that is full or pictures that cannot be drawn, costs a
        warning, not the run."""
        try:
            yield
        except Exception as error:
            problem = f"no {what} ({error})"
            if problem != self._warned:
                self._warned = problem
                self.say(f"warning: step {step}: {problem}; training goes on")

    def close(self, status: str) -> None:
        for sink in self.sinks:
            with contextlib.suppress(OSError):
                sink.close(status)
