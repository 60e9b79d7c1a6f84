"""The settings of a race to a target by the clock: one file with the target, the links and the methods.

Learning rates are those of the simulated trainings in experiments/muon that reach the target in the fewest steps, and
their curves also predict these steps.
"""

import csv
import math
import statistics
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lab.race.inner import Half
from lab.runs import ModelConfig
from packsaddle.compressors import Compressor, parse_compressor
from packsaddle.errors import ConfigError
from packsaddle.options import build

Kind = Literal["alone", "dense", "hook", "local", "local-sgd", "powersgd"]
Inner = Literal["adamw", "muon"]
SIMULATED = Path(__file__).parents[2] / "experiments" / "muon"
_CURVE = 50  # steps between two points of a simulated curve


@dataclass(frozen=True)
class Method:
    """One method of training: `kind` is how workers exchange, `inner` the optimizer of each.

    "alone": no exchange, to time the computing; "dense": DistributedDataParallel; "hook": the same with packsaddle's
    hook; "local": packsaddle's LocalUpdates; "local-sgd": torch's averager of parameters; "powersgd": torch's hook.
    """

    name: str
    kind: Kind
    inner: Inner
    lr: float  # used if the row does not exist
    row: str = ""  # method in experiments/muon, whose best rate is used, and whose curves predict the steps
    every: int = 1  # period of exchanges, in steps
    compressor: str = "Sign(per_tensor=True)"  # for "local" and "hook"; "Half": float16
    dense_below: int = 1024  # for "local"
    exchange: Literal["auto", "direct", "two-way"] = "auto"  # for "local"
    overlap: int = 0
    outer: tuple[float, float] | None = None  # rate and Nesterov momentum of DiLoCo's outer optimizer
    keep_unsent: bool = True
    flush: Literal["whole", "compressed"] = "whole"  # "compressed": with the compressor of the rounds, for "local"
    bits: int = 32  # of a gradient, for "dense"
    rank: int = 4  # of PowerSGD
    start: int = 2  # first compressed step of PowerSGD

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.every < 1 or not 0 <= self.overlap < self.every:
            raise ValueError(f"every must be at least 1 and overlap below it, got {self.every} and {self.overlap}")
        if self.bits not in (16, 32):
            raise ValueError(f"bits must be 16 or 32, got {self.bits}")
        self.make_compressor()

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's betas, as in experiments/muon."""
        return (0.9, 0.99) if self.inner == "muon" else (0.8, 0.99)

    def make_compressor(self) -> Compressor:
        """Return the compressor of "local". Raises ValueError for an unknown one."""
        return Half() if self.compressor == "Half" else parse_compressor(self.compressor)

    def is_quiet(self, step: int) -> bool:
        """Return True if no overlapping exchange runs after `step` steps."""
        return step % self.every >= self.overlap

    def next_quiet(self, step: int) -> int:
        """Return the first step from `step` on after which no exchange runs."""
        while not self.is_quiet(step):
            step += 1
        return step


def alone(inner: Inner) -> Method:
    """Return training without exchanges, whose step is the computing of all methods."""
    return Method(f"{inner}, alone", "alone", inner, 1e-4)


@dataclass(frozen=True)
class TargetSettings:
    """The target, the training, the links and the methods."""

    target: float  # validation loss, nats per character
    steps: int
    model: ModelConfig
    methods: tuple[Method, ...]
    workers: tuple[int, ...]
    rates: tuple[str, ...]  # Mbit/s, or "local": processes of this machine without a link
    warm_up: int = 50
    evaluate_every: int = 50
    windows: int = 256
    batch: int = 8
    max_seconds: float = 900.0
    seeds: int = 3
    block: int = 100  # steps of a timed block, at least; fewer if they take longer than block_seconds
    block_seconds: float = 20.0
    rounds: int = 3  # timed blocks of each method
    text: str = ""  # folder of text; "": the library

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"methods must have different names, got {names}")
        for name in ("steps", "evaluate_every", "windows", "batch", "seeds", "rounds", "block", "warm_up"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def read(cls, path: Path) -> "TargetSettings":
        """Read a TOML file; `like`, the name of a file beside it, has the settings that it leaves out, except methods.

        Raises ConfigError for an unreadable file or invalid settings.
        """
        return build(cls, _document(path))

    def method(self, name: str) -> Method:
        """Return a method by name, also those of `alone`. Raises ConfigError."""
        everything = {each.name: each for each in (*self.methods, *map(alone, get_args(Inner)))}
        if name not in everything:
            raise ConfigError(f"methods must be one of {', '.join(everything)}, got {name!r}")
        return everything[name]


def _document(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file and of those that it is `like`; its own methods alone."""
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if "like" in found:
        base = _document(path.with_name(str(found.pop("like"))))
        found = {key: value for key, value in base.items() if key != "methods"} | found
    return found


def simulated(method: Method, workers: int, target: float) -> list[dict[str, str]]:
    """Return a method's simulated trainings, or [], at the rate whose seed 0 reaches the target in the fewest steps."""
    path = SIMULATED / f"gpt-{workers}.csv"
    if not method.row or not path.exists():
        return []
    with path.open(newline="") as file:
        mine = [row for row in csv.DictReader(file) if row["method"] == method.row]
    fewest = min((row for row in mine if row["seed"] == "0"), key=lambda row: steps_and_loss(row, target), default=None)
    return [row for row in mine if fewest is not None and row["rate"] == fewest["rate"]]


def rate_of(method: Method, workers: int, target: float) -> float:
    """Return the learning rate: the best simulated one with these workers, or with two, else the setting's."""
    found = simulated(method, workers, target) or simulated(method, 2, target)
    return float(found[0]["rate"]) if found else method.lr


def _steps(row: Mapping[str, str], target: float) -> float | None:
    return steps_to([float(loss) for loss in row["curve"].split()], target)


def steps_and_loss(row: Mapping[str, str], target: float | None) -> tuple[float, float]:
    """Return steps to the target (infinity if not reached, 0 without one) and loss of a training, to compare rates."""
    steps = 0.0 if target is None else _steps(row, target)
    return math.inf if steps is None else steps, float(row["validation_loss"])


def steps_to(losses: list[float], target: float, every: int = _CURVE) -> float | None:
    """Return the number of steps at which a curve first reaches the target, interpolated linearly, or None."""
    before = (0.0, float("inf"))
    for i, loss in enumerate(losses):
        now = ((i + 1.0) * every, loss)
        if loss <= target:
            part = 1.0 if i == 0 else (before[1] - target) / (before[1] - loss)
            return before[0] + part * (now[0] - before[0])
        before = now
    return None


def predicted_steps(method: Method, workers: int, target: float) -> tuple[float, float, float] | None:
    """Return mean, minimum and maximum over seeds of the simulated steps to the target; None: unknown, not reached."""
    found = [_steps(row, target) for row in simulated(method, workers, target)]
    reached = [steps for steps in found if steps is not None]
    return (statistics.fmean(reached), min(reached), max(reached)) if reached and None not in found else None
