"""The demo's second part: a small transformer on slow links, by one machine, dense training and local updates."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lab.demo.story import Story
from lab.pool import Report
from lab.tasks.models import CharTransformer
from lab.tasks.sharding import Batches, shard
from lab.tasks.text import load_text
from packsaddle import LocalUpdates, simulate
from packsaddle.comm import ring_all_reduce

WORKERS, BATCH, LR, EVERY = 2, 8, 0.008, 8
LINKS = (10, 50, 200)  # Mbit/s
Name = Literal["one machine alone", "dense training", "local updates"]


@dataclass(frozen=True)
class Method:
    """One of the three runs, which make the same number of steps."""

    name: Name
    epochs: float  # passes of two workers over the text
    seed: int

    def __str__(self) -> str:
        return self.name


def methods(epochs: float, seed: int) -> list[Method]:
    names: tuple[Name, ...] = ("one machine alone", "dense training", "local updates")
    return [Method(name, epochs, seed) for name in names]


@dataclass(frozen=True)
class Run:
    """What was measured in one run."""

    method: Method
    steps: int
    parameters: int
    loss: float  # mean loss on the last tenth of the text
    megabytes: float  # sent by each worker
    computing: float  # seconds that each worker computed: CPU time on one core, which other programs do not change

    def seconds(self, mbit: float) -> float:
        """Return the seconds of this run over a link of `mbit` Mbit/s: computing, and then sending."""
        return self.computing + 8 * self.megabytes / mbit


def train(method: Method, report: Report) -> Run:
    """Do one run, in this process.

    Dense training computes the mean gradient of both workers' batches, so it is one process with both batches. Its ring
    all-reduce of the gradients is not made, but counted.
    """
    if method.name == "local updates":
        return simulate(lambda rank: _train(method, rank, report), WORKERS)[0]
    return _train(method, 0, report)


def _train(method: Method, rank: int, report: Report) -> Run:
    # The data: one half of the text for each worker of local updates, all of it for the single process of the others.
    text = load_text(train=True)
    local = method.name == "local updates"
    mine = shard(text, "iid", worker=rank, workers=WORKERS if local else 1, seed=method.seed)
    together = WORKERS if method.name == "dense training" else 1  # workers whose batches are computed at once
    batches = Batches(mine, together * BATCH, worker=rank, seed=method.seed)
    steps = max(1, round(method.epochs * (len(text) // (BATCH * WORKERS))))

    # The model, AdamW, and for local updates the line that exchanges.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(method.seed)
        model = CharTransformer(text.classes, text.context, width=64, depth=2, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.99), weight_decay=0.1)
    exchange = LocalUpdates(optimizer, every=EVERY, model=model, seed=method.seed) if local else None

    begin = time.thread_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(step, steps)
        optimizer.zero_grad()
        inputs, targets = text.batch(batches[step])
        torch.autograd.backward(nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report((step + 1) / steps)
    if exchange is not None:
        exchange.flush()
    computing = (time.thread_time() - begin) / together

    # What each worker sent, and the loss on text that was not trained on.
    parameters = sum(p.numel() for p in model.parameters())
    if exchange is not None:
        sent = exchange.ledger.sent
    else:
        sent = steps * ring_all_reduce(4 * parameters, WORKERS).sent if together > 1 else 0
    return Run(method, steps, parameters, held_out_loss(model), sent / 1e6, computing)


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak: a warm-up of a tenth, then a cosine down to 10%."""
    rising = 0.1 * steps
    if step + 1 < rising:
        return (step + 1) / rising
    return 0.55 + 0.45 * math.cos(math.pi * (step - rising) / max(1.0, steps - rising))


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    text = load_text(train=False)
    losses = []
    for index in torch.split(torch.arange(len(text)), 256):
        inputs, targets = text.batch(index)
        losses.append(nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum"))
    return float(torch.stack(losses).sum()) / (len(text) * text.context)


def story(runs: Sequence[Run]) -> Story:
    """Return the page on the three runs. Its sentences say so if local updates do not end below one machine's loss."""
    alone, dense, local = runs
    slow = LINKS[0]
    fewer, sooner = dense.megabytes / local.megabytes, dense.seconds(slow) / local.seconds(slow)
    if local.loss < alone.loss:
        result = (
            f"At {slow} Mbit/s, two machines train {sooner:.1f} times as fast with local updates as with dense "
            f"training, because they send {fewer:.0f} times fewer bytes."
        )
    else:
        result = "In this run local updates did not reach the loss of one machine alone, so two machines did not pay."
    happened = (
        f"In {local.steps:,} steps with AdamW, local updates reached a test loss of {local.loss:.2f}, dense training "
        f"{dense.loss:.2f}, and one machine alone, which sees half as many examples, {alone.loss:.2f}.",
        f"Dense training sent every gradient, {dense.megabytes:,.0f} MB, so at {slow} Mbit/s each worker waited for "
        f"{dense.seconds(slow) - dense.computing:,.0f} of {dense.seconds(slow):,.0f} seconds.",
        f"Local updates sent one bit for each weight after every {EVERY} steps, {local.megabytes:.1f} MB in all, which "
        f"takes {local.seconds(slow) - local.computing:.1f} seconds even at {slow} Mbit/s.",
    )

    def draw(axes: Any, narrow: bool) -> None:
        colors = ("#8C8C00", "#D55E00", "#0072B2")
        for i, run in enumerate(runs):
            places = [link + (i - 1) * 0.26 for link in range(len(LINKS))]
            seconds = [run.seconds(mbit) for mbit in LINKS]
            label = f"{run.method.name}: loss {run.loss:.2f}"
            bars = axes.barh(places, seconds, height=0.24, color=colors[i], label=label)
            axes.bar_label(bars, [f"{s:,.0f} s" for s in seconds], padding=3)
        axes.set_yticks(range(len(LINKS)), [f"{mbit}\nMbit/s" for mbit in LINKS])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set(xlabel="seconds", xlim=(0, 1.18 * max(run.seconds(slow) for run in runs)))
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=1)

    return Story(
        title="Two machines on a slow link",
        result=result,
        draw=draw,
        caption=f"Seconds for {local.steps:,} steps: computing as measured here on one core, and then the bytes over "
        "the link. One machine alone sends nothing.",
        happened=happened,
        code="# before the loop\n"
        f"local = packsaddle.LocalUpdates(optimizer, every={EVERY}, model=model)\n"
        "# after it, so that all workers have one model\n"
        "local.flush()",
        headings=("run", "test loss", "MB sent per worker", *(f"s at {mbit} Mbit/s" for mbit in LINKS)),
        rows=[
            (
                run.method.name,
                f"{run.loss:.3f}",
                f"{run.megabytes:,.1f}",
                *(f"{run.seconds(mbit):,.0f}" for mbit in LINKS),
            )
            for run in runs
        ],
        details=(
            f"A transformer of {local.parameters:,} parameters over the characters of Python's language reference, "
            f"AdamW with a peak learning rate of {LR}, batches of {BATCH} for each worker. Two workers see twice "
            "as many examples in the same number of steps. Both workers of local updates are simulated in one process.",
            "The times are computed, and leave out latency: computing is the CPU time of one core, and sending is the "
            "bytes over the rate. Dense training sends its gradients by a ring all-reduce in float32. docs/evidence.md "
            "has times that were measured on links.",
        ),
    )
