"""Times of trainings and of steps by the clock: workers are processes on hosts with a slow link between them.

A link is named by its Mbit/s, such as "10", by "10/100" if a host sends at 10 and receives at 100, or "local", which is
processes of this machine without a link. Links need root on Linux (see `lab.race.hosts`). The hosts share one
processor, so one machine alone is timed while the other hosts are equally busy, with the next seeds.

    python -m lab.race.clock JOB.json     # on a host, by torchrun
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lab.origin import Origin
from lab.race.gpt import GPT, Recipe
from lab.race.hosts import HostFailedError, Hosts, available
from lab.race.methods import METHODS, Method, Worker
from lab.race.text import Text
from lab.race.train import has_row, setting_of, train, windows_of
from lab.rows import add_rows
from packsaddle.comm import WorkerFailedError, launch, process_group, resolve
from packsaddle.errors import ConfigError
from packsaddle.options import build
from packsaddle.plan import Timing

LOCAL = "local"  # the link without a limit
_ALONE = 25  # steps of a timed block without exchanges


@dataclass(frozen=True)
class Job:
    """What the workers of a link do: one training (`every` is set), or timed blocks of steps of some methods."""

    text: str  # see `Text.read`
    methods: tuple[str, ...]
    workers: int
    seed: int
    recipe: Recipe
    every: int | None = None  # steps between two evaluations of the training
    rounds: int = 3  # timed blocks of each method, which alternate
    turn: int = 16  # steps of a timed block, at least; whole periods
    interface: str = ""  # network interface whose bytes are counted; "": none


def rates_of(link: str) -> tuple[float, float]:
    """Return the Mbit/s at which a host sends and receives. Raises ConfigError if `link` is no link's name."""
    try:
        up, down = (float(word) for word in (link.split("/") * 2)[:2]) if link.count("/") < 2 else (0.0, 0.0)
    except ValueError:
        up = down = 0.0
    if not (0.1 <= up <= 100_000 and 0.1 <= down <= 100_000):
        raise ConfigError(
            f"links must be Mbit/s of 0.1 to 100,000, such as 50 or 10/100 (up and down), or {LOCAL}, got {link}"
        )
    return up, down


def time_training(path: Path, job: Job, link: str, count: int, digest: str) -> None:
    """Time a training on `count` hosts, and add its row to a file, unless the file has it."""
    (name,) = job.methods
    setting = setting_of(name, job.workers, job.seed, job.recipe) | {"hosts": count, "mbit": link}
    if not has_row(path, setting):
        found = _on_link(job, link, count)
        add_rows(path, [setting | found | asdict(Origin.here(threads=1, text=digest))])


def time_steps(path: Path, job: Job, link: str, digest: str) -> None:
    """Time blocks of steps of all methods in turns on a link, and add a row for each to a file.

    The columns ms, low and high are the median and range over the blocks of the slowest worker.
    """
    origin = asdict(Origin.here(threads=1, text=digest))
    found = _on_link(job, link, job.workers)
    setting = {"workers": job.workers, "mbit": link} | asdict(job.recipe)
    add_rows(path, [{"method": name} | setting | times | origin for name, times in found.items()])


def _on_link(job: Job, link: str, count: int) -> dict[str, Any]:
    """Run a job on a link, and return what worker 0 has found. Raises WorkerFailedError."""
    if link == LOCAL:
        return dict(launch(_work, (job,), job.workers))
    up, down = rates_of(link)
    if reason := available():
        raise ConfigError(f"link {link} {reason}; --links {LOCAL} needs none")
    with Hosts(count, down, up) as hosts, tempfile.TemporaryDirectory(prefix="packsaddle-race-") as folder:
        paths = [Path(folder) / f"{host}.json" for host in range(count)]
        for host, path in enumerate(paths):
            seed = job.seed + (host if job.workers == 1 else 0)
            path.write_text(json.dumps(asdict(replace(job, seed=seed, interface=hosts.interface))))
        words = ["-m", "lab.race.clock"]
        try:
            if job.workers == 1:
                outputs = hosts.run([[sys.executable, *words, str(path)] for path in paths])
            else:
                outputs = hosts.torchrun([*words, str(paths[0])])
        except HostFailedError as error:
            raise WorkerFailedError(str(error)) from None
        return dict(json.loads(outputs[0].splitlines()[-1]))


