"""What share of a mean's energy is kept at equal bytes: of shared supports, random ones, and each worker's own.

    python -m lab.studies.shared_supports.energy "MNIST autoencoder" MNIST_DIR CIFAR_DIR energy.csv

or "ResNet-18, 8 channels", "char transformer" or "made-up".

Every contender gets the same bytes a worker sends, as a share of what a dense all-reduce of float32 makes it send: an
all-reduce moves 2 (W - 1) / W of its payload, TopK's all-gather W - 1 times its message. Contenders on the mean see
nothing of W but the mean; TopK's mean of W messages is what workers would apply, and its energy kept is
1 - ||v - C||^2 / ||v||^2 of the mean v, as everywhere.

Real vectors are gradients along 16 steps of uncompressed SGD, averaged over the last 4. "corrected" are e + u, with the
error e that each contender's own compression has left on these gradients (TopK: each worker's own).
"""

import csv
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.studies.shared_supports.vectors import MADE_UP, gradients
from packsaddle import Compressor, RandomK, SharedTopK, SketchTopK, TopK

BUDGETS = (0.005, 0.02, 0.1)  # bytes a worker sends, of dense
WORKERS = (2, 4, 16, 64)
STEPS, LAST = 16, 4


def most(make: Callable[[int], Compressor], d: int, budget: float) -> Compressor | None:
    """The compressor with the largest k whose message has at most `budget` bytes; None if one coordinate has more."""
    low, high = 0, d  # message_bytes of low fits
    while high - low > max(1, low // 200):
        k = (low + high) // 2
        low, high = (k, high) if make(k).message_bytes(d) <= budget else (low, k)
    return make(low) if low else None


SKETCHES: dict[str, Callable[[int], Compressor]] = {
    "SketchTopK": lambda k: SketchTopK(k=k),
    "SketchTopK, 3 rows": lambda k: SketchTopK(k=k, rows=3),
    "SketchTopK, 9 rows": lambda k: SketchTopK(k=k, rows=9),
    "SketchTopK, 4 k columns": lambda k: SketchTopK(k=k, rows=5, columns=4 * k),
    "SketchTopK, 64 k columns": lambda k: SketchTopK(k=k, rows=5, columns=64 * k),
    "SketchTopK, no second round": lambda k: SketchTopK(k=k, oversample=1),
    "SketchTopK, 16 k candidates": lambda k: SketchTopK(k=k, oversample=16),
    "SketchTopK, float32": lambda k: SketchTopK(k=k, half=False),
}
PROJECTIONS: dict[str, Callable[[int], Compressor]] = {
    "SharedTopK": lambda k: SharedTopK(k=k),
    "SharedTopK, 1 number": lambda k: SharedTopK(k=k, projections=1),
    "SharedTopK, 4 numbers": lambda k: SharedTopK(k=k, projections=4),
    "SharedTopK, blocks of 16": lambda k: SharedTopK(k=k, block_size=16),
    "SharedTopK, blocks of 64": lambda k: SharedTopK(k=k, block_size=64),
    "SharedTopK, blocks of 256": lambda k: SharedTopK(k=k, block_size=256),
    "SharedTopK, blocks of 1024": lambda k: SharedTopK(k=k, block_size=1024),
    "SharedTopK, float32": lambda k: SharedTopK(k=k, half=False),
}
DEFAULTS = ("SketchTopK", "SharedTopK", "RandomK")


def on_the_mean(d: int, budget: float, *, variants: bool) -> dict[str, Compressor]:
    """Return the contenders whose message is all-reduced, with a payload of `budget` times d float32."""
    made = {**SKETCHES, **PROJECTIONS, "RandomK": lambda k: RandomK(k=k, block_size=1)}
    chosen = {name: make for name, make in made.items() if variants or name in DEFAULTS}
    found = {name: most(make, d, 4 * d * budget) for name, make in chosen.items()}
    return {name: c for name, c in found.items() if c is not None}


def gathered(d: int, budget: float, workers: int) -> Compressor | None:
    """Return the TopK whose messages, gathered by all of W workers, make each send as many bytes."""
    return most(lambda k: TopK(k=k), d, 4 * d * budget * 2 / workers)


def kept(v: Tensor, c: Tensor) -> float:
    return 1 - float((v - c).double().square().sum() / v.double().square().sum())


class Feedback:
    """A contender with its error memory, or none: vectors in, the share of their mean's energy that it keeps."""

    def __init__(self, compressor: Compressor, *, corrected: bool) -> None:
        self.compressor, self.corrected = compressor, corrected
        self.error: Tensor | None = None
        self.seen: list[float] = []

    def step(self, u: Tensor, step: int) -> None:
        """Compress u, float[d] or float[W, d], or e + u."""
        v = u if self.error is None else self.error + u
        sent = torch.stack([self.compressor(row, seed=1, step=step) for row in v.view(-1, v.shape[-1])]).view_as(v)
        if self.corrected:
            self.error = v - sent
        if v.ndim == 2:
            v, sent = v.mean(0), sent.mean(0)
        self.seen.append(kept(v, sent))


def real(name: str, *, by_class: bool, folders: dict[str, Path | None]) -> Iterator[dict[str, Any]]:
    """Yield rows for a network: contenders on the mean of 16 workers, and TopK at every number of workers."""
    contenders: dict[tuple[bool, float, str, int], Feedback] = {}
    for step, (g, lr) in enumerate(gradients(name, max(WORKERS), STEPS, by_class=by_class, folders=folders)):
        d = g.shape[1]
        if not contenders:
            for corrected in (False, True):
                for budget in BUDGETS:
                    for label, c in on_the_mean(d, budget, variants=budget == BUDGETS[1]).items():
                        contenders[corrected, budget, label, 16] = Feedback(c, corrected=corrected)
                    for w in WORKERS:
                        for label, c in on_the_mean(d, budget, variants=False).items():
                            contenders.setdefault((corrected, budget, label, w), Feedback(c, corrected=corrected))
                        if (topk := gathered(d, budget, w)) is not None:
                            contenders[corrected, budget, "TopK, gathered", w] = Feedback(topk, corrected=corrected)
        for (corrected, _, label, w), contender in contenders.items():
            if not corrected and step < STEPS - LAST:
                continue
            u = lr * g[:w]
            contender.step(u if label == "TopK, gathered" else u.mean(0), step)
    for (corrected, budget, label, w), contender in contenders.items():
        last = contender.seen[-LAST:]
        yield {
            "vector": name,
            "split": "by class" if by_class else "iid",
            "corrected": corrected,
            "d": d,
            "workers": w,
            "budget": budget,
            "contender": label,
            "kept": f"{sum(last) / len(last):.5f}",
            "deviation": f"{deviation(last):.5f}",
            "draws": len(last),
            "k": getattr(contender.compressor, "k", ""),
        }


def deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1))


