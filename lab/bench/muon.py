"""Local updates with AdamW or Muon inside, compared with dense training and other methods that exchange every H steps.

One table for each of six settings, at equal tokens:

    char-w4   a character transformer, 0.36 million parameters, on the reference of the Python language; 800 steps of
              four workers with 8 windows each
    gpt-w2    the GPT of the race, 0.83 million parameters, on the source of Python's standard library; 1,000 steps of
              two workers with 8 windows each
    gpt-w4    the same with four workers
    char-w2   char-w4 with two workers and 16 windows each: dense training is that of char-w4
    char-w8   char-w4 with eight workers and 4 windows each: dense training is that of char-w4
    char-w16  the same with sixteen workers and 2 windows each

Every method has the same warm-up, cosine and clipping, and its best rate of one grid of powers of two: the search
goes from a rate to a better neighbor until both neighbors are worse. Workers are simulated in
one process (see `packsaddle.simulate`); dense training is one process with all workers' windows. Muon trains hidden
matrices, AdamW embeddings, norms, biases and the head, at the same rate (`match_rms_adamw`).

    python -m lab.bench.muon char-w4 search    # every method, seed 0; makes the missing runs
    python -m lab.bench.muon gpt-w2 search --target 1.6    # the rate that reaches this loss in the fewest steps
    python -m lab.bench.muon gpt-w2 refine     # the rates halfway to the neighbors of each method's best
    python -m lab.bench.muon char-w4 seeds     # seeds 1 and 2 at each method's best rate
    python -m lab.bench.muon char-w4 table
    python -m lab.bench.muon all compare      # one table of the methods that char-w4, gpt-w2 and gpt-w4 share
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import packsaddle
from lab.origin import Origin, check_text
from lab.race.inner import Half, held_out_loss, make_inner
from lab.race.recipe import share_of_peak
from lab.race.target_settings import steps_and_loss
from lab.race.workload import LIBRARY, evenly_spaced, load_library
from lab.rows import add_rows
from lab.tasks import Batches, DataConfig, Dataset, ModelConfig, load_data, make_task, shard
from packsaddle.comm import resolve
from packsaddle.compressors import Compressor, Identity, Rounded, Sign, TopK

GRID = tuple(0.0005 * 2**i for i in range(10))  # learning rates of the search
WARM_UP = 50  # steps in which the learning rate rises
CURVE = 50  # steps between two points of a run's curve: losses at the anchor on 256 held-out windows


@dataclass(frozen=True)
class Setting:
    model: ModelConfig
    workers: int
    steps: int
    batch: int = 8  # windows per worker and step
    # True: also measure the losses after two cheaper ways to end a run, which takes two more evaluations.
    compares_ends: bool = False


SETTINGS = {
    "char-w4": Setting(ModelConfig("char-transformer", width=96, depth=3, heads=4), 4, 800, compares_ends=True),
    "char-w2": Setting(ModelConfig("char-transformer", width=96, depth=3, heads=4), 2, 800, batch=16),
    "gpt-w2": Setting(ModelConfig("char-transformer", width=128, depth=4, heads=4), 2, 1000),
    "gpt-w4": Setting(ModelConfig("char-transformer", width=128, depth=4, heads=4), 4, 1000),
    "char-w8": Setting(ModelConfig("char-transformer", width=96, depth=3, heads=4), 8, 800, batch=4),
    "char-w16": Setting(ModelConfig("char-transformer", width=96, depth=3, heads=4), 16, 800, batch=2),
}


@dataclass(frozen=True)
class Method:
    """A method of training: local updates with `compressor`, or dense training if it is None.

    `start` is the learning rate at which the search begins.
    """

    inner: str = "adamw"
    compressor: Compressor | None = None
    every: int = 8
    outer: tuple[float, float] | None = None  # rate and momentum of the outer optimizer; None: no outer optimizer
    decay: float = 1.0
    keep: bool = True
    flush: bool = True  # False: training ends with the anchor, and pending updates are discarded
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.95  # momentum of Muon
    exchange: Literal["auto", "direct", "two-way", "senders"] = "auto"
    share: float = 1.0  # length of the training, as a fraction of the setting's steps
    dense_below: int = 1024
    mean_momentum: float = 0.0

    @property
    def start(self) -> float:
        return 0.016 if self.inner == "muon" else 0.004


def _methods() -> Iterator[tuple[str, Method]]:
    for name, base in (("Muon", Method("muon")), ("AdamW", Method(betas=(0.8, 0.99)))):
        for words, share in (("half of the steps", 0.5), ("quarter of the steps", 0.25)):
            yield f"{name}, dense, {words}", replace(base, share=share)
        sign = replace(base, compressor=Sign(per_tensor=True))
        for every in (2, 4):
            yield f"{name}, local {every}, Sign", replace(sign, every=every)
        for every in (2, 4, 8, 32):
            mixed = replace(sign, every=every, mean_momentum=0.5)
            yield f"{name}, local {every}, Sign, mean momentum 0.5", mixed
            two_bits = replace(mixed, compressor=Rounded())
            yield f"{name}, local {every}, Rounded int2, mean momentum 0.5", two_bits
        yield f"{name}, local 2, TopK 1/4 int2", replace(base, compressor=TopK(1 / 4, values="int2"), every=2)
        yield f"{name}, local 8, Sign of all tensors", replace(sign, dense_below=0)
        yield f"{name}, local 8, Sign, gathered", replace(sign, exchange="direct")
        yield f"{name}, local 8, Sign, by owners", replace(sign, exchange="two-way")
        for every in (4, 8, 16, 32):
            two_bits = replace(base, compressor=TopK(1 / 2, values="int2"), every=every)
            yield f"{name}, local {every}, TopK 1/2 int2", two_bits
            yield f"{name}, local {every}, Rounded int2", replace(two_bits, compressor=Rounded())
            yield f"{name}, local {every}, TopK 1/2 int2, outer 0.7 0.5", replace(two_bits, outer=(0.7, 0.5))
    yield "AdamW, dense", Method()
    yield "AdamW, dense, beta1 0.8", Method(betas=(0.8, 0.99))
    yield "Muon, dense", Method("muon")
    sign, top = Sign(per_tensor=True), TopK(1 / 16, values="int2")
    for name, base in (("Muon", Method("muon")), ("AdamW", Method(betas=(0.8, 0.99)))):
        for every in (8, 32):
            for how, compressor in (("Sign", sign), ("TopK 1/16 int2", top)):
                plain = replace(base, compressor=compressor, every=every)
                yield f"{name}, local {every}, {how}", plain
                yield f"{name}, local {every}, {how}, outer 0.7 0.5", replace(plain, outer=(0.7, 0.5))
            by_senders = replace(base, compressor=top, every=every, exchange="senders")
            yield f"{name}, local {every}, TopK 1/16 int2, by senders", by_senders
            exact = replace(base, compressor=Identity(), every=every, keep=False)
            yield f"{name}, local SGD {every}", exact
            for momentum in (0.9, 0.5, 0.0):
                yield f"{name}, DiLoCo {every}, {momentum:g}", replace(exact, outer=(0.7, momentum))
            # SparseLoCo as in its published code: each coordinate is averaged over the workers that sent it, and
            # pending updates are not sent at the end.
            published = replace(exact, exchange="senders", outer=(1.0, 0.0), decay=0.95, flush=False)
            for k, words in ((64, ""), (256, ", 256 of 4096")):
                sparse = TopK(k / 4096, chunk=4096, values="int2")
                yield f"{name}, SparseLoCo {every}{words}", replace(published, compressor=sparse)
        four_bits = replace(base, compressor=Rounded("int4"), every=32, outer=(0.7, 0.5))
        yield f"{name}, local 32, Rounded int4, outer 0.7 0.5", four_bits
        exact = replace(base, compressor=Identity(), keep=False)
        for every in (64, 128, 256, 512):
            yield f"{name}, local SGD {every}", replace(exact, every=every)
        for every in (8, 32, 64, 128, 256):
            yield f"{name}, local SGD {every}, 16 bits", replace(exact, compressor=Half(), every=every)
        for momentum in (0.9, 0.5, 0.0):
            yield f"{name}, DiLoCo 128, {momentum:g}", replace(exact, every=128, outer=(0.7, momentum))
        for outer in ((0.3, 0.9), (0.9, 0.5)):
            words = f"{name}, DiLoCo 32, {outer[1]:g}, outer rate {outer[0]:g}"
            yield words, replace(exact, every=32, outer=outer)


METHODS = dict(_methods())


def climb(quality: Callable[[int], Any], at: int, grid: range) -> int:
    """Return the index of a local minimum of `quality` on a grid of learning rates.

    The search starts at index `at`, and moves to better neighbors until both neighbors are worse.
    """
    worse = set[int]()
    while neighbors := [i for i in (at - 1, at + 1) if i not in worse and i in grid]:
        there = neighbors[0]
        if quality(there) < quality(at):
            worse.add(at)
            at = there
        else:
            worse.add(there)
    return at


def train(
    setting: Setting,
    how: Method,
    rate: float,
    seed: int,
    on_end: Callable[[nn.Module], object] = lambda network: None,
    windows: int | None = None,
) -> dict[str, object]:
    """Train one model on this worker's shard, and return the row of results, without the method's name.

    Args:
        on_end: called with the network after the last exchange.
        windows: number of held-out windows for the final loss, evenly spaced. None: all.
    """
    setting = replace(setting, steps=round(how.share * setting.steps))
    data, held_out = texts(setting.model.width == 128)
    # Make this worker's batches. Dense training is one process, which reads the batches of all workers.
    group, workers, cpu = resolve(None), setting.workers, torch.device("cpu")
    mine = range(workers) if how.compressor is None else [group.rank]
    shards = [shard(data, "iid", worker=i, workers=workers, seed=seed) for i in mine]
    batches = [Batches(part, setting.batch, worker=i, seed=seed) for i, part in zip(mine, shards, strict=True)]

    network = make_task(setting.model, data.shape, data.classes, seed=seed)
    optimizers = make_inner(network, how.inner, rate, how.betas, how.momentum)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: share_of_peak(step, WARM_UP, setting.steps))
        for o in optimizers
    ]
    local = make_local(optimizers, how)
    losses, curve, taken = [], [], 0.0
    for step in range(setting.steps):
        start = time.perf_counter()
        network.zero_grad()
        loss = network(*data.batch(torch.cat([batch[step] for batch in batches]), cpu))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        losses.append(loss.item())
        taken += time.perf_counter() - start
        if (step + 1) % CURVE == 0:
            with torch.no_grad(), nullcontext() if local is None else local.at_anchor():
                curve.append(held_out_loss(network, held_out, evenly_spaced(len(held_out), 256)))

    # Count the bytes: `sent` of the rounds, `total` also of start and flush. A dense step counts as a ring all-reduce.
    payload = sum(p.numel() * p.element_size() for p in network.parameters())
    sent = total = setting.steps * payload * 2 * (workers - 1) / workers

    def loss_now() -> float:
        with torch.no_grad():
            return held_out_loss(network, held_out, evenly_spaced(len(held_out), windows or len(held_out)))

    ends = {}
    if local is not None:
        sent = sum(moved.sent for purpose, moved in local.ledger.by_purpose.items() if purpose != "start")
        total, ends = _end(local, how, loss_now, compares=setting.compares_ends)
    on_end(network)
    with nullcontext() if local is None or how.flush else local.at_anchor():
        found = loss_now()
    last = torch.tensor([statistics.fmean(losses[-max(1, setting.steps // 10) :]) / group.size])
    group.all_reduce(last)
    return {
        "rate": rate,
        "seed": seed,
        "steps": setting.steps,
        "validation_loss": round(found, 4),
        "training_loss": round(float(last), 4),
        **{name: round(loss, 4) for name, loss in ends.items()},
        "kB_a_step": round(sent / setting.steps / 1e3, 2),
        "total_kB": round(total / 1e3),
        "curve": " ".join(f"{loss:.4f}" for loss in curve),
        "s": round(taken, 1),
    }


def _end(
    local: packsaddle.LocalUpdates, how: Method, loss_now: Callable[[], float], *, compares: bool
) -> tuple[int, dict[str, float]]:
    """End the local updates of a method. Its pending updates are exchanged uncompressed, if it has a flush.

    Returns all bytes sent, and the losses of two cheaper ways to end: at the anchor without an exchange, and after
    `flush()`, whose exchange is compressed. The losses are measured if `compares` is True, the rounds are lossy, and
    there is no outer optimizer.
    """
    before, ends = local.ledger.total.sent, {}
    if not how.flush:
        return before, ends
    assert how.compressor is not None
    if compares and how.outer is None and not how.compressor.lossless:
        with local.at_anchor():
            ends["anchor_loss"] = loss_now()
        local.flush()
        ends["flush_loss"] = loss_now()
    cheaper = local.ledger.total.sent
    local.flush(Identity())
    return before + local.ledger.total.sent - cheaper, ends


def make_local(optimizers: list[torch.optim.Optimizer], how: Method) -> packsaddle.LocalUpdates | None:
    """Return the `LocalUpdates` of a method, or None for dense training."""
    if how.compressor is None:
        return None
    return packsaddle.LocalUpdates(
        optimizers,
        packsaddle.Compression(how.compressor, exchange=how.exchange, decay=how.decay, dense_below=how.dense_below),
        every=how.every,
        outer=None if how.outer is None else packsaddle.OuterSGD(*how.outer),
        mean_momentum=how.mean_momentum,
        keep_unsent=how.keep,
    )


@cache
def texts(library: bool) -> tuple[Dataset, Dataset]:
    """Return the training text and the held-out text, which is the last tenth.

    The text is the race's, the source of Python's standard library, or with `library` False Python's reference.
    """
    config = DataConfig("text")
    if not library:
        return load_data(config, None, train=True), load_data(config, None, train=False)
    return load_library(config, train=True), load_library(config, train=False)


class Runs:
    """The runs of one setting, stored in a file."""

    def __init__(self, name: str, out: Path) -> None:
        self.setting, self.out = SETTINGS[name], out
        self.text = LIBRARY if self.setting.model.width == 128 else ""

    def rows(self, method: str) -> list[dict[str, str]]:
        """Return the stored rows of a method, oldest first."""
        if not self.out.exists():
            return []
        with self.out.open() as file:
            rows = [row for row in csv.DictReader(file) if row["method"] == method]
        check_text(map(Origin.of_row, rows), self.text, self.out)
        return rows

    def make(self, method: str, rate: float, seed: int) -> None:
        """Do a run and store its row, unless the file already has it."""
        if any(float(row["rate"]) == rate and int(row["seed"]) == seed for row in self.rows(method)):
            return
        torch.set_num_threads(1)
        how = METHODS[method]
        workers = 1 if how.compressor is None else self.setting.workers
        row = packsaddle.simulate(lambda _: train(self.setting, how, rate, seed), workers)[0]
        add_rows(self.out, [{"method": method, **row, **asdict(Origin.here(text=self.text))}])
        print(method, row, flush=True)

    def best(self, method: str) -> list[dict[str, str]]:
        """Return the rows, one per seed, at the learning rate with the lowest loss of seed 0."""
        mine = self.rows(method)
        first = min((row for row in mine if row["seed"] == "0"), key=lambda row: float(row["validation_loss"]))
        return [row for row in mine if row["rate"] == first["rate"]]

    def search(self, method: str, target: float | None = None) -> None:
        """Train a method at neighboring learning rates until both neighbors of the best rate are worse.

        Rates are compared by their losses, or with `target` by the number of steps to this loss.
        """

        def quality(i: int) -> tuple[float, float]:
            self.make(method, GRID[i], 0)
            (row,) = (row for row in self.rows(method) if (float(row["rate"]), row["seed"]) == (GRID[i], "0"))
            return steps_and_loss(row, target)

        climb(quality, GRID.index(METHODS[method].start), range(len(GRID)))

    def refine(self, method: str) -> None:
        """Train a method at 0.7 and 1.4 times its best learning rate of the grid, with seed 0."""
        tried = [row for row in self.rows(method) if row["seed"] == "0" and float(row["rate"]) in GRID]
        best = float(min(tried, key=lambda row: float(row["validation_loss"]))["rate"])
        for share in (0.7, 1.4):
            self.make(method, round(share * best, 6), 0)

    def table(self, methods: Sequence[str]) -> str:
        """Return the Markdown table of those `methods` that have runs, ordered by loss."""
        dense = 2 * (self.setting.workers - 1) / self.setting.workers * 4 * self.parameters()
        lines = [
            "| | kB a step | of dense | MB with start and flush | rate | loss | range, seeds | seed 0 by rate |",
            "| --- " * 8 + "|",
        ]
        found = {method: self.best(method) for method in methods if self.rows(method)}
        for method, best in sorted(found.items(), key=lambda item: _mean(item[1])):
            losses = sorted(float(row["validation_loss"]) for row in best)
            sent = 1e3 * float(best[0]["kB_a_step"])
            spread = f"{losses[0]:.3f} to {losses[-1]:.3f}, {len(losses)}" if len(losses) > 1 else "one seed"
            tried = sorted((row for row in self.rows(method) if row["seed"] == "0"), key=lambda row: float(row["rate"]))
            by_rate = ", ".join(f"{float(row['rate']):g}: {float(row['validation_loss']):.3f}" for row in tried)
            lines.append(
                f"| {method} | {sent / 1e3:,.4g} | {_fraction(sent, dense)} | "
                f"{float(best[0]['total_kB']) / 1e3:,.4g} | {float(best[0]['rate']):g} | "
                f"{_mean(best):.3f} | {spread} | {by_rate} |"
            )
        return "\n".join(lines)

    def parameters(self) -> int:
        """Return the number of parameters of the setting's network."""
        data, _ = texts(self.setting.model.width == 128)
        return sum(p.numel() for p in make_task(self.setting.model, data.shape, data.classes, seed=0).parameters())


