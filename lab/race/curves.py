"""Validation losses of contenders over their training, on this machine's own workers.

The progress of a contender per step does not depend on the link, so its curve is measured once, without a link, and its
step is timed on links separately (see `lab.race.race`). A loss is that of the mean of the workers' models, since
a method whose workers differ between rounds has no other common model.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.origin import UNKNOWN, Origin
from lab.race.contenders import Contender, parse
from lab.race.peers import CannotRunError, Racer, enter
from lab.race.race import settle
from lab.race.recipe import Kind, Recipe
from lab.race.workload import TrainingWorkload, evenly_spaced
from lab.rows import add_rows, read_rows
from lab.tasks import Dataset
from packsaddle.comm import Group, process_group

_HELD_OUT = 512  # number of held-out examples for a validation loss, evenly spaced
_AT_ONCE = 64


@dataclass(frozen=True)
class Job:
    """One training: a contender at one step size, with one seed."""

    workers: int
    contender: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Curve:
    """The result of one training.

    losses[i] is the validation loss after (i + 1) * every steps, or None if it is not finite.
    """

    workers: int
    contender: str
    lr: float
    seed: int
    steps: int
    every: int
    losses: tuple[float | None, ...]
    sent: float  # bytes that this worker sends per step
    seconds: float  # duration of the training on this machine, without evaluations
    peak_mb: float  # peak memory of worker 0's process
    origin: Origin = UNKNOWN

    @property
    def job(self) -> Job:
        """The training job whose result this curve is."""
        return Job(self.workers, self.contender, self.lr, self.seed)

    @property
    def final(self) -> float:
        """The last validation loss; inf if it is not finite."""
        return math.inf if self.losses[-1] is None else self.losses[-1]

    def loss_at(self, step: float) -> float:
        """Return the loss after a number of steps, interpolated linearly between two evaluations.

        Before the first evaluation, it is the loss of the first evaluation.
        """
        losses = [math.inf if loss is None else loss for loss in self.losses]
        place = min(max(step / self.every - 1, 0.0), len(losses) - 1.0)
        before, share = int(place), place - int(place)
        return losses[before] if share == 0 else (1 - share) * losses[before] + share * losses[before + 1]

    def steps_to(self, loss: float) -> float | None:
        """Return the number of steps at which the curve first reaches `loss`, interpolated linearly.

        Returns None if the curve never reaches it.
        """
        before = (0.0, math.inf)
        for i, found in enumerate(self.losses):
            now = ((i + 1.0) * self.every, math.inf if found is None else found)
            if now[1] <= loss:
                share = 1.0 if before[1] == math.inf else (before[1] - loss) / (before[1] - now[1])
                return before[0] + share * (now[0] - before[0])
            before = now
        return None


@dataclass(frozen=True)
class Training:
    """The settings that are common to all jobs of a race."""

    workload: TrainingWorkload
    optimizer: Kind
    steps: int
    every: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.every <= self.steps:
            raise ValueError(f"every must be 1 to steps = {self.steps}, got {self.every}")

    def read(self, job: Job) -> tuple[Contender, Recipe]:
        """Return a job's contender and recipe. Raises ValueError if the contender's text is invalid."""
        contender = parse(job.contender, job.lr)
        return contender, Recipe(self.optimizer, contender.steps or self.steps)


def train_all(training: Training, jobs: Sequence[Job], out: Path) -> None:
    """Run the jobs on the launcher's workers; worker 0 adds each finished curve to the file."""
    with process_group() as group:
        settle(group)
        for job in jobs:
            try:
                curve = train(training, job, group)
            except CannotRunError as error:
                if group.rank == 0:
                    print(f"{job.contender} cannot run here: {error}", flush=True)
                continue
            if group.rank == 0:
                append(out, curve)
                print(f"{job}: {curve.final:.4f} in {curve.seconds:.0f} s", flush=True)


def train(training: Training, job: Job, group: Group) -> Curve:
    """Train one contender and return its curve; collective."""
    contender, recipe = training.read(job)
    workload = replace(training.workload, seed=job.seed)
    batches = workload.batches(workload.examples(), group.rank, group.size)
    held_out = workload.examples(train=False)
    _forget_peak()
    racer = enter(contender, workload.task(), recipe)
    losses: list[float | None] = []
    seconds = 0.0
    while racer.steps < recipe.steps and (not losses or losses[-1] is not None):
        read = [batches(racer.steps + i) for i in range(training.every)]
        begin = time.perf_counter()
        for batch in read:
            racer.step(batch)
        seconds += time.perf_counter() - begin
        loss = validate(racer, held_out, group)
        losses.append(round(loss, 5) if math.isfinite(loss) else None)
    sent = racer.moved(racer.steps).sent / racer.steps
    racer.end()
    return Curve(
        **asdict(job),
        steps=recipe.steps,
        every=training.every,
        losses=tuple(losses),
        sent=round(sent, 1),
        seconds=round(seconds, 2),
        peak_mb=round(_peak(), 1),
        origin=Origin.here(text=workload.text_hash()),
    )


@torch.no_grad()
def validate(racer: Racer, held_out: Dataset, group: Group) -> float:
    """Return the loss of the mean of the workers' models on held-out examples; collective."""
    tensors = [t.data for t in (*racer.task.parameters(), *racer.task.buffers()) if t.is_floating_point()]
    own = [t.clone() for t in tensors]
    for t in tensors:
        mean = t.contiguous().clone()
        group.all_reduce(mean)
        t.copy_(mean / group.size)
    spaced = evenly_spaced(len(held_out), _HELD_OUT)
    racer.task.eval()
    mine = torch.split(spaced[group.rank :: group.size], _AT_ONCE)
    cpu = torch.device("cpu")
    total: Tensor = torch.stack([racer.task(*held_out.batch(index, cpu)).double() * len(index) for index in mine]).sum()
    racer.task.train()
    for t, before in zip(tensors, own, strict=True):
        t.copy_(before)
    group.all_reduce(total)
    return float(total) / len(spaced)


def load(path: Path) -> list[Curve]:
    """Return the curves in a CSV file, [] if it does not exist. Raises ValueError for a row that is not a curve."""
    return read_rows(path, _curve, "curve")


def append(path: Path, curve: Curve) -> None:
    """Add a curve to a CSV file."""
    losses = " ".join("-" if loss is None else f"{loss:.4f}" for loss in curve.losses)
    row = asdict(curve) | {"losses": losses}
    add_rows(path, [row | row.pop("origin")])


def best_rate(curves: Iterable[Curve]) -> float:
    """Return the step size of the curve with the lowest final loss. The curves must be of one contender and seed."""
    return min(curves, key=lambda curve: curve.final).lr


def _curve(row: Mapping[str, Any]) -> Curve:
    losses = tuple(None if word == "-" else float(word) for word in row["losses"].split())
    whole: dict[str, Any] = {name: int(row[name]) for name in ("workers", "seed", "steps", "every")}
    real: dict[str, Any] = {name: float(row[name]) for name in ("lr", "sent", "seconds", "peak_mb")}
    return Curve(contender=row["contender"], losses=losses, origin=Origin.of_row(row), **whole, **real)


def _forget_peak() -> None:
    """Reset the kernel's record of this process's peak memory, if supported (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> float:
    """Return the peak memory of this process in MB; 0 if it is unknown."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1000 if found else 0.0
