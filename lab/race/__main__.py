"""python -m lab.race train | link | loss | target."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.bench.result import Question, Result
from lab.race import train
from lab.race.contenders import FIELD
from lab.race.curves import Training
from lab.race.race import Race
from lab.race.target import Part, TargetRace
from lab.race.target_settings import TargetSettings
from lab.race.time_to_loss import Rates
from lab.race.to_loss import FullRace
from lab.race.workload import TrainingWorkload
from packsaddle.cli import Group, serve


@dataclass(frozen=True)
class _Training(Question):
    """Options of the benchmarks of whole training steps."""

    # The network
    model: Literal["mnist-autoencoder", "resnet18"] = "mnist-autoencoder"
    # Examples per worker and step; by default 64 for the autoencoder, 8 for ResNet-18
    batch: int | None = None
    # The contenders: compressors such as 'TopK(0.01)', and peers (ddp, ddp-fp16, ..., powersgd-N, local-sgd-N). Each
    # may say its own step size, as in 'ddp lr=0.2', and a compressor its noise and momentum, as in 'TopK(0.01)
    # noise=0.01', or hook=bucket (hook=model) to go behind DDP, or every=8 for local updates of SGD, with delay,
    # fragments and outer=nesterov (DiLoCo's), as in 'TopK(0.03) every=8 delay=2'.
    contenders: tuple[str, ...] = FIELD
    # Step size of those that say none
    lr: float = 0.1
    # Folder of MNIST, or of CIFAR-10 or an image folder of 32 x 32; without it the images are synthetic
    data_dir: Path | None = None
    # Turns of each contender
    rounds: int = 5
    # Consecutive steps in one turn
    block: int = 4
    # Seed of the network and of the batches
    seed: int = 0

    def race(self) -> Race:
        batch = {"mnist-autoencoder": 64, "resnet18": 8}[self.model] if self.batch is None else self.batch
        workload = TrainingWorkload(self.model, batch, None if self.data_dir is None else str(self.data_dir), self.seed)
        return Race(workload, self.contenders, self.lr, self.rounds, self.block)


@dataclass(frozen=True)
class Train(_Training):
    """Time a training step on local processes, compared with torch's own ways to exchange gradients.

    Examples:
        python -m lab.race train --model resnet18
        python -m lab.race train --contenders ddp 'RandomK(0.01) noise=0.01' --rounds 3
    """

    # Worker processes on this machine
    workers: int = 2

    def run(self) -> list[Result]:
        return train.race_on_workers(self.race(), self.workers)


@dataclass(frozen=True)
class Link(_Training):
    """Time training over a rate-limited link, and compare it with the floor by its bytes. (Needs root and iproute2.)

    Hosts are network namespaces on this machine, whose links have a limited rate.

    Examples:
        python -m lab.race link --rate 100 --model resnet18
    """

    # Number of hosts; each runs one worker under torchrun
    hosts: int = 2
    # Mbit/s of every host's link: of what it receives, and without --up also of what it sends
    rate: float = 100.0
    # Mbit/s of what a host sends, where that is another rate
    up: float | None = None

    def run(self) -> list[Result]:
        return train.race_on_hosts(self.race(), self.hosts, self.rate, self.up)


_PEERS_OF_A_RACE = ("ddp", "ddp-fp16", "powersgd-1", "powersgd-4", "local-sgd-32", "diloco-32", "sparseloco-32")
_OURS_IN_A_RACE = (
    "TopK(0.1) hook=bucket",
    "TopK(0.01) hook=bucket",
    'TopK(1/16, values="int2") every=2',
    'TopK(1/16, values="int2") every=8',
    'TopK(1/48, values="int2") every=32',
)


@dataclass(frozen=True)
class Loss(Question):
    """Race to a validation loss: each contender's curve once, its step time on each link, and the time to the loss.

    Step sizes are searched for on one grid, with seed 0; the best of each contender has more seeds. Results in the
    folder are not made again. (Steps need root and iproute2; diloco-N needs torchft.)

    Examples:
        python -m lab.race loss --out race
        python -m lab.race loss --out race --only curves --contenders ddp diloco-32 'TopK(1/48) every=32'
        python -m lab.race loss --out race --only tables
    """

    # Folder of curves.csv and steps.csv, which are added to.
    out: Path = Path("race")
    # One part: the training curves, the steps on links, or the tables of what is there
    only: Literal["all", "curves", "steps", "tables"] = "all"
    # nanoGPT's network of 0.83 or 10.7 million parameters with AdamW, or ResNet-18, also with a quarter of the
    # channels, with SGD and momentum.
    model: Literal["gpt", "gpt-10m", "resnet18", "resnet18-16"] = "gpt"
    # Folder of text, by default the source of Python's standard library; or of CIFAR-10 or an image folder
    data_dir: Path | None = None
    # Numbers of workers, each with a race of its own; in steps each is a host
    workers: tuple[int, ...] = (2,)
    # As for link. One may train for another number of steps, as in 'TopK(1/48) every=32 steps=1600', and one that names
    # its lr is listed once for each.
    contenders: tuple[str, ...] = (*_PEERS_OF_A_RACE, *_OURS_IN_A_RACE)
    # The grid of step sizes
    lrs: tuple[float, ...] = (0.001, 0.002, 0.004)
    # Seeds of each contender at its best step size
    seeds: int = 3
    # Steps of a training
    steps: int = 1000
    # Steps between evaluations
    every: int = 50
    # Examples per worker and step
    batch: int = 8
    # Mbit/s of the links; 10/100 is 10 up and 100 down
    rates: tuple[str, ...] = ("10", "50", "200", "1000")
    # Turns of each contender on a link
    rounds: int = 3
    # Consecutive steps in one turn, at least; whole periods
    block: int = 2

    def run(self) -> list[Result]:
        workload = TrainingWorkload(self.model, self.batch, None if self.data_dir is None else str(self.data_dir))
        training = Training(workload, "adamw" if workload.reads_text else "momentum", self.steps, self.every)
        links = tuple(map(Rates.parse, self.rates))
        race = FullRace(
            self.out,
            training,
            self.workers,
            self.contenders,
            self.lrs,
            self.seeds,
            links,
            rounds=self.rounds,
            block=self.block,
        )
        results = race.run(self.only)
        if not results:
            raise ValueError(f"out {self.out} has no curves of ddp and no steps yet")
        return results


_SETTINGS = Path(__file__).parents[2] / "experiments" / "race" / "target" / "settings.toml"


@dataclass(frozen=True)
class Target(Question):
    """Train on links until a validation loss is reached, by the clock: start, steps and flush of each method.

    The methods and the target are in a settings file. Results in the folder are not made again. (Needs root and
    iproute2, unless --rates local.)

    Examples:
        python -m lab.race target --rates 10 --workers 2 --only steps
        python -m lab.race target --rates 10 --workers 2 --only plan
        python -m lab.race target --rates 10 --workers 2 --methods 'Muon, local 8, Sign' 'Muon, local SGD 128'
        python -m lab.race target --only tables
    """

    # TOML file with the target, the training, the links and the methods; by default
    # experiments/race/target/settings.toml.
    settings: Path = _SETTINGS
    # Folder of runs.csv and steps.csv, which are added to; by default that of the settings.
    out: Path | None = None
    # One part: the timed steps, the trainings, the list of missing trainings, or the tables of what is there
    only: Part = "all"
    # Names of methods in the settings; by default all
    methods: tuple[str, ...] = ()
    # Numbers of workers; by default those of the settings
    workers: tuple[int, ...] = ()
    # Mbit/s of the links, or local for processes of this machine without a link; by default those of the settings
    rates: tuple[str, ...] = ()
    # Number of trainings of each method, with different seeds; by default that of the settings
    seeds: int | None = None

    def run(self) -> list[Result]:
        settings = TargetSettings.read(self.settings)
        race = TargetRace(
            settings,
            self.out or self.settings.parent,
            self.methods or tuple(method.name for method in settings.methods),
            self.workers or settings.workers,
            self.rates or settings.rates,
            self.seeds or settings.seeds,
        )
        return race.run(self.only)


PROGRAM = "python -m lab.race"
COMMANDS = Group(
    "Race packsaddle and its peers: whole training steps, and time to a validation loss.",
    {"train": Train, "link": Link, "loss": Loss, "target": Target},
)


def main() -> None:
    """Run the race that the command line names."""
    serve(COMMANDS, PROGRAM)


if __name__ == "__main__":
    main()