def _work(job: Job) -> dict[str, Any]:
    """Do a job as one of the processes that the launcher has started."""
    torch.set_num_threads(1)
    with process_group() if job.workers > 1 else nullcontext():
        text = Text.read(job.text)
        return timed_training(job, text) if job.every else timed_steps(job, text)


def timed_training(job: Job, text: Text) -> dict[str, Any]:
    """Train as one of the workers, and return the columns of the row.

    `alone_ms` are the milliseconds of a step without exchanges, timed before and after the training, since the speed of
    a virtual machine varies between trainings.
    """
    method, recipe = METHODS[job.methods[0]], job.recipe
    # Two steps of another network first, so that compiling loops and opening connections is not timed.
    _entered(method, replace(recipe, steps=4, warm_up=1), text, job).warm_up()
    alone = _entered(METHODS["alone"], recipe, text, job)
    alone.block(2)
    before = alone.block(_ALONE)
    trained = train(text, method, job.workers, job.seed, recipe, every=job.every, interface=job.interface)
    alone_ms = 1000 * fmean((before, alone.block(_ALONE))) / _ALONE
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(trained).items()} | {
        "alone_ms": round(alone_ms, 3)
    }


def timed_steps(job: Job, text: Text) -> dict[str, dict[str, float]]:
    """Time blocks of steps of all methods in turns, and return the columns of each method's row."""
    # A rate at which nothing diverges; PowerSGD compresses from the second step on.
    recipe = replace(job.recipe, rate=1e-4, steps=20)
    timed = {name: _entered(METHODS[name], recipe, text, job) for name in job.methods}
    lengths = {name: -(-job.turn // METHODS[name].every) * METHODS[name].every for name in timed}
    for name, each in timed.items():
        each.block(METHODS[name].next_quiet(3))
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(job.rounds):
        for name, each in timed.items():
            taken[name].append(each.block(lengths[name]) / lengths[name])
    for each in timed.values():
        each.worker.end()
    found = {}
    for name, seconds in taken.items():
        timing = Timing.of(seconds)
        numbers = zip(("ms", "low", "high"), (timing.median, timing.low, timing.high), strict=True)
        found[name] = {key: round(1000 * value, 3) for key, value in numbers} | {"turn": lengths[name]}
    return found


@dataclass
class _Timed:
    """A worker whose steps are timed in blocks, which all workers begin together."""

    worker: Worker
    draw: Callable[[], tuple[torch.Tensor, torch.Tensor]]

    def block(self, steps: int) -> float:
        """Do a block of steps, and return the seconds of the slowest worker."""
        group, windows = resolve(None), [self.draw() for _ in range(steps)]
        if group.size > 1:
            group.all_reduce(torch.zeros(1))
        begin = time.perf_counter()
        for x, y in windows:
            self.worker.step(x, y)
        seconds = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
        return max(float(each) for each in group.all_gather(seconds)) if group.size > 1 else float(seconds)

    def warm_up(self) -> None:
        """Do two steps and the last exchange."""
        self.block(2)
        self.worker.flush()
        self.worker.end()


def _entered(method: Method, recipe: Recipe, text: Text, job: Job) -> _Timed:
    worker = method.enter(GPT(text.vocabulary, job.seed, recipe), recipe, job.workers)
    return _Timed(worker, windows_of(text, method, job.workers, job.seed, recipe))


def main(path: str) -> None:
    """Do the job in a JSON file, and print what was found as one line of JSON."""
    print(json.dumps(_work(build(Job, json.loads(Path(path).read_text())))))


if __name__ == "__main__":
    main(*sys.argv[1:])
