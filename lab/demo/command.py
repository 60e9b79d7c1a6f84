"""The command `python -m lab demo`."""

from datetime import datetime
from pathlib import Path
from typing import Any

from lab.demo import saddle, slow_link
from lab.pool import Report, in_parallel
from packsaddle.cli.folders import make_new, written
from packsaddle.errors import check_not_negative, check_positive, config_errors, require

Method = saddle.Method | slow_link.Method


def demo(out: Path | None = None, epochs: float = 32.0, text_epochs: float = 1.0, seed: int = 0) -> None:
    """Show an escape from a saddle, and training over a slow link.

    First trains a deep autoencoder on scikit-learn's digits four times, without noise, and with noise uncompressed,
    with RandomK 1% and with TopK 1%. Also trains a small transformer on the text of Python's own reference with AdamW,
    for the same number of steps by one machine alone, by dense training and by local updates. Each part has a page and
    prints the page's sentences. Takes a minute on two cores.

    Examples:
        python -m lab demo
        python -m lab demo --epochs 20 --out runs/short

    Args:
        out: New folder for the pages; by default runs/demo-DATE-TIME.
        epochs: Passes of the two workers over the digits.
        text_epochs: Passes of the two workers over the text.
        seed: Seed of all random numbers.
    """
    with config_errors("--"):
        check_positive(epochs=epochs, text_epochs=text_epochs)
        check_not_negative(seed=seed)
    require("matplotlib", "lab", "the demo's charts")
    folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    make_new(folder)

    # All seven runs, as many at once as there are cores. The longest begin first.
    todo: list[saddle.Method | slow_link.Method] = [
        *saddle.methods(epochs, seed),
        *slow_link.methods(text_epochs, seed),
    ]
    found: dict[Any, Any] = dict(in_parallel(train, todo, "demo"))
    parts = [
        ("saddle.html", saddle.story([found[m] for m in todo[:4]])),
        ("slow-link.html", slow_link.story([found[m] for m in todo[4:]])),
    ]
    with written(folder):
        for (name, story), (other, its) in zip(parts, reversed(parts), strict=True):
            story.write(folder / name, (other, its.title))
            print(f"\n{story.text()}")
    for name, _ in parts:
        print(f"page: {folder / name}")


def train(method: Method, report: Report) -> saddle.Run | slow_link.Run:
    return saddle.train(method, report) if isinstance(method, saddle.Method) else slow_link.train(method, report)
