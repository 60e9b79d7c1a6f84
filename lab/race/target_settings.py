"""The settings of a race to a target by the clock: one file with the target, the links and the methods.

Learning rates are those of the simulated trainings in experiments/muon that reach the target in the fewest steps. The
curves of these trainings also predict the number of steps.
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
from lab.tasks import ModelConfig
from packsaddle.compressors import Compressor, parse_compressor
from packsaddle.errors import ConfigError
from packsaddle.options import build

Kind = Literal["alone", "dense", "hook", "local", "local-sgd", "powersgd"]
Inner = Literal["adamw", "muon"]
SIMULATED = Path(__file__).parents[2] / "experiments" / "muon"
_CURVE = 50  # steps between two points of a simulated curve


@dataclass(frozen=True)
class Method:
    """One method of training: `kind` is the way in which workers exchange, `inner` the optimizer of each worker.

    "alone": no exchange, to time the computing; "dense": DistributedDataParallel; "hook": the same with packsaddle's
    hook; "local": packsaddle's LocalUpdates; "local-sgd": torch's averager of parameters; "powersgd": torch's hook.
    """

    name: str
    kind: Kind
    inner: Inner
    lr: float  # learning rate if `row` does not exist
    row: str = ""  # name of a method in experiments/muon; its best rate is used, and its curves predict the steps
    every: int = 1  # period of exchanges, in steps
    compressor: str = "Sign(per_tensor=True)"  # compressor for the kinds "local" and "hook"; "Half": float16
    dense_below: int = 1024  # argument of packsaddle.Compression, for "local" only
    exchange: Literal["auto", "direct", "two-way"] = "auto"  # argument of packsaddle.Compression, for "local" only
    overlap: int = 0
    outer: tuple[float, float] | None = None  # rate and Nesterov momentum of DiLoCo's outer optimizer
    keep_unsent: bool = True
    flush: Literal["whole", "compressed"] = "whole"  # "compressed": with the compressor of the rounds, for "local"
    bits: int = 32  # bits per coordinate of a gradient, for "dense"
    rank: int = 4  # rank of PowerSGD
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
        """Return the compressor for the kinds "local" and "hook". Raises ValueError if it is unknown."""
        return Half() if self.compressor == "Half" else parse_compressor(self.compressor)

    def is_quiet(self, step: int) -> bool:
        """Return True if no overlapping exchange runs after `step` steps."""
        return step % self.every >= self.overlap

    def next_quiet(self, step: int) -> int:
        """Return the first step, not before `step`, after which no exchange runs."""
        while not self.is_quiet(step):
            step += 1
        return step


def alone(inner: Inner) -> Method:
    """Return the method without exchanges, whose step time is the computing time of all methods."""
    return Method(f"{inner}, alone", "alone", inner, 1e-4)


@dataclass(frozen=True)
class TargetSettings:
    """The settings of a race to a target: the target loss, the training, the links and the methods."""

    target: float  # validation loss, nats per character
    steps: int
    model: ModelConfig
    methods: tuple[Method, ...]
    workers: tuple[int, ...]
    rates: tuple[str, ...]  # rates of the links, Mbit/s; "local": processes of this machine without a slow link
    warm_up: int = 50
    evaluate_every: int = 50
    windows: int = 256
    batch: int = 8
    max_seconds: float = 900.0
    seeds: int = 3
    block: int = 100  # minimum number of steps of a timed block; fewer if they take longer than block_seconds
    block_seconds: float = 20.0
    rounds: int = 3  # number of timed blocks of each method
    text: str = ""  # folder of the training text; "": the source of Python's standard library

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"methods must have different names, got {names}")
        for name in ("steps", "evaluate_every", "windows", "batch", "seeds", "rounds", "block", "warm_up"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def read(cls, path: Path) -> "TargetSettings":
        """Read the settings from a TOML file.

        The key `like` may name another file in the same folder, which then has all settings that this file omits,
        except methods. Raises ConfigError for an unreadable file or invalid settings.
        """
        return build(cls, _document(path))

    def method(self, name: str) -> Method:
        """Return a method by name, including the methods of `alone`. Raises ConfigError if there is none."""
        everything = {each.name: each for each in (*self.methods, *map(alone, get_args(Inner)))}
        if name not in everything:
            raise ConfigError(f"methods must be one of {', '.join(everything)}, got {name!r}")
        return everything[name]


def _document(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file, completed by those of the file that its key `like` names, except methods."""
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if "like" in found:
        base = _document(path.with_name(str(found.pop("like"))))
        found = {key: value for key, value in base.items() if key != "methods"} | found
    return found


def simulated(method: Method, workers: int, target: float) -> list[dict[str, str]]:
    """Return a method's simulated trainings at its best learning rate, one per seed; [] if there are none.

    The best rate is the one at which seed 0 reaches the target in the fewest steps.
    """
    path = SIMULATED / f"gpt-w{workers}.csv"
    if not method.row or not path.exists():
        return []
    with path.open(newline="") as file:
        mine = [row for row in csv.DictReader(file) if row["method"] == method.row]
    fewest = min((row for row in mine if row["seed"] == "0"), key=lambda row: steps_and_loss(row, target), default=None)
    return [row for row in mine if fewest is not None and row["rate"] == fewest["rate"]]


def rate_of(method: Method, workers: int, target: float) -> float:
    """Return the learning rate of a method: the best rate of simulated trainings with this number of workers.

    If there are none, it is the best rate with two workers, and otherwise `method.lr`.
    """
    found = simulated(method, workers, target) or simulated(method, 2, target)
    return float(found[0]["rate"]) if found else method.lr


def _steps(row: Mapping[str, str], target: float) -> float | None:
    return steps_to([float(loss) for loss in row["curve"].split()], target)


def steps_and_loss(row: Mapping[str, str], target: float | None) -> tuple[float, float]:
    """Return the steps to the target and the loss of a training, by which learning rates are compared.

    The steps are infinite if the target was not reached, and 0 if `target` is None.
    """
    steps = 0.0 if target is None else _steps(row, target)
    return math.inf if steps is None else steps, float(row["validation_loss"])


def steps_to(losses: list[float], target: float, every: int = _CURVE) -> float | None:
    """Return the number of steps at which losses, measured every `every` steps, first reach the target.

    It is interpolated linearly. Returns None if the target is not reached.
    """
    before = (0.0, float("inf"))
    for i, loss in enumerate(losses):
        now = ((i + 1.0) * every, loss)
        if loss <= target:
            part = 1.0 if i == 0 else (before[1] - target) / (before[1] - loss)
            return before[0] + part * (now[0] - before[0])
        before = now
    return None


def predicted_steps(method: Method, workers: int, target: float) -> tuple[float, float, float] | None:
    """Return the mean, minimum and maximum over seeds of a method's simulated steps to the target.

    Returns None if there are no simulated trainings, or if some did not reach the target.
    """
    found = [_steps(row, target) for row in simulated(method, workers, target)]
    reached = [steps for steps in found if steps is not None]
    return (statistics.fmean(reached), min(reached), max(reached)) if reached and None not in found else None
