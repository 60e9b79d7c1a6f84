"""python -m lab.race train | clock | steps | tables: one workload, one table of methods, and what each method costs."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch.distributed import is_torchelastic_launched

from lab.race import tables as race_tables
from lab.race.clock import LOCAL, Job, rates_of, time_steps, time_training
from lab.race.gpt import BATCH, NETWORKS, RATE, STEPS, WARM_UP, Recipe
from lab.race.methods import METHODS
from lab.race.text import Text
from lab.race.train import make, rows
from packsaddle.cli import Group, serve
from packsaddle.comm import process_group
from packsaddle.errors import ConfigError, check_counts, check_integers
from packsaddle.options.schema import nearest


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """What is trained: every combination of these, by nanoGPT's recipe."""

    # nanoGPT's input.txt (tinyshakespeare), "library" for the source of Python's standard library, or a file of GPT-2's
    # tokens in nanoGPT's format, NAME.bin
    text: str
    # The file of the rows, to which new ones are added
    out: Path
    # Names of methods, such as dense and 'local, agreement'; a wrong one lists all
    methods: tuple[str, ...] = ("dense", "local, agreement")
    # Numbers of workers
    workers: tuple[int, ...] = (2,)
    # Seeds of the network and the windows
    seeds: tuple[int, ...] = (0,)
    # Lengths in steps, of the whole recipe with its cosine
    steps: tuple[int, ...] = (STEPS,)
    # Highest learning rates
    rates: tuple[float, ...] = (RATE,)
    # Steps of warm-up
    warm_up: int = WARM_UP
    # Windows of a step of one worker
    batch: int = BATCH
    # The optimizer inside; muon: for hidden matrices
    inner: Literal["adamw", "muon"] = "adamw"
    # Millions of parameters
    size: Literal["0.05M", "0.1M", "0.3M", "0.8M", "124M"] = "0.8M"

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ConfigError(f"methods must be of {'; '.join(METHODS)}, got {name!r}{nearest(name, METHODS)}")
        for name in ("methods", "workers", "seeds", "steps", "rates"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must have at least one value")
        check_counts(batch=self.batch, workers=min(self.workers), steps=min(self.steps))
        check_integers(0, warm_up=self.warm_up, seeds=min(self.seeds))
        if not all(0 < rate < float("inf") for rate in self.rates):
            raise ConfigError(f"rates must be positive and finite, got {', '.join(map(str, self.rates))}")
        if self.warm_up >= min(self.steps):
            raise ConfigError(f"warm_up must be below steps = {min(self.steps)}, got {self.warm_up}")

    def recipes(self) -> list[Recipe]:
        """Return the recipes, one for each length and rate."""
        network = asdict(NETWORKS[self.size])
        return [
            Recipe(**network, steps=steps, rate=rate, warm_up=self.warm_up, batch=self.batch, inner=self.inner)
            for steps, rate in product(self.steps, self.rates)
        ]


def train(*, what: Trainings, device: Literal["cpu", "cuda"] = "cpu") -> None:
    """Train with simulated workers, or under torchrun with a process for each; a row has the loss and the bytes sent.

    One worker trains with dense alone. Rows that the file has are not made again.

    Examples:
        python -m lab.race train --text input.txt --workers 1 2 4 --seeds 0 1 2 --out rows.csv
        python -m lab.race train --text library --steps 1000 1250 --rates 0.004 0.008 --out rows.csv
        torchrun --nproc-per-node 2 -m lab.race train --text train.bin --size 124M --device cuda --out rows.csv

    Args:
        what: What is trained.
        device: Where; on cuda in bfloat16.
    """
    text = Text.read(what.text)
    torch.set_num_threads(1)
    under_torchrun = is_torchelastic_launched()
    for name in what.methods:
        if not (METHODS[name].is_simulated or under_torchrun):
            raise ConfigError(f"methods {name!r} needs a process for each worker: use torchrun, or clock")
    with process_group() if under_torchrun else nullcontext():
        for seed, workers, name, recipe in product(what.seeds, what.workers, what.methods, what.recipes()):
            if workers > 1 or name == "dense":
                make(what.out, text, name, workers, seed, recipe, device)


def clock(*, what: Trainings, links: tuple[str, ...] = ("10",), every: int = 100) -> None:
    """Time whole trainings on hosts with a slow link between them; a row has seconds, losses by the way, and bytes.

    With several workers, dense is DistributedDataParallel. One machine alone is dense with --workers 1, and is timed
    while a second host is as busy. (Links need root and iproute2.)

    Examples:
        python -m lab.race clock --text input.txt --methods dense --workers 1 --rates 0.004 --out clock.csv
        python -m lab.race clock --text input.txt --methods 'local, overlap' --steps 1010 --rates 0.008 --out clock.csv
        python -m lab.race clock --text library --methods 'torchft DiLoCo 32' --links 10 10/100 local --out clock.csv

    Args:
        what: What is trained.
        links: Mbit/s of the hosts' links; 10/100 sends at 10 and receives at 100; local is no link.
        every: Steps between two evaluations, which are not timed.
    """
    text = Text.read(what.text)
    _check(every=every)
    for link in links:
        rates_of(link) if link != LOCAL else None
    for seed, link, workers, name, recipe in product(what.seeds, links, what.workers, what.methods, what.recipes()):
        job = Job(what.text, (name,), workers, seed, recipe, every)
        time_training(what.out, job, link, max(2, workers), text.digest)


def steps(*, what: Trainings, links: tuple[str, ...] = ("10",), rounds: int = 3, turn: int = 16) -> None:
    """Time the steps of methods on links, in turns with training alone; a row has the milliseconds of a step.

    Examples:
        python -m lab.race steps --text input.txt --methods dense 'dense, 16 bits' local --links 10 200 --out steps.csv

    Args:
        what: What is trained; of lengths and rates the first.
        links: Mbit/s of the hosts' links; 10/100 sends at 10 and receives at 100; local is no link.
        rounds: Turns of each method.
        turn: Steps of a turn, at least; whole periods.
    """
    text = Text.read(what.text)
    _check(rounds=rounds, turn=turn)
    names = tuple(dict.fromkeys(("alone", *what.methods)))
    for link, workers in product(links, what.workers):
        job = Job(what.text, names, workers, what.seeds[0], what.recipes()[0], rounds=rounds, turn=turn)
        time_steps(what.out, job, link, text.digest)


def tables(path: Path = race_tables.ROWS, /, *, sizes: bool = False) -> None:
    """Print the tables of a file of rows: losses, speed-ups over one machine alone, and their upper limits.

    Examples:
        python -m lab.race tables
        python -m lab.race tables sizes.csv --sizes

    Args:
        path: The file; by default experiments/nanogpt/runs.csv.
        sizes: The gaps to dense training by size of the network instead.
    """
    if not path.exists():
        raise ConfigError(f"path must be a file of rows, got {path}, which does not exist")
    every = rows(path)
    print(race_tables.sizes(every) if sizes else race_tables.every_table(every))


def _check(**counts: int) -> None:
    try:
        check_counts(**counts)
    except ValueError as error:
        raise ConfigError(str(error)) from None


PROGRAM = "python -m lab.race"
COMMANDS = Group(
    "Race packsaddle and its peers: losses, bytes and seconds of a small GPT's training.",
    {"train": train, "clock": clock, "steps": steps, "tables": tables},
)


def main() -> None:
    """Run the command that the command line names."""
    serve(COMMANDS, PROGRAM)


if __name__ == "__main__":
    main()
