"""Does a run survive what clusters do? A real training is killed again and again, then compared.

    python -m benchmarks.soak [kills=50] [fixed_kills=20] [steps=600] [seed=0] [folder=...]

Two soaks. In the first each restart has 1 or 2 processes at random; in the second always 2. A kill
is SIGKILL or SIGTERM, at one process or all, at a random step or during start-up. Out: a table, one
line per soak, and a JSON object as the last line; exit code 1 when a promise is broken:

    the last step is reached; eval/neg_elbo_nats within 0.5% of the uninterrupted run's (second
    soak: all weights equal bit for bit); each step has one row; each image of each epoch is used
    once, and each repetition of a step uses the same ones; nothing is left behind: no process, no
    half-written file.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.support.faults import Ranks, last_step
from tests.support.training import arguments, rows, same_weights, status
from vae_dist.config.schema import DataConfig
from vae_dist.data.digits import make_digits
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import load_index
from vae_dist.data.loader import Batch
from vae_dist.data.settings import image_settings
from vae_dist.training.step import StepReport, TrainingStep

BATCH_SIZE = 64
CHECKPOINT_EVERY = 10
SESSION_LIMIT_S = 240.0


@dataclass(frozen=True)
class Report:
    """What a soak found; `problems` is empty when every promise held."""

    name: str
    kills: int
    sigkill: int
    sigterm: int
    during_startup: int
    worlds: str
    steps: int
    steps_trained: int  # repeated ones included
    neg_elbo_nats: float
    difference_percent: float
    bit_for_bit: bool
    epochs_checked: int
    seconds: float
    problems: list[str]


def options(run: Path, digits: Path, steps: int) -> list[str]:
    return arguments(
        run,
        digits,
        f"training.steps={steps}",
        f"training.batch_size={BATCH_SIZE}",
        "data.slots=16",
        f"checkpoint.every={CHECKPOINT_EVERY}",
        "evaluation.every=200",
        "log.num_images=4",
        "data.workers=1",
        "runtime.timeout_s=60",
    )


def uninterrupted(folder: Path, digits: Path, *, steps: int, world: int) -> Path:
    run = folder / f"reference{world}"
    with Ranks(world, options(run, digits, steps), output=folder / f"output{world}") as ranks:
        codes = ranks.wait(timeout_s=600)
        assert codes == [0] * world, ranks.text()
    return run


def soak(
    folder: Path, digits: Path, *, name: str, kills: int, steps: int, seed: int, worlds: list[int]
) -> tuple[Path, Report]:
    """Train to the end through `kills` kills; the run folder and what happened."""
    random_source = random.Random(seed)
    run, begun = folder / name, time.monotonic()
    done: Counter[str] = Counter()
    used: Counter[int] = Counter()
    problems: list[str] = []
    for session in range(kills + 1):
        world = random_source.choice(worlds)
        used[world] += 1
        ranks = Ranks(
            world,
            options(run, digits, steps),
            output=folder / f"{name}-output" / str(session),
            prepare=record(folder / f"{name}-keys" / str(session)),
        )
        with ranks:
            if session == kills:
                codes = ranks.wait(timeout_s=SESSION_LIMIT_S)
                if codes != [0] * world:
                    problems.append(f"the last session ended with {codes}: {ranks.text()}")
                break
            if random_source.random() < 0.15:
                time.sleep(random_source.uniform(0, 1.5))
            else:
                low = steps * session // (kills + 1)
                high = steps * (session + 1) // (kills + 1)
                ranks.wait_for_step(random_source.randint(low, high), timeout_s=SESSION_LIMIT_S)
                time.sleep(random_source.uniform(0, 0.03))
            done["startup"] += not is_running(run)
            number = random_source.choice([signal.SIGKILL, signal.SIGTERM])
            done[number.name] += 1
            victims = random_source.choice([[], [random_source.randrange(world)]])
            ranks.signal(number, *victims)
            codes = ranks.wait(timeout_s=SESSION_LIMIT_S)
            if None in codes:
                problems.append(f"session {session}: a rank hangs after {number.name}: {codes}")
        if left := ranks.orphans():
            problems.append(f"session {session}: processes left behind: {left}")
        print(
            f"{name} {session}: {world} processes, {number.name} to {victims or 'all'} at step "
            f"{last_step(run)}, exit codes {codes}",
            flush=True,
        )
    report = Report(
        name=name,
        kills=kills,
        sigkill=done["SIGKILL"],
        sigterm=done["SIGTERM"],
        during_startup=done["startup"],
        worlds=", ".join(f"{count} x {world}" for world, count in sorted(used.items())),
        steps=steps,
        steps_trained=0,
        neg_elbo_nats=0.0,
        difference_percent=0.0,
        bit_for_bit=False,
        epochs_checked=0,
        seconds=time.monotonic() - begun,
        problems=problems,
    )
    return run, report


def judge(report: Report, run: Path, reference: Path, keys: Path, digits: Path) -> Report:
    """The report with what the run folder and the keys say."""
    problems, steps = list(report.problems), report.steps
    found = status(run)
    if (found["status"], found["step"]) != ("finished", steps):
        problems.append(f"status.json says {found}")
    if sorted(rows(run)) != list(range(1, steps + 1)):
        problems.append("log.jsonl does not have each step once")
    values = [rows(one)[steps]["eval/neg_elbo_nats"] for one in (run, reference)]
    difference = abs(values[0] / values[1] - 1)
    if not difference < 0.005:
        problems.append(f"eval/neg_elbo_nats {values[0]} is not within 0.5% of {values[1]}")
    batches, trained, wrong = used_images(keys)
    problems += wrong
    epochs, wrong = epoch_problems(batches, steps, digits)
    problems += wrong
    if not epochs and not wrong:
        problems.append(f"{steps} steps are less than an epoch, so none was checked")
    if left := list(run.rglob(".*")):
        problems.append(f"files left behind: {left}")
    kept = [path.name for path in (run / "checkpoints").glob("step_*")]
    if len(kept) > 3:
        problems.append(f"more checkpoints than two and the best: {kept}")
    return Report(
        **asdict(report)
        | {
            "steps_trained": trained,
            "neg_elbo_nats": values[0],
            "difference_percent": 100 * difference,
            "bit_for_bit": same_weights(run, reference, steps),
            "epochs_checked": epochs,
            "problems": problems,
        }
    )


def is_running(run: Path) -> bool:
    return (run / "status.json").exists() and status(run)["status"] == "running"


def record(folder: Path) -> Callable[[int], None]:
    """For `prepare`: a line per step and rank, the step and a digest of each image, in order."""
    folder.mkdir(parents=True, exist_ok=True)

    def prepare(rank: int) -> None:
        step_once = TrainingStep.__call__
        file = open(folder / f"{rank}", "a")  # noqa: SIM115

        def recorded(self: TrainingStep, batch: Batch, step: int) -> StepReport:
            report = step_once(self, batch, step)
            images = [image for group in batch.groups for image in group.images]
            digests = " ".join(digest(image) for image in images)
            file.write(f"{step} {digests}\n")
            file.flush()
            return report

        TrainingStep.__call__ = recorded  # type: ignore[method-assign]

    return prepare


def digest(image: torch.Tensor) -> str:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest()


def recorded_steps(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """(step, digests of the global batch) for each step that all ranks of a session did."""
    by_rank = []
    for path in sorted(folder.iterdir(), key=lambda path: int(path.name)):
        lines = path.read_text().split("\n")[:-1]
        by_rank.append({int(line.split()[0]): line.split()[1:] for line in lines})
    for step in sorted(set.intersection(*(set(one) for one in by_rank)) if by_rank else ()):
        yield step, [name for one in by_rank for name in one[step]]


def used_images(keys: Path) -> tuple[dict[int, list[str]], int, list[str]]:
    """Images of each step as the session trained it that counts, the last one."""
    batches: dict[int, list[str]] = {}
    trained, problems = 0, []
    for folder in sorted(keys.iterdir(), key=lambda path: int(path.name)):
        for step, images in recorded_steps(folder):
            trained += 1
            if batches.setdefault(step, images) != images:
                problems.append(f"session {folder.name} repeated step {step} with other images")
            if len(images) != BATCH_SIZE:
                problems.append(f"session {folder.name} used {len(images)} images in step {step}")
    return batches, trained, problems


def epoch_problems(
    batches: dict[int, list[str]], steps: int, digits: Path
) -> tuple[int, list[str]]:
    """(whole epochs, what is wrong with them): each must hold every image of the shards once."""
    index = load_index(str(digits / "train"), key="data.train", create=False)
    settings = image_settings(index, DataConfig(channels=1, resolution="native", max_pixels=2**20))
    stream = EvaluationStream(index, settings, batch_size=1000)
    everything = Counter(
        digest(image) for batch in stream for image in batch.images[batch.weights > 0]
    )
    if sorted(batches) != list(range(steps)):
        return 0, ["some step was trained by no session as a whole"]
    used = [name for step in range(steps) for name in batches[step]]
    size = index.num_samples
    epochs = len(used) // size
    wrong = [e for e in range(epochs) if Counter(used[e * size : (e + 1) * size]) != everything]
    return epochs, [f"epoch {epoch} did not use each image once" for epoch in wrong]


def main(argv: list[str]) -> int:
    given = dict(word.split("=", 1) for word in argv)
    kills, fixed_kills = int(given.get("kills", 50)), int(given.get("fixed_kills", 20))
    steps, seed = int(given.get("steps", 600)), int(given.get("seed", 0))
    folder = Path(given.get("folder") or tempfile.mkdtemp(prefix="soak."))
    digits = folder / "digits"
    make_digits(digits)
    least = -(-load_index(str(digits / "train"), key="", create=False).num_samples // BATCH_SIZE)
    if steps < least:
        print(f"steps={steps} is less than an epoch, of which nothing could be said; give {least}")
        return 2
    one, two = (uninterrupted(folder, digits, steps=steps, world=world) for world in (1, 2))
    reports = []
    for name, count, worlds, reference in (
        ("any_world", kills, [1, 2], one),
        ("two_processes", fixed_kills, [2], two),
    ):
        run, report = soak(
            folder, digits, name=name, kills=count, steps=steps, seed=seed, worlds=worlds
        )
        report = judge(report, run, reference, folder / f"{name}-keys", digits)
        if name == "two_processes" and not report.bit_for_bit:
            report.problems.append("the weights differ from the uninterrupted run's")
        reports.append(report)
    for report in reports:
        print(json.dumps(asdict(report), indent=1))
    good = not any(report.problems for report in reports)
    if good and "folder" not in given:
        shutil.rmtree(folder)
    print(json.dumps({"passed": good, "soaks": [asdict(report) for report in reports]}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