def compare(folder: Path) -> str:
    """Return the Markdown table of the methods `COMPARED`: mean losses over seeds.

    It has columns for three settings, with AdamW and with Muon as the inner optimizer.
    """
    settings = {name: Runs(name, folder / f"{name}.csv") for name in ("char-w4", "gpt-w2", "gpt-w4")}
    columns = [(inner, name) for inner in ("Muon", "AdamW") for name in settings]
    lines = [
        "| | of dense | " + " | ".join(f"{inner}, {name}" for inner, name in columns) + " |",
        "| --- " * (2 + len(columns)) + "|",
    ]
    for words in COMPARED:
        cells = []
        for inner, name in columns:
            runs, method = settings[name], f"{inner}, {words}"
            if method == "AdamW, dense":
                method += ", beta1 0.8"
            best = runs.best(method) if runs.rows(method) else []
            cells.append(f"{_mean(best):.3f}" + f" ({len(best)})" * (len(best) < 3) if best else "")
        # The bytes are those of the setting char-w4 with Muon; they are the same with AdamW.
        sent, dense = (float(settings["char-w4"].best(f"Muon, {m}")[0]["kB_a_step"]) for m in (words, "dense"))
        lines.append(f"| {words} | {_fraction(sent, dense)} | {' | '.join(cells)} |")
    return "\n".join(lines)


