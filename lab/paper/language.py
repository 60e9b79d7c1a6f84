"""A small language model by two workers: nine compressors, and variants of the method.

    python -m lab.paper.language --out text              # nine compressors, three of them with and without noise
    python -m lab.paper.language variants --out variants # momentum, and local steps between exchanges

`train` is one run, and `work` one worker's part of it. The settings of both studies are in `STUDIES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab.paper import drawing
from lab.paper.results import finish, lowest_at
from lab.paper.study import NINE, Measurements, Options, Row, Run, Scale, do_runs, mean_over_workers
from lab.pool import Report
from lab.tasks.models import CharTransformer, seeded
from lab.tasks.sharding import Batches, shard
from lab.tasks.text import Text, load_text
from packsaddle import CompressedSGD, LocalUpdates, Ramp, simulate
from packsaddle.cli import serve
from packsaddle.compressors import Compressor, Identity, TopK

WORKERS, BATCH = 2, 16


@dataclass(frozen=True)
class Setting:
    """What differs between the runs."""

    label: str
    compressor: Compressor
    noise: float = 0.0  # standard deviation of the artificial noise in each coordinate of the gradient
    lr: float = 0.3
    momentum: float = 0.0
    local_steps: int = 0  # steps of SGD between two exchanges of local updates; 0: gradients in every step
    halves: bool = False  # True: each worker has one half of the text; False: random windows


@dataclass(frozen=True)
class Size:
    """The size of a scale: epochs, number of windows of text, and steps of a row."""

    epochs: float = 30.0
    limit: int | None = None
    every: int = 50


SCALES: dict[Scale, Size] = {"paper": Size(), "cpu": Size(), "smoke": Size(1.0, 640, every=5)}
STUDIES: dict[str, dict[str, Setting]] = {
    "text": {
        name + suffix: Setting(f"{label}, {words}", compressor, noise)
        for name, (label, compressor) in {"dense": ("uncompressed", Identity()), **NINE}.items()
        for suffix, words, noise in (("", "no noise", 0.0), ("-noise", "noise 0.001", 0.001))
        if not noise or name in ("dense", "randomk", "topk")
    },
    "text-variants": {
        "dense": Setting("uncompressed", Identity(), halves=True),
        "dense-momentum": Setting("uncompressed, momentum 0.9", Identity(), lr=0.03, momentum=0.9, halves=True),
        "plain": Setting("error feedback", TopK(0.01), halves=True),
        "momentum": Setting("error feedback, momentum 0.9", TopK(0.01), lr=0.03, momentum=0.9, halves=True),
        "local-4": Setting("error feedback, 4 local steps", TopK(0.01), local_steps=4, halves=True),
        "local-16": Setting("error feedback, 16 local steps", TopK(0.01), local_steps=16, halves=True),
    },
}


def train(run: Run[Setting], report: Report, *, data_dir: Path | None, size: Size) -> list[Row]:
    """Do one run, in this process, with two simulated workers."""
    work_ = partial(work, run, report, data_dir=data_dir, size=size)
    return mean_over_workers(simulate(work_, WORKERS))


def work(run: Run[Setting], report: Report, rank: int, *, data_dir: Path | None, size: Size) -> list[Row]:
    """Train worker `rank`, and return its rows: one for about every 50 steps."""
    setting, seed = run.setting, run.seed

    # The data: random windows for each worker, or one half of the text.
    text, tests = (load_text(data_dir, train=t, limit=size.limit) for t in (True, False))
    own = shard(text, "class" if setting.halves else "iid", worker=rank, workers=WORKERS, seed=seed)
    batches, per_epoch = Batches(own, BATCH, seed=seed, worker=rank), len(text) // (BATCH * WORKERS)
    steps = round(size.epochs * per_epoch)
    model = seeded(partial(CharTransformer, text.classes, text.context, width=64, depth=2, heads=2), seed)

    # The optimizer: gradients in every step, or SGD that exchanges its changes every few steps.
    optimizer: torch.optim.Optimizer
    momentum: dict[str, Any] = {"momentum": setting.momentum}
    if setting.local_steps:
        optimizer = torch.optim.SGD(model.named_parameters(), setting.lr, **momentum)
        local = LocalUpdates(optimizer, setting.compressor, every=setting.local_steps, seed=seed)
        exchange: CompressedSGD | LocalUpdates = local
    else:
        noise = Ramp(setting.noise, round(0.6 * steps), round(0.85 * steps))
        optimizer = exchange = CompressedSGD(
            model.named_parameters(), setting.lr, setting.compressor, noise=noise, seed=seed, **momentum
        )

    measured = Measurements(steps, per_epoch, size.every, exchange.ledger)
    for step in range(1, steps + 1):
        windows, following = text.batch(batches[step - 1])
        optimizer.zero_grad()
        loss = cross_entropy(model, windows, following)
        torch.autograd.backward(loss)
        measured.add(step, loss, model.parameters())
        optimizer.step()
        if step == steps and isinstance(exchange, LocalUpdates):
            exchange.flush()  # sends what is left, so that the workers end with one model

        # Test once an epoch, and with local updates the parameters that the workers agree on.
        row = measured.row(step)
        if row is not None and (step // per_epoch > (step - size.every) // per_epoch or step == steps):
            with measured.paused():
                if isinstance(exchange, LocalUpdates):
                    with exchange.at_anchor():
                        row |= tested(model, tests)
                else:
                    row |= tested(model, tests)
        report(step / steps)
    return measured.rows


def cross_entropy(model: nn.Module, windows: Tensor, following: Tensor, **options: Any) -> Tensor:
    """Return the mean loss of the characters that follow each position of the windows, both int64[b, context]."""
    return nn.functional.cross_entropy(model(windows).flatten(0, 1), following.flatten(), **options)


@torch.no_grad()
def tested(model: nn.Module, tests: Text) -> Row:
    """Return the mean loss and the accuracy on the held-out text."""
    loss = correct = 0.0
    for index in torch.split(torch.arange(len(tests)), 512):
        windows, following = tests.batch(index)
        logits = model(windows)
        loss += float(nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum"))
        correct += int((logits.argmax(2) == following).sum())
    count = len(tests) * tests.context
    return {"test_loss": loss / count, "test_accuracy": correct / count}


def language(what: Literal["text", "variants"] = "text", /, *, data_dir: Path | None = None, options: Options) -> None:
    """Train a small transformer on text with two workers, and draw losses and accuracies against epochs and bytes.

    Examples:
        python -m lab.paper.language --out text
        python -m lab.paper.language variants --scale smoke

    Args:
        what: Nine compressors, or variants of the method (experiments/README.md has their questions).
        data_dir: Folder of .txt and .md files; by default Python's own language reference.
        options: Those of every study.
    """
    load_text(data_dir, train=True)  # raises errors before the runs start
    name = "text" if what == "text" else f"text-{what}"
    train_ = partial(train, data_dir=data_dir, size=SCALES[options.scale])
    runs = do_runs(name, STUDIES[name], train_, 3, options)
    finish(runs, drawing.grid, None if options.only else FINDINGS[name])


FINDINGS: Mapping[str, Any] = dict.fromkeys(STUDIES, lambda _, curves: lowest_at(curves))


def main() -> None:
    """Run the command line."""
    serve(language, "python -m lab.paper.language")


if __name__ == "__main__":
    main()
