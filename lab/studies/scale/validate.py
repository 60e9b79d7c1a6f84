"""Predicted and measured times of one exchange, for every protocol between 2, 3 and 4 hosts on slow networks.

    python -m lab.studies.scale.validate OUT.csv [--workers 2 3 4] [--mbit 10 100 1000] [--d 1000000] [--repeats 5]

Needs root, for network namespaces.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lab.bench.hosts import Hosts
from packsaddle import QSGD, Compressor, Identity, Ledger, LowRank, RandomK, Sign, SketchTopK, TopK
from packsaddle.comm import (
    Aggregator,
    AllToAll,
    Broadcast,
    Collective,
    Communicator,
    Group,
    RingAllGather,
    RingAllReduce,
    choose,
    process_group,
)
from packsaddle.plan import Link, compressed, measure, probe

CASES: dict[str, tuple[Compressor, str]] = {
    "dense all-reduce": (Identity(), "direct"),
    "RandomK 10% all-reduce": (RandomK(0.1), "direct"),
    "TopK 10% all-gather": (TopK(0.1), "direct"),
    "TopK 10% two-way": (TopK(0.1), "two-way"),
    "TopK 10% coordinator": (TopK(0.1), "coordinator"),
    "SketchTopK 2%": (SketchTopK(0.02), "direct"),
    "LowRank 32": (LowRank(32), "direct"),
    "Sign all-gather": (Sign(), "direct"),
    "Sign two-way": (Sign(), "two-way"),
    "QSGD all-gather": (QSGD(), "direct"),
    "QSGD two-way": (QSGD(), "two-way"),
}


# Collectives by themselves, of d bytes, and their part of the model: no coding is in them.
COLLECTIVES: dict[str, tuple[Callable[[Group, Tensor], object], Callable[[int, int], Collective]]] = {
    "(all-reduce)": (lambda g, t: g.all_reduce(t.view(torch.float32)), lambda d, w: RingAllReduce((d,))),
    "(all-gather)": (lambda g, t: g.all_gather(t), lambda d, w: RingAllGather(d)),
    "(all-to-all)": (
        lambda g, t: g.all_to_all([t[: len(t) // g.size]] * g.size, [len(t) // g.size] * g.size),
        lambda d, w: AllToAll([d // w] * w),
    ),
    "(gather)": (
        lambda g, t: g.all_to_all([t, *[t[:0]] * (g.size - 1)], [len(t) if g.rank == 0 else 0] * g.size),
        lambda d, w: AllToAll([d] + [0] * (w - 1)),
    ),
    "(broadcast)": (lambda g, t: g.broadcast(t), lambda d, w: Broadcast(d)),
}


def worker(folder: Path, d: int, repeats: int, bits: float) -> None:
    """One host's part: time every case, and on rank 0 predict it."""
    torch.set_num_threads(1)
    with process_group() as group:
        measured = probe(group)
        link = Link.nominal(bits, measured.latency)
        v = torch.randn(d, generator=torch.Generator().manual_seed(group.rank))
        found = {}
        for name, (collective, model) in COLLECTIVES.items():
            message = torch.zeros(d, dtype=torch.uint8)
            taken = [once(group, lambda _, c=collective, m=message: c(group, m), a) for a in range(repeats + 1)]
            found[name] = {"taken": taken[1:], "predicted": [0.0, *link.parts(model(d, group.size).cost(group.size))]}
        for name, (compressor, how) in CASES.items():
            protocol = choose(compressor, how, d=d, dense=0, workers=group.size).aggregator
            taken, coding = [], []
            for attempt in range(repeats + 1):
                taken.append(once(group, lambda step, p=protocol: average(group, p, v, step), attempt))
                group.all_reduce(torch.zeros(1))
                coding.append(code(protocol, d, group.size))
            step = compressed(protocol, d, 0, group.size, lambda work: 0.0)
            found[name] = {"taken": taken[1:], "predicted": [median(coding[1:]), *link.parts(step.cost)]}
        result = {"latency": measured.latency, "rate": measured.rate, "cases": found}
        (folder / f"{group.rank}.json").write_text(json.dumps(result))


def once(group: Group, work: Callable[[int], object], attempt: int) -> float:
    """Seconds of a piece of work that all begin together."""
    group.all_reduce(torch.zeros(1))
    begin = time.perf_counter()
    work(attempt)
    return time.perf_counter() - begin


def average(group: Group, protocol: Aggregator, v: Tensor, step: int) -> None:
    """Exchange v and apply what comes back, as an optimizer's step does."""
    averaged = protocol.average(Communicator(group, Ledger()), v, v[:0], seed=0, step=step)
    out, memory = torch.zeros_like(v), torch.zeros_like(v)
    for term in averaged.mean:
        term.add_to(out, -0.1)
    for term in averaged.own:
        term.add_to(memory, -1.0)


def code(protocol: Aggregator, d: int, workers: int) -> float:
    """Seconds of the coding that the model counts, by all workers at once: they share this machine's cores."""
    pieces = protocol.work(d, workers)
    paces = {work.compressor: measure(work.compressor, work.coordinates, repeats=1) for work in pieces}
    return sum(paces[work.compressor].seconds(work) for work in pieces)


def validate(workers: int, mbit: float, d: int, repeats: int) -> list[dict[str, Any]]:
    """Let the hosts measure; a row per case. An exchange ends when its last worker does."""
    with Hosts(workers, mbit) as network, tempfile.TemporaryDirectory() as folder:
        arguments = [__file__, "--worker", folder, "--mbit", str(mbit), "--d", str(d), "--repeats", str(repeats)]
        network.torchrun(arguments)
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(workers)]
    return [_row(name, results, workers, mbit, d) for name in (*COLLECTIVES, *CASES)]


def _row(name: str, results: list[dict[str, Any]], workers: int, mbit: float, d: int) -> dict[str, Any]:
    per_worker = [result["cases"][name] for result in results]
    totals = [max(attempt) for attempt in zip(*(case["taken"] for case in per_worker), strict=True)]
    # The slowest worker codes for the longest.
    compression, latency, bandwidth = (max(c["predicted"][i] for c in per_worker) for i in range(3))
    predicted, measured = compression + latency + bandwidth, median(totals)
    return {
        "protocol": name, "workers": workers, "Mbit/s": f"{mbit:g}", "d": d,
        "latency us": f"{1e6 * results[0]['latency']:.0f}", "probed Mbit/s": f"{results[0]['rate'] * 8e-6:.1f}",
        "measured ms": f"{1e3 * measured:.2f}", "low": f"{1e3 * min(totals):.2f}", "high": f"{1e3 * max(totals):.2f}",
        "predicted ms": f"{1e3 * predicted:.2f}", "error": f"{predicted / measured - 1:+.3f}",
        "predicted exchange ms": f"{1e3 * (latency + bandwidth):.2f}",
        "predicted compression ms": f"{1e3 * compression:.2f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--mbit", type=float, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--d", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker, asked.d, asked.repeats, asked.mbit[0] * 1e6)
        sys.stdout.flush()
        os._exit(0)  # beside gloo's threads an interpreter that takes itself apart aborts now and then
    rows = []
    for workers in asked.workers:
        for mbit in asked.mbit:
            rows += validate(workers, mbit, asked.d, asked.repeats)
            with asked.out.open("w") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            print(f"{workers} workers, {mbit:g} Mbit/s: {asked.out}", flush=True)


if __name__ == "__main__":
    main()