COMPARED = (
    *("dense", "local SGD 8", "local 8, Sign", "local 8, Sign, outer 0.7 0.5", "local 8, TopK 1/16 int2"),
    *("local SGD 32", "DiLoCo 32, 0.9", "DiLoCo 32, 0.5", "DiLoCo 32, 0", "SparseLoCo 32"),
    *("local 32, Rounded int2", "local 32, TopK 1/2 int2, outer 0.7 0.5"),
    *("local 32, Sign", "local 32, Sign, outer 0.7 0.5", "local 32, TopK 1/16 int2"),
)


def _fraction(sent: float, dense: float) -> str:
    return f"1/{dense / sent:.0f}" if sent < 0.99 * dense else "1"


def _mean(rows: Sequence[dict[str, str]]) -> float:
    return statistics.fmean(float(row["validation_loss"]) for row in rows)


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=[*SETTINGS, "all"])
    parser.add_argument("command", choices=("search", "refine", "seeds", "table", "compare"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, help="by default experiments/muon/SETTING.csv; with compare the folder")
    parser.add_argument("--target", type=float, help="search the rate that reaches this validation loss soonest")
    options = parser.parse_args()
    if (options.setting == "all") != (options.command == "compare"):
        parser.error("setting must be all with compare, and one setting with other commands")
    if options.command == "compare":
        print(compare(options.out or Path("experiments/muon")))
        return
    out = options.out or Path(f"experiments/muon/{options.setting}.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.setting, out)
    if options.command == "table":
        print(runs.table(options.methods))
    for method in options.methods:
        if options.command == "search":
            runs.search(method, options.target)
        elif options.command == "refine":
            runs.refine(method)
        elif options.command == "seeds":
            for seed in (1, 2):
                runs.make(method, float(runs.best(method)[0]["rate"]), seed)


if __name__ == "__main__":
    main()
