"""Predicted and measured times of whole training steps: CompressedSGD's and DistributedDataParallel's.

    python -m lab.studies.scale.steps OUT.csv

Needs root, for network namespaces.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lab.bench.hosts import Hosts
from lab.runs.tasks import MODELS, build_model
from packsaddle import CompressedSGD, Compression, Compressor, RandomK, Sign, SketchTopK, TopK
from packsaddle.comm import Group, process_group
from packsaddle.compressors import describe
from packsaddle.plan import (
    Fleet,
    Link,
    ModelSize,
    TrainingStep,
    Verdict,
    clocked,
    forecast,
    measure,
    probe,
    update_seconds,
)

COMPRESSORS: list[Compressor] = [RandomK(0.01), TopK(0.01), SketchTopK(0.001), Sign()]
# Model, workers, Mbit/s, batch.
SETTINGS = [
    ("mnist-autoencoder", 2, 100, 32),
    ("mnist-autoencoder", 4, 10, 32),
    ("resnet18", 2, 100, 2),
    ("resnet18", 2, 1000, 8),
]


def worker(folder: Path, name: str, bits: float, batch: int, repeats: int) -> None:
    """One host's part: time steps of every contender, in turn, and predict them."""
    torch.set_num_threads(1)
    with process_group() as group:
        link = Link.nominal(bits, probe(group).latency)
        predicted = predict(group, link, name, batch)
        chosen = {f.compressor: f.exchange for f in predicted.forecasts}
        works = {"none": training(name, batch, None, "")}
        for compressor in COMPRESSORS:
            how = "two-way" if chosen[describe(compressor)] == "two-way" else "direct"
            works[describe(compressor)] = training(name, batch, compressor, how)
        taken: dict[str, list[float]] = {label: [] for label in works}
        for attempt in range(repeats + 2):
            for label, work in works.items():
                group.all_reduce(torch.zeros(1))
                seconds = clocked(work)
                if attempt >= 2:  # DDP makes its buckets anew after the first step
                    taken[label].append(seconds)
        result = {f.compressor: {"taken": taken[f.compressor], **found(f)} for f in predicted.forecasts}
        (folder / f"{group.rank}.json").write_text(json.dumps(result))


def predict(group: Group, link: Link, name: str, batch: int) -> Verdict:
    """Computing and coding are measured by all workers at once: they share the machine's cores."""
    group.all_reduce(torch.zeros(1))
    fleet = Fleet(group.size, step_of(name, batch).time().low)
    group.all_reduce(torch.zeros(1))
    workload = ModelSize.of_model(name, build_model(name))
    return forecast(workload, link, fleet, COMPRESSORS, measure, update=update_seconds(workload.d))


def step_of(name: str, batch: int) -> TrainingStep:
    return TrainingStep.of_model(build_model(name), MODELS[name], batch, tokens=False)


def found(forecast: Any) -> dict[str, Any]:
    time = forecast.time
    return {"exchange": forecast.exchange, "parts": [time.compute, time.compression, time.exchange]}


def training(name: str, batch: int, compressor: Compressor | None, how: str) -> Callable[[], None]:
    """Return one step of training on random examples; without a compressor, DDP's with SGD."""
    step = step_of(name, batch)
    model, examples = step.model, step.batch
    optimizer: torch.optim.Optimizer
    if compressor is None:
        model = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    else:
        optimizer = CompressedSGD(model.parameters(), 1e-3, Compression(compressor, exchange=how))  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(examples).square().mean())
        optimizer.step()

    return step


def row(setting: tuple[str, int, float, int], label: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A step ends when its last worker does; parts are the mean worker's."""
    name, workers, mbit, batch = setting
    own = [result[label] for result in results]
    totals = [max(attempt) for attempt in zip(*(r["taken"] for r in own), strict=True)]
    parts = [sum(r["parts"][i] for r in own) / len(own) for i in range(3)]
    predicted, measured = sum(parts), median(totals)
    shown = {"measured ms": measured, "low": min(totals), "high": max(totals), "predicted ms": predicted}
    pieces = dict(zip(("computing ms", "coding ms", "exchange ms"), parts, strict=True))
    return {
        "model": name,
        "workers": workers,
        "Mbit/s": mbit,
        "batch": batch,
        "compressor": label,
        "exchange": own[0]["exchange"],
        **{k: f"{1e3 * seconds:.1f}" for k, seconds in {**shown, **pieces}.items()},
        "error": f"{predicted / measured - 1:+.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        name, mbit, batch = asked.worker
        worker(asked.out, name, float(mbit) * 1e6, int(batch), asked.repeats)
        sys.stdout.flush()
        os._exit(0)  # beside gloo's threads an interpreter that takes itself apart aborts now and then
    rows = []
    for setting in SETTINGS:
        name, workers, mbit, batch = setting
        with Hosts(workers, mbit) as network, tempfile.TemporaryDirectory() as folder:
            given = ["--worker", name, str(mbit), str(batch), "--repeats", str(asked.repeats)]
            network.torchrun([__file__, folder, *given])
            results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(workers)]
        rows += [row(setting, label, results) for label in results[0]]
        with asked.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(*setting, flush=True)


if __name__ == "__main__":
    main()
