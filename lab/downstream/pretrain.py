"""Pretraining: the 0.83-million-parameter GPT of lab/bench/muon.py on the source of Python's standard library.

Dense training has several lengths, so that the loss after fine-tuning is known as a function of the pretraining loss.
Local updates have the number of steps at which they reach the loss of one of these lengths, each with a whole schedule.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import packsaddle
from lab.bench.muon import METHODS, SETTINGS, train
from lab.bench.origin import Origin
from lab.bench.rows_file import add_rows, read_rows
from lab.race.workload import LIBRARY

WINDOWS = 4096  # of the 17,095 held-out windows, for the pretraining loss
SETTING, RATE = SETTINGS["gpt-2"], 0.008
NAMES = {"dense": "Muon, dense", "Sign": "Muon, local 8, Sign", "DiLoCo": "Muon, DiLoCo 32, 0.9"}  # in lab/bench/muon
EQUAL = (("dense", 512), ("Sign", 592), ("DiLoCo", 1024))  # method and steps, for about the same loss


@dataclass(frozen=True)
class Run:
    """One pretraining: a method of `NAMES`, its number of steps, and the seed of its weights and batches."""

    method: str
    steps: int
    seed: int

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Run":
        return cls(row["method"], int(row["steps"]), int(row["seed"]))

    def weights(self, folder: Path) -> Path:
        """Return the file of the pretrained weights."""
        return folder / f"{self.method}-{self.steps}-{self.seed}.pt"


@dataclass(frozen=True)
class Pretrained:
    """A finished pretraining, with the loss of the common model on held-out windows, in nats a character."""

    run: Run
    loss: float

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Pretrained":
        return cls(Run.of_row(row), float(row["validation_loss"]))


def pretrain(run: Run, rows: Path, folder: Path) -> None:
    """Train and store weights and row. No-op if both exist. Both are deterministic, so that weights can be remade."""
    weights = run.weights(folder)
    known = run in [done.run for done in read_rows(rows, Pretrained.of_row, "pretraining")]
    if known and weights.exists():
        return
    how = METHODS[NAMES[run.method]]
    workers = 1 if how.compressor is None else SETTING.workers
    setting = replace(SETTING, steps=run.steps)
    work = partial(train, setting, how, RATE, run.seed, partial(save, weights), WINDOWS)
    row = packsaddle.simulate(lambda _: work(), workers)[0]
    if not known:
        add_rows(rows, [asdict(run) | row | asdict(Origin.here(text=LIBRARY))])
    print(row, flush=True)


def save(path: Path, network: nn.Module) -> None:
    """Save the weights atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".partial")
    torch.save(network.state_dict(), partial_file)
    partial_file.replace(path)


def load(path: Path) -> dict[str, Tensor]:
    """Load pretrained weights."""
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights
