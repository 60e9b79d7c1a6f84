"""Goodput of many unlike workers that fail: waiting for all, paces, and elastic rounds, simulated by their costs.

    python -m lab.bench.goodput --out experiments/goodput

Goodput is the number of applied steps over what all workers could make alone, at their speeds, in the same time.
Nothing is trained. A worker fails at exponential intervals. The two intervals are that of the published training of
Llama 3 405B (arXiv 2407.21783: 419 unexpected interruptions of 16,384 GPUs in 54 days, one in 50,676 GPU hours), and a
day, as of borrowed machines. Speeds have a relative spread of 0.1, and every tenth worker has a third of its speed:
that is assumed, as are the other constants.
"""

import argparse
import csv
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from packsaddle.comm.cost_model import AllToAll, Cost, RingAllGather
from packsaddle.plan import Link

D, BITS, EVERY = 100_000_000, 2.1, 32  # parameters, bits of each in a message, and steps of the fastest worker a round
STEP, HOUR = 1.0, 3600.0  # seconds of a step of a worker of speed 1
CHECKPOINT, RESTART, DETECT = 600.0, 180.0, 5.0  # seconds between checkpoints, to start again, and to notice a loss
LLAMA = 54 * 24 * 16_384 / 419  # hours from a worker's failure to its next
LATENCY = 0.03  # seconds: workers are in different places


@dataclass(frozen=True)
class Strategy:
    """How workers meet: whether slow ones make fewer steps, and whether the others go on without a lost one."""

    name: str
    paced: bool
    elastic: bool
    two_way: bool


STRATEGIES = (
    Strategy("waiting for the slowest", paced=False, elastic=False, two_way=True),
    Strategy("paces", paced=True, elastic=False, two_way=True),
    Strategy("elastic, paces, gathered", paced=True, elastic=True, two_way=False),
    Strategy("elastic, paces, two-way", paced=True, elastic=True, two_way=True),
)


def exchange(workers: int, link: Link, *, two_way: bool) -> float:
    """Return the seconds of one exchange, with the small messages before and after it."""
    message = int(D * BITS / 8)
    if two_way:
        cost = AllToAll([message // workers] * workers).cost(workers) + RingAllGather(message // workers).cost(workers)
    else:
        cost = RingAllGather(message).cost(workers)
    small: Cost = RingAllGather(64).cost(workers)
    return sum(link.parts(cost + small + small))


def speeds(workers: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the workers' speeds, in steps a second over that of a worker of speed 1."""
    found = rng.lognormal(-0.005, 0.1, workers)
    found[::10] /= 3
    return found


def goodput(
    how: Strategy, workers: int, link: Link, failure_hours: float, seed: int, seconds: float = 24 * HOUR
) -> float:
    """Simulate a day, and return the goodput."""
    rng = np.random.default_rng(seed)
    speed = speeds(workers, rng)
    steps = np.maximum(1, np.round(EVERY * speed / speed.max())) if how.paced else np.full(workers, EVERY)
    wire = exchange(workers, link, two_way=how.two_way)
    back = np.zeros(workers)  # when a lost worker is back
    now = applied = saved = saved_at = 0.0
    while now < seconds:
        present = back <= now
        length = float((steps[present] * STEP / speed[present]).max()) + wire if present.any() else RESTART
        fails = present & (rng.exponential(failure_hours * HOUR, workers) < length)
        if not how.elastic and fails.any():
            # All start again from the last checkpoint.
            now += length * rng.random() + RESTART
            applied = saved
            saved_at = now
            continue
        # Lost workers miss the round, and return at a later one with the parameters of the others.
        now += length + DETECT * bool(fails.any())
        back[fails] = now + RESTART + 4 * D / link.rate
        applied += float(steps[present & ~fails].sum())
        if now - saved_at >= CHECKPOINT:
            saved, saved_at = applied, now
    return applied * STEP / (now * float(speed.sum()))


def table() -> list[dict[str, object]]:
    """Return a row for each strategy, number of workers, link and interval between a worker's failures."""
    rows: list[dict[str, object]] = []
    for workers in (8, 64, 1000):
        for mbit in (50, 200, 1000):
            link = Link.nominal(mbit * 1e6, LATENCY)
            for hours in (LLAMA, 24.0):
                for how in STRATEGIES:
                    found = [goodput(how, workers, link, hours, seed) for seed in range(3)]
                    wire = exchange(workers, link, two_way=how.two_way)
                    rows.append(
                        asdict(how)
                        | {
                            "workers": workers,
                            "mbit": mbit,
                            "failure_hours": round(hours),
                            "exchange_s": round(wire, 2),
                        }
                        | {
                            "goodput": round(float(np.mean(found)), 3),
                            "low": round(min(found), 3),
                            "high": round(max(found), 3),
                        }
                    )
    return rows


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = table()
    with (out / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
