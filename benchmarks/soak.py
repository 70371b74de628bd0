"""Does a run survive what machines and people do? A real training is ended again and again.

    python -m benchmarks.soak [kills=30] [fixed_kills=20] [steps=300] [seed=0] [folder=...]

Two soaks. In the first each restart has 1 or 2 processes at random; in the second always 2. Each
end is one of FAULTS, caused from outside at a random step (a signal sometimes during start-up) and
undone before the restart. Out: a line per end, and a JSON object as the last line; exit code 1 when
a promise is broken:

    after each end status.json and the newest checkpoint are as FAULTS says; the last step is
    reached; eval/neg_elbo_nats within 0.5% of the uninterrupted run's (second soak: all weights
    equal bit for bit); each step has one row; each image of each epoch is used once, and each
    repetition of a step uses the same ones; no process and no half-written file is left behind.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.ranks import Prepare, Ranks
from tests.support.training import arguments, rows, same_weights, status
from vae_dist.config.schema import DataConfig
from vae_dist.data.digits import make_digits
from vae_dist.data.index import load_index
from vae_dist.data.loader import Batch, EvaluationStream
from vae_dist.data.settings import image_settings
from vae_dist.run.checkpoint import Checkpoints, step_name
from vae_dist.run.folder import RunFolder
from vae_dist.training.step import StepReport, TrainingStep

BATCH_SIZE, CHECKPOINT_EVERY = 64, 10
DURING_STARTUP = 0.15  # of the signals
DISK_BYTES = 6000  # that a file may have on the full disk: status.json fits


@dataclass
class Scene:
    """Where a fault is caused."""

    ranks: Ranks
    run: Path
    digits: Path
    random: random.Random

    def some_rank(self) -> int:
        return self.random.randrange(len(self.ranks.pids))

    def shard(self, part: str) -> Path:
        return self.random.choice(sorted((self.digits / part).glob("*.tar")))


Undo = Callable[[], object]
Cause = Callable[[Scene], Undo]


class Fault(NamedTuple):
    cause: Cause
    status: str = ""  # that status.json has afterwards, with this in its reason; empty: none
    reason: str = ""
    options: tuple[str, ...] = ()  # of a session that ends so
    max_lost: int = 0  # steps that were done and are not in the newest checkpoint
    is_repeated: bool = False  # the last step, which had other images in place of lost ones


def sends(number: signal.Signals) -> Cause:
    """To one process or to all."""

    def cause(scene: Scene) -> Undo:
        scene.ranks.signal(number, *scene.random.choice([[], [scene.some_rank()]]))
        return lambda: None

    return cause


def moves(choose: Callable[[Scene], Path]) -> Cause:
    def cause(scene: Scene) -> Undo:
        path = choose(scene)
        away = path.rename(path.with_name(f"{path.name}.away"))
        return lambda: away.rename(path)

    return cause


def damages_shard(scene: Scene) -> Undo:
    shard = scene.shard("train")
    data = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(data))
    return lambda: shard.write_bytes(data)


def kills_loader(scene: Scene) -> Undo:
    trainer = psutil.Process(scene.ranks.pids[scene.some_rank()])
    scene.random.choice(trainer.children()).kill()
    return lambda: None


def fills_disk(scene: Scene) -> Undo:
    """Training goes on for a while, and is then asked to stop."""
    for pid in scene.ranks.pids:
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (DISK_BYTES, DISK_BYTES))
    time.sleep(2)
    return sends(signal.SIGTERM)(scene)


NONE_LOST = "data.max_skipped_fraction=0"
GONE = "cannot be read (No such file or directory)"
FAULTS = {
    # a writer may be at work on one checkpoint while the next interval is trained
    "SIGKILL": Fault(sends(signal.SIGKILL), max_lost=2 * CHECKPOINT_EVERY),
    "SIGTERM": Fault(sends(signal.SIGTERM), "interrupted"),
    "SIGHUP": Fault(sends(signal.SIGHUP), "interrupted"),
    "training shard gone": Fault(moves(lambda scene: scene.shard("train")), "failed", GONE),
    "validation shard gone": Fault(moves(lambda scene: scene.shard("validation")), "failed", GONE),
    "damaged shard": Fault(damages_shard, "failed", NONE_LOST, (NONE_LOST,), is_repeated=True),
    "loader killed": Fault(kills_loader, "failed", "a loader process died"),
    "run folder renamed": Fault(moves(lambda scene: scene.run), "interrupted", "the run folder is"),
    "full disk": Fault(fills_disk, "interrupted", max_lost=10**9),
}


class Soak:
    """One training, its ends, and what is left after each of them. `report["problems"]` is empty
    when every promise held."""

    def __init__(self, folder: Path, digits: Path, name: str, *, steps: int, seed: int) -> None:
        self.name, self.steps, self.random = name, steps, random.Random(seed)
        self.digits, self.run = digits, folder / name
        self.keys, self.output = folder / f"{name}-keys", folder / f"{name}-output"
        self.lost: dict[str, list[int]] = {}  # steps, by each end, by fault
        self.worlds: list[int] = []  # of each session
        self.problems: list[str] = []
        self.report: dict[str, Any] = {"name": name, "lost": self.lost, "problems": self.problems}

    def __call__(self, *, kills: int, worlds: list[int], faults: list[str]) -> None:
        """Train to the end through `kills` ends, each fault as often as the others."""
        begun, deck = time.monotonic(), list[str]()
        for session in range(kills + 1):
            deck = deck or self.random.sample(faults, len(faults))
            name = deck.pop() if session < kills else ""
            fault, keys = FAULTS.get(name), self.keys / str(session)
            self.worlds.append(self.random.choice(worlds))
            argv = options(self.run, self.digits, self.steps, *(fault.options if fault else ()))
            output = self.output / str(session)
            with Ranks(self.worlds[-1], argv, output, record(keys)) as ranks:
                if fault is not None:
                    # what acts at the next evaluation must not come after the last one
                    target = 0.9 * self.steps * (session + self.random.random()) / (kills + 1)
                    self.end(ranks, name, fault, keys, target=target)
                elif any(codes := ranks.wait()):
                    self.problem(f"the last session ended with {codes}: {ranks.text()}")
            if left := ranks.orphans():
                self.problem(f"session {session}, {name}: processes left behind: {left}")
        self.report |= {"seconds": time.monotonic() - begun, "worlds": dict(Counter(self.worlds))}

    def end(self, ranks: Ranks, name: str, fault: Fault, keys: Path, *, target: float) -> None:
        if name.startswith("SIG") and self.random.random() < DURING_STARTUP:
            time.sleep(self.random.uniform(0, 1.5))
        else:
            ranks.wait_until(lambda: steps_done(keys) >= target)
            time.sleep(self.random.uniform(0, 0.03))
        before = newest(self.run)
        undo = fault.cause(Scene(ranks, self.run, self.digits, self.random))
        codes = ranks.wait()
        undo()
        done, kept, found = steps_done(keys), newest(self.run), RunFolder(self.run).status()
        place = f"{self.name} {keys.name}: {len(codes)} processes, {name} at step {done}"
        print(f"{place}: {kept} kept, exit codes {codes}", flush=True)
        if None in codes:
            self.problem(f"{name}: a rank hangs: {codes}")
        if kept < before or done - kept > fault.max_lost:
            self.problem(f"{name}: {done} steps done, checkpoints {before} before, {kept} after")
        if done and fault.status:  # else it ended before there was a step
            expected = {75} if fault.status == "interrupted" else {1, 2}
            is_right = (found["status"], found["step"]) == (fault.status, kept)
            if not is_right or fault.reason not in found["reason"] or set(codes) - expected:
                self.problem(f"{name}: exit codes {codes}, checkpoint {kept}, status.json {found}")
        self.lost.setdefault(name, []).append(max(0, done - kept))
        if fault.is_repeated:
            shutil.rmtree(self.run / "checkpoints" / step_name(kept))

    def problem(self, text: str) -> None:
        print(f"PROBLEM: {text}", flush=True)
        self.problems.append(text)

    def judge(self, reference: Path) -> None:
        """What the run folder and the keys say at the end."""
        run, steps, found = self.run, self.steps, status(self.run)
        if (found["status"], found["step"]) != ("finished", steps):
            self.problem(f"status.json says {found}")
        if sorted(rows(run)) != list(range(1, steps + 1)):
            self.problem("log.jsonl does not have each step once")
        ours, theirs = (rows(one)[steps]["eval/neg_elbo_nats"] for one in (run, reference))
        difference, is_same = 100 * abs(ours / theirs - 1), same_weights(run, reference, steps)
        if not (is_same or (difference < 0.5 and 1 in self.worlds)):
            self.problem(f"other weights; eval/neg_elbo_nats is {ours}, not {theirs}")
        if left := list(run.rglob(".*")):
            self.problem(f"files left behind: {left}")
        if len(kept := Checkpoints(run / "checkpoints").steps()) > 3:
            self.problem(f"more checkpoints than two and the best: {kept}")
        trained, epochs = self.judge_images()
        self.report |= {"steps": steps, "steps_trained": trained, "epochs_checked": epochs}
        self.report |= {"difference_percent": difference, "bit_for_bit": is_same}

    def judge_images(self) -> tuple[int, int]:
        """Steps trained, repeated ones included, and whole epochs, which have each image once."""
        batches: dict[int, list[str]] = {}
        trained = 0
        for path in self.keys.glob("*/*.0"):
            ranks = [one for rank in range(2) if (one := path.with_suffix(f".{rank}")).exists()]
            images, step = " ".join(one.read_text() for one in ranks).split(), int(path.stem)
            trained += 1  # perhaps not by all ranks, or with images in place of lost ones
            if len(images) == BATCH_SIZE and batches.setdefault(step, images) != images:
                self.problem(f"session {path.parent.name} repeated {step} with other images")
        index = load_index(str(self.digits / "train"), key="data.train", create=False)
        data = DataConfig(channels=1, resolution="native", max_pixels=2**20)
        stream = EvaluationStream(index, image_settings(index, data), batch_size=1000)
        everything = Counter(digest(image) for batch in stream for image in batch.images)
        used = [image for step in range(self.steps) for image in batches.get(step, ())]
        epochs = len(used) // index.num_samples
        for start in range(0, epochs * index.num_samples, index.num_samples):
            if Counter(used[start : start + index.num_samples]) != everything:
                self.problem(f"the epoch from image {start} on did not use each image once")
        if sorted(batches) != list(range(self.steps)) or not epochs:
            self.problem("no whole epoch, or a step that no session trained as a whole")
        return trained, epochs


def options(run: Path, digits: Path, steps: int, *more: str) -> list[str]:
    return arguments(
        run,
        digits,
        *(f"training.steps={steps}", f"training.batch_size={BATCH_SIZE}", "data.slots=16"),
        *(f"checkpoint.every={CHECKPOINT_EVERY}", "evaluation.every=20", "log.images_every=100"),
        *("data.cache_bytes=0", "data.window=4", "data.workers=1"),  # shards are read all the time
        "runtime.timeout_s=60",
        *more,
    )


def newest(run: Path) -> int:
    """Step of the newest checkpoint that can be read, 0 without any."""
    checkpoints = Checkpoints(run / "checkpoints")
    found = checkpoints.load_newest() if checkpoints.steps() else None
    return found.step if found else 0


# which images each step used


def record(folder: Path) -> Prepare:
    """A file per step and rank with a digest of each image, in order; it is empty
    where an image is not the one that was asked for."""
    folder.mkdir(parents=True, exist_ok=True)

    def prepare(rank: int) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup
        step_once = TrainingStep.__call__

        def recorded(self: TrainingStep, batch: Batch, step: int) -> StepReport:
            report = step_once(self, batch, step)
            images = [image for group in batch.groups for image in group.images]
            digests = "" if batch.skipped else " ".join(map(digest, images))
            (folder / f"{step}.{rank}").write_text(digests)
            return report

        TrainingStep.__call__ = recorded  # type: ignore[method-assign]

    return prepare


def digest(image: torch.Tensor) -> str:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest()


def steps_done(folder: Path) -> int:
    """Of the run, by the main process of a session; 0 while it has done none."""
    return max((int(path.stem) + 1 for path in folder.glob("*.0")), default=0)


def main(argv: list[str]) -> int:
    given = dict(word.split("=", 1) for word in argv)
    steps, seed = int(given.get("steps", 300)), int(given.get("seed", 0))
    faults = given["faults"].split(",") if "faults" in given else list(FAULTS)
    folder = Path(given.get("folder") or tempfile.mkdtemp(prefix="soak."))
    digits, reports = folder / "digits", []
    make_digits(digits)
    for name, key, default, worlds in (
        ("any_world", "kills", 30, [1, 2]),
        ("two_processes", "fixed_kills", 20, [2]),
    ):
        reference, world = folder / f"{name}-reference", worlds[0]
        words, output = options(reference, digits, steps), folder / f"{name}-reference-output"
        with Ranks(world, words, output, lambda rank: None) as ranks:
            assert ranks.wait() == [0] * world, ranks.text()
        soak = Soak(folder, digits, name, steps=steps, seed=seed)
        soak(kills=int(given.get(key, default)), worlds=worlds, faults=faults)
        soak.judge(reference)
        reports.append(soak.report)
    good = not any(report["problems"] for report in reports)
    if good and "folder" not in given:
        shutil.rmtree(folder)
    print(json.dumps({"passed": good, "soaks": reports}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
