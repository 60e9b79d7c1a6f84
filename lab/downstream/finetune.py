"""Fine-tuning of pretrained models on the second text: the same recipe for all, over a grid of learning rates."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lab.bench.origin import Origin
from lab.bench.rows_file import add_rows, read_rows
from lab.downstream.pretrain import SETTING, Run, load
from lab.downstream.second_text import SHA256, second_text
from lab.race.inner import held_out_loss, make_inner
from lab.race.recipe import share_of_peak
from lab.race.workload import evenly_spaced, load_library
from lab.runs import DataConfig
from lab.runs.tasks import Batches, Task, make_task

STEPS, WARM_UP, BATCH = 200, 20, 8
RATES = (0.001, 0.002, 0.004, 0.008, 0.016)
WINDOWS = 256  # of the first text's held-out part, for the loss on it


@dataclass(frozen=True)
class Tuned:
    """A fine-tuning with its losses, in nats a character."""

    run: Run
    inner: str  # optimizer, "adamw" or "muon"
    rate: float
    loss: float  # on the held-out part of the second text
    first: float  # on held-out windows of the first text

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Tuned":
        return cls(Run.of_row(row), row["inner"], *(float(row[name]) for name in ("rate", "loss", "first")))


def network_of(run: Run, folder: Path) -> Task:
    """Return the pretrained network."""
    first = load_library(DataConfig("text"), train=True)
    network = make_task(SETTING.model, first.shape, first.classes, seed=run.seed)
    network.load_state_dict(load(run.weights(folder)))
    return network


def finetune(run: Run, inner: str, rate: float, rows: Path, folder: Path) -> None:
    """Fine-tune and store the losses. No-op if the file has this fine-tuning. `rate` 0: no step."""
    done = read_rows(rows, Tuned.of_row, "fine-tuning")
    if any((tuned.run, tuned.inner, tuned.rate) == (run, inner, rate) for tuned in done):
        return
    network, cpu = network_of(run, folder), torch.device("cpu")
    text, _ = second_text()

    # Train as in pretraining: a linear warm-up, a cosine to a tenth, gradients clipped to norm 1.
    optimizers = make_inner(network, inner, rate, betas=(0.9, 0.99))
    batches = Batches(torch.arange(len(text)), BATCH, worker=0, seed=run.seed)
    for step in range(STEPS if rate else 0):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share_of_peak(step, WARM_UP, STEPS)
        network.zero_grad()
        network(*text.batch(batches[step], cpu)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    # Losses on all of the held-out part of the second text, and on windows of the first's.
    with torch.no_grad():
        second, first = second_text()[1], load_library(DataConfig("text"), train=False)
        loss = held_out_loss(network, second, torch.arange(len(second)))
        kept = held_out_loss(network, first, evenly_spaced(len(first), WINDOWS))
    row = asdict(run) | {"inner": inner, "rate": rate, "loss": round(loss, 5), "first": round(kept, 5)}
    add_rows(rows, [row | asdict(Origin.here(text=SHA256[:12]))])
    print(row, flush=True)
