"""Outer options of local updates: agreement, a Nesterov momentum after it, a period that grows, and a longer warm-up.

A character transformer of 117,221 parameters on the reference of the Python language, 400 steps of 32 windows by
all workers, one bit every 8 steps, AdamW (betas 0.8 and 0.99) at 0.004 or Muon and AdamW at 0.016, a cosine to a tenth.
Workers are simulated in one process; dense training has all windows.

    python -m lab.bench.outer run
    python -m lab.bench.outer table
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import packsaddle
from lab.bench.muon import texts
from lab.bench.origin import Origin
from lab.bench.rows_file import add_rows, read_rows
from lab.race.inner import held_out_loss, make_inner
from lab.race.recipe import share_of_peak
from lab.runs import ModelConfig
from lab.runs.tasks import Batches, make_task, shard
from packsaddle.comm import resolve

ROWS = Path(__file__).parents[2] / "experiments" / "outer" / "runs.csv"
MODEL = ModelConfig("char-transformer", width=64, depth=2, heads=4)
STEPS, WINDOWS = 400, 32
RATES = {"adamw": 0.004, "muon": 0.016}


@dataclass(frozen=True)
class Method:
    """Local updates of one bit every 8 steps, or dense training."""

    is_dense: bool = False
    agreement: float = 0.0
    outer: tuple[float, float] | None = None  # rate and momentum
    warm_up: int = 50
    short: int = 0  # first steps, exchanged every 2 steps instead of 8


METHODS = {
    "dense": Method(is_dense=True),
    "local": Method(),
    "agreement": Method(agreement=0.5),
    "Nesterov 0.7 0.5": Method(outer=(0.7, 0.5)),
    "agreement, then Nesterov 0.7 0.5": Method(agreement=0.5, outer=(0.7, 0.5)),
    "every 2 for 100 steps": Method(short=100),
    "every 2 for 100 steps, agreement": Method(short=100, agreement=0.5),
    "warm-up 100": Method(warm_up=100),
    "warm-up 100, agreement": Method(warm_up=100, agreement=0.5),
    "dense, warm-up 100": Method(is_dense=True, warm_up=100),
}
# The most telling first; the last are left out where time is short.
PLAN = [
    *((inner, 4, name) for inner in RATES for name in METHODS),
    *(("muon", 8, name) for name in ("local", "agreement", "agreement, then Nesterov 0.7 0.5")),
]


def train(inner: str, workers: int, how: Method, seed: int) -> tuple[float, int]:
    """Train as this worker; return the held-out loss of the model of all workers, and the bytes that it has sent."""
    data, held_out = texts(False)
    rank, cpu = resolve(None).rank, torch.device("cpu")
    mine = range(workers) if how.is_dense else [rank]
    shards = [shard(data, "iid", worker=i, workers=workers, seed=seed) for i in mine]
    size = WINDOWS // workers
    batches = [Batches(part, size, worker=i, seed=seed) for i, part in zip(mine, shards, strict=True)]
    network = make_task(MODEL, data.shape, data.classes, seed=seed)
    optimizers = make_inner(network, inner, RATES[inner], (0.8, 0.99))
    local = None
    if not how.is_dense:
        then = None if how.outer is None else packsaddle.OuterSGD(*how.outer)
        outer = packsaddle.OuterAgreement(how.agreement, then) if how.agreement else then
        local = packsaddle.LocalUpdates(optimizers, every=8, outer=outer, model=network)
        lockstep = local._workers
        usual = lockstep._schedule
    for step in range(STEPS):
        if local is not None:
            lockstep._schedule = replace(usual, every=2) if step < how.short else usual
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATES[inner] * share_of_peak(step, how.warm_up, STEPS)
        network.zero_grad()
        network(*data.batch(torch.cat([batch[step] for batch in batches]), cpu)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    sent = 8 * (workers - 1) * sum(p.numel() for p in network.parameters()) * STEPS // workers
    if local is not None:
        local.flush()
        sent = local.ledger.total.sent
    with torch.no_grad():
        return held_out_loss(network, held_out, torch.arange(len(held_out))), sent


def make(path: Path, inner: str, workers: int, name: str, seed: int) -> None:
    """Train, and add a row to a file, unless it has this one already."""
    key = (inner, workers, name, seed)
    if any((r["inner"], int(r["workers"]), r["method"], int(r["seed"])) == key for r in rows(path)):
        return
    how = METHODS[name]
    loss, sent = packsaddle.simulate(lambda _: train(inner, workers, how, seed), 1 if how.is_dense else workers)[0]
    row = {"inner": inner, "workers": workers, "method": name, "seed": seed, "loss": round(loss, 4), "sent": sent}
    add_rows(path, [row | asdict(Origin.here())])


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file."""
    return read_rows(path, dict, "row")


def table(found: Sequence[Mapping[str, str]]) -> str:
    """Return the Markdown table of the mean losses over seeds."""
    columns = list(dict.fromkeys((r["inner"], r["workers"]) for r in found))
    lines = [
        f"| | {' | '.join(f'{inner}, {w} workers' for inner, w in columns)} |",
        "| --- " * (1 + len(columns)) + "|",
    ]
    for name in METHODS:
        cells = []
        for column in columns:
            losses = [float(r["loss"]) for r in found if (r["inner"], r["workers"], r["method"]) == (*column, name)]
            shown = ", ".join(f"{loss:.3f}" for loss in losses)
            cells.append(f"{statistics.fmean(losses):.3f} ({shown})" if losses else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=ROWS)
    options = parser.parse_args()
    if options.command == "table":
        print(table(rows(options.out)))
        return
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for inner, workers, name in PLAN:
            make(options.out, inner, workers, name, seed)


if __name__ == "__main__":
    main()
