"""Runs of a network from a saddle: loss and distance by step, the step at which it has left, and the search of rates.

All methods see the same examples in a step, of which each of several workers gets an equal part.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

import packsaddle
from lab.bench.rate_search import append, climb
from lab.bench.rows_file import read_rows
from lab.runs.tasks import Dataset
from lab.saddles.methods import EVERY, NETWORK_METHODS, Method, local_settings
from packsaddle import LocalUpdates, NonFiniteError

SEEDS = range(3)
REFERENCES = ("SGD", "AdamW", "Muon")  # also trained from the usual initial weights
CLOSELY = 32  # first steps, at each of which methods without local updates are measured; then every EVERY steps
EXPONENTS = range(-14, 7)  # of the rates 2^exponent
GUESS = {"AdamW": -7, "Muon": -7, "SGD, momentum": -2, "RandomK": -1}  # where a search begins, by prefix; 1 for others


class Network(Protocol):
    """A network at a saddle, its data, and the condition for having left."""

    steps: int  # of a run
    batch: int  # examples of a step
    data: Dataset
    certified: list[tuple[Tensor, Tensor]]  # batches of certificates
    starts: tuple[str, ...]  # names of starting points; rates are searched at the first

    def make(self, start: str, seed: int) -> nn.Module:
        """Return a new network at a starting point, whose call with a batch returns the mean loss."""

    def is_hidden(self, name: str) -> bool:
        """Return True if Muon trains the parameter with this name if it is a matrix."""

    def measure(self, task: nn.Module) -> tuple[float, float]:
        """Return the loss of a fixed batch, and the distance from the saddle's subspace (nan: there is none)."""

    def has_left(self, point: "Point") -> bool:
        """Return True if a point is away from the saddle."""

    def saddle_function(self, task: nn.Module) -> tuple[str, nn.Module, float, float | None]:
        """Return the function whose certificate proves a saddle: suffix of its name, module, epsilon, rho (or None)."""


@dataclass(frozen=True)
class Point:
    """One measurement of a run, at the anchor for local updates."""

    step: int
    loss: float
    distance: float


@dataclass
class Run:
    """What a run recorded."""

    points: list[Point]
    left_at: dict[str, Tensor] | None = None  # the weights at the first point away from the saddle
    end: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """One run, as a row of a file."""

    method: str
    start: str
    lr: float
    seed: int
    steps: int  # until it has left the saddle; the steps of the run if it has not
    left: bool
    loss: float  # at the end; inf: diverged
    distance: float  # at the end


def steps_to_leave(points: Iterable[Point], has_left: Callable[[Point], bool]) -> int | None:
    """Return the first step measured away from the saddle, None if there is none."""
    return next((point.step for point in points if has_left(point)), None)


def draw_batch(examples: int, batch: int, seed: int, step: int) -> Tensor:
    """Return the indices of the examples of a step, int64[batch], drawn with replacement; a function of seed, step."""
    return torch.randint(examples, (batch,), generator=torch.Generator().manual_seed(1_000_003 * (seed + 1) + step))


def gradient(network: Network, task: nn.Module, index: Tensor) -> None:
    """Set the gradients to those of the mean loss of the examples `index`."""
    task.zero_grad()
    loss: Tensor = task(*network.data.batch(index, torch.device("cpu")))
    loss.backward()  # type: ignore[no-untyped-call]


def follow(network: Network, name: str, start: str, lr: float, seed: int) -> Run:
    """Train by a method from a starting point, and return what was recorded, without an end if it diverged."""
    method = NETWORK_METHODS[name]
    try:
        if method.local is None:
            return _follow(network, method, start, lr, seed, 0)
        return packsaddle.simulate(partial(_follow, network, method, start, lr, seed), method.workers)[0]
    except NonFiniteError:
        return Run([])


def _follow(network: Network, method: Method, start: str, lr: float, seed: int, rank: int) -> Run:
    task = network.make(start, seed)
    named = [(p.ndim == 2 and network.is_hidden(name), p) for name, p in task.named_parameters()]
    optimizers = method.make([p for matrix, p in named if matrix], [p for matrix, p in named if not matrix], lr)
    local = None if method.local is None else LocalUpdates(optimizers, local_settings(method.local), every=EVERY)
    run = Run([])
    for step in range(network.steps + 1):
        # Measure; the workers of local updates have one anchor.
        if rank == 0 and (step % EVERY == 0 or (local is None and step < CLOSELY)):
            with torch.no_grad(), local.at_anchor() if local else nullcontext():
                point = Point(step, *network.measure(task))
                run.points.append(point)
                if run.left_at is None and network.has_left(point):
                    run.left_at = _copied(task)
                if step == network.steps and math.isfinite(point.loss):
                    run.end = _copied(task)
            if local is None and not math.isfinite(point.loss):
                return run
        if step == network.steps:
            break

        # Step.
        index = draw_batch(len(network.data), network.batch, seed, step)
        gradient(network, task, index.chunk(method.workers)[rank])
        for optimizer in optimizers:
            optimizer.step()
    return run


def _copied(task: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.state_dict().items()}


class Rows:
    """The finished runs of a network, in a file."""

    def __init__(self, network: Network, path: Path) -> None:
        self.network, self.path, self.rows = network, path, read_rows(path, parse_row, "run")

    def get(self, method: str, start: str, lr: float, seed: int) -> Row:
        """Return the row of a run; run it if the file has none."""
        for row in self.rows:
            if (row.method, row.start, row.lr, row.seed) == (method, start, lr, seed):
                return row
        run = follow(self.network, method, start, lr, seed)
        steps = steps_to_leave(run.points, self.network.has_left)
        last = run.points[-1] if run.end is not None else Point(0, math.inf, math.inf)
        until, left = (self.network.steps, False) if steps is None else (steps, True)
        row = Row(method, start, lr, seed, until, left, last.loss, last.distance)
        append(self.path, asdict(row))
        self.rows.append(row)
        return row

    def best(self, method: str) -> float | None:
        """Return the rate with the lowest loss at the end, of seed 0 from the first starting point."""
        return best_rate(self.rows, method, self.network.starts[0])


def best_rate(rows: Iterable[Row], method: str, start: str) -> float | None:
    """Return the rate with the lowest loss at the end, of seed 0 from `start`, None without runs."""
    found = [row for row in rows if (row.method, row.start, row.seed) == (method, start, 0)]
    return min(found, key=lambda row: row.loss).lr if found else None


def parse_row(line: Mapping[str, str]) -> Row:
    """Return the run of a line of the file. Raises KeyError or ValueError if it is invalid."""
    numbers = float(line["lr"]), int(line["seed"]), int(line["steps"])
    left, end = line["left"] == "True", (float(line["loss"]), float(line["distance"]))
    return Row(line["method"], line["start"], *numbers, left, *end)


def measure(rows: Rows, methods: Sequence[str]) -> None:
    """Search each method's rate with seed 0 at the first starting point, then run every seed and starting point."""
    first, *others = rows.network.starts
    for method in methods:
        guess = next((i for prefix, i in GUESS.items() if method.startswith(prefix)), 1)
        # Of two rates at which training diverges, the smaller is the better.
        best = climb(lambda i, method=method: (rows.get(method, first, 2.0**i, 0).loss, i), guess, EXPONENTS)  # type: ignore[misc]
        for seed in SEEDS:
            rows.get(method, first, 2.0**best, seed)
    for seed, start, method in product(SEEDS, others, methods):
        lr = rows.best(method)
        if lr is not None and (start != "usual" or method in REFERENCES):
            rows.get(method, start, lr, seed)
