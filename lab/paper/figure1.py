"""The paper's Figure 1: ResNet-34 on CIFAR-10, ten workers of one class each, RandomK from 100% to 0.1%.

    python -m lab.paper.figure1 --data-dir DIR --out fig1        # four ratios
    python -m lab.paper.figure1 norms --data-dir DIR             # three normalization layers
    python -m lab.paper.figure1 compressors --data-dir DIR       # nine compressors
    python -m lab.paper.figure1 --data-dir DIR --only dense randomk-1 --lr 0.05 --epochs 5

`train` is one run, and `work` one worker's part of it. The settings of each study are in `STUDIES`.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import sub
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab.paper import drawing
from lab.paper.results import Curve, Json, by_setting, finish, interval, lowest_at, paired
from lab.paper.study import NINE, Measurements, Options, Row, Run, Scale, do_runs, mean_over_workers
from lab.pool import Report
from lab.tasks.images import Images, load_images
from lab.tasks.models import Norm, average_buffers, connect, resnet, seeded
from lab.tasks.sharding import Batches, shard
from packsaddle import CompressedSGD, load_checkpoint, save_checkpoint, simulate
from packsaddle.cli import serve
from packsaddle.comm.group import ambient_group
from packsaddle.comm.simulation import FusedGroup
from packsaddle.compressors import Compressor, Identity, RandomK

WORKERS, BATCH = 10, 8


@dataclass(frozen=True)
class Setting:
    """What differs between the runs."""

    label: str
    compressor: Compressor
    norm: Norm = "all"  # statistics of batch normalization: all workers', or each worker's own; group: group norm
    lr: float = 0.1
    epochs: float | None = None  # None: those of the scale


@dataclass(frozen=True)
class Size:
    """The size of a scale: epochs, channels of the first stage, first layer, and number of training images."""

    epochs: float
    width: int
    stem: str
    limit: int | None = None
    every: int = 125  # steps of a row
    depth: int = 34


# Scale cpu has a quarter of the channels and torchvision's own stem, which need 1/200 of the arithmetic.
SCALES: dict[Scale, Size] = {
    "paper": Size(50.0, 64, "small"),
    "cpu": Size(20.0, 16, "imagenet"),
    "smoke": Size(2.0, 4, "imagenet", limit=400, every=1),
}
RATIOS = {
    "dense": Setting("100%", Identity()),
    "randomk-10": Setting("RandomK 10%", RandomK(0.1)),
    "randomk-1": Setting("RandomK 1%", RandomK(0.01)),
    "randomk-0.1": Setting("RandomK 0.1%", RandomK(0.001)),
}
NORMS: dict[Norm, str] = {"all": "batch norm over all", "worker": "batch norm by worker", "group": "group norm"}
STUDIES: dict[str, dict[str, Setting]] = {
    "figure1": RATIOS,
    "figure1-norms": {
        f"{name}-{norm}": replace(RATIOS[name], label=f"{RATIOS[name].label}, {words}", norm=norm)
        for norm, words in NORMS.items()
        for name in ("dense", "randomk-1")
    },
    "figure1-compressors": {name: Setting(label, c) for name, (label, c) in NINE.items()},
}


def train(run: Run[Setting], report: Report, *, data_dir: Path, size: Size) -> list[Row]:
    """Do one run, in this process, with ten simulated workers.

    Workers that exchange only the mean of linear messages, as with RandomK, and that have no statistics of their own,
    equal one worker with the batches of all. That is ten times as fast.
    """
    linear = isinstance(run.setting.compressor, Identity | RandomK)
    if linear and run.setting.norm != "worker":
        with ambient_group(FusedGroup(WORKERS)):
            rows = work(range(WORKERS), run, report, data_dir=data_dir, size=size)
    else:
        each = simulate(lambda rank: work(range(rank, rank + 1), run, report, data_dir=data_dir, size=size), WORKERS)
        rows = mean_over_workers(each)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return rows


def work(members: range, run: Run[Setting], report: Report, *, data_dir: Path, size: Size) -> list[Row]:
    """Train the workers `members`, all in one, and return their rows: one for every 125 steps."""
    setting, seed = run.setting, run.seed

    # The data: worker i has the images of class i.
    data, tests = (load_images(dataset(data_dir), data_dir, train=t, limit=size.limit) for t in (True, False))
    own = [shard(data, "class", worker=w, workers=WORKERS, seed=seed) for w in members]
    batches = [Batches(mine, BATCH, seed=seed, worker=w) for mine, w in zip(own, members, strict=True)]
    per_epoch = len(data) // (BATCH * WORKERS)
    steps = round((setting.epochs or size.epochs) * per_epoch)

    make = partial(resnet, size.depth, data.classes, width=size.width, stem=size.stem, norm=setting.norm)
    model = seeded(make, seed)
    optimizer = CompressedSGD(model.named_parameters(), setting.lr, setting.compressor, seed=seed)
    connect(model, optimizer.channel)

    # A run that was interrupted continues from its last epoch.
    measured = Measurements(steps, per_epoch, size.every, optimizer.ledger)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "measured": measured}
    found = load_checkpoint(run.checkpoints, parts)
    for step in range(found.step + 1 if found else 1, steps + 1):
        images, labels = data.batch(torch.cat([each[step - 1] for each in batches]))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(centered(images)), labels)
        torch.autograd.backward(loss)
        measured.add(step, loss, model.parameters())
        optimizer.step()

        row = measured.row(step)
        if row is not None and (step % per_epoch == 0 or step == steps):
            with measured.paused():
                average_buffers(model, optimizer.channel)
                row |= tested(model, tests)
            save_checkpoint(run.checkpoints, parts, step=step)
        report(step / steps)
    return measured.rows


def centered(pixels: Tensor) -> Tensor:
    """Scale pixels from [0, 1] to [-2, 2], which gives natural images about zero mean and unit variance."""
    return (pixels - 0.5) * 4.0


@torch.no_grad()
def tested(model: nn.Module, tests: Images) -> Row:
    """Return the mean loss and the accuracy on the test images."""
    loss = correct = 0.0
    model.eval()
    for index in torch.split(torch.arange(len(tests)), 512):
        images, labels = tests.batch(index)
        logits = model(centered(images))
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
    model.train()
    return {"test_loss": loss / len(tests), "test_accuracy": correct / len(tests)}


def dataset(data_dir: Path) -> str:
    """Return the name of the data set in a folder: images in train/CLASS/*, otherwise CIFAR-10."""
    return "folder" if (data_dir / "train").is_dir() else "cifar10"


def findings(summary: Json, curves: Sequence[Curve]) -> list[str]:
    """Return sentences that compare RandomK with uncompressed training: last epoch's loss, test accuracy and bytes.

    Differences are paired by seed.
    """
    entries = by_setting(summary)
    whole = entries["100%"]
    lines = []
    for setting in list(RATIOS.values())[1:]:
        one = entries[setting.label]
        loss, accuracy = (paired(one, whole, quantity, sub) for quantity in ("final_loss", "test_accuracy"))
        share = one["megabytes"]["mean"] / whole["megabytes"]["mean"]
        lines.append(
            f"{setting.label}: final loss {interval(loss, '+.3f')} and test accuracy {interval(accuracy, '+.3f')} "
            f"against 100%, with {share:.1%} of its bytes"
        )
    return lines


FINDINGS: Mapping[str, Any] = {"figure1": findings, "figure1-compressors": lambda _, curves: lowest_at(curves)}


def figure1(
    what: Literal["figure1", "norms", "compressors"] = "figure1",
    /,
    *,
    data_dir: Path,
    options: Options,
    lr: float = 0.1,
    epochs: float | None = None,
    download: bool = False,
) -> None:
    """Train a ResNet on CIFAR-10 with ten workers of one class each, and draw Figure 1 or one of its variants.

    Examples:
        python -m lab.paper.figure1 --data-dir CIFAR10 --download --out fig1
        python -m lab.paper.figure1 --data-dir CIFAR10 --scale smoke --seeds 1
        python -m lab.paper.figure1 --data-dir CIFAR10 --only dense randomk-1 --lr 0.05 --epochs 5

    Args:
        what: The paper's figure, or a variant (experiments/README.md has their questions).
        data_dir: Folder of CIFAR-10, as torchvision keeps it, or of images in train/CLASS/* and test/CLASS/*.
        options: Those of every study.
        lr: Step size.
        epochs: Passes of all workers together over the images; by default those of the scale, and 8 of compressors.
        download: Fetch CIFAR-10 into --data-dir if it is not there.
    """
    load_images(dataset(data_dir), data_dir, train=True, download=download)  # raises errors before the runs start
    name = "figure1" if what == "figure1" else f"figure1-{what}"
    # Most of the nine compressors need a gradient of each worker, so the simulation is slower.
    passes = 8.0 if epochs is None and what == "compressors" and options.scale == "cpu" else epochs
    settings = {key: replace(setting, lr=lr, epochs=passes) for key, setting in STUDIES[name].items()}
    seeds = 3 if name == "figure1" and options.scale != "smoke" else 1
    runs = do_runs(name, settings, partial(train, data_dir=data_dir, size=SCALES[options.scale]), seeds, options)
    finish(runs, drawing.grid, None if options.only else FINDINGS.get(name))


def main() -> None:
    """Run the command line."""
    serve(figure1, "python -m lab.paper.figure1")


if __name__ == "__main__":
    main()