def made_up(d: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield rows for random vectors of d coordinates, which all of W workers have alike: TopK's best case."""
    for name, make in MADE_UP.items():
        vectors = [make(d, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
        for budget in BUDGETS:
            contenders: dict[tuple[str, int], Compressor | None] = {
                (label, 1): c for label, c in on_the_mean(d, budget, variants=d == 10**6).items()
            }
            contenders |= {("TopK, gathered", w): gathered(d, budget, w) for w in WORKERS}
            for (label, w), c in contenders.items():
                if c is None:
                    continue
                seen = [kept(v, c(v, seed=seed)) for seed, v in enumerate(vectors)]
                yield {
                    "vector": name,
                    "split": "",
                    "corrected": False,
                    "d": d,
                    "workers": w,
                    "budget": budget,
                    "contender": label,
                    "kept": f"{sum(seen) / len(seen):.5f}",
                    "deviation": f"{deviation(seen):.5f}",
                    "draws": len(seen),
                    "k": getattr(c, "k", ""),
                }


def rows(what: str, folders: dict[str, Path | None]) -> Iterator[dict[str, Any]]:
    if what == "made-up":
        for d, seeds in ((10**4, 10), (10**5, 5), (10**6, 2), (10**7, 1)):
            yield from made_up(d, seeds)
    else:
        for by_class in (False, True):
            yield from real(what, by_class=by_class, folders=folders)


def main(what: str, mnist: str, cifar: str, path: str) -> None:
    torch.set_num_threads(1)
    with open(path, "w", newline="") as file:
        writer = None
        for row in rows(what, {"mnist": Path(mnist), "folder": Path(cifar), "text": None}):
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
