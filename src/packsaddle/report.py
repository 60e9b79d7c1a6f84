"""Run folders to a table, a figure and one self-contained HTML page. Reads files only; knows no algorithm."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from packsaddle import figures
from packsaddle.data import require
from packsaddle.runfolder import Run, make_new

PLATEAU_TOLERANCE = 0.05


@dataclass(frozen=True)
class Row:
    """One run in the table; None is unknown or not applicable."""

    run: str
    final_loss: float | None  # mean training loss of the last epoch
    test_loss: float | None
    plateau_epochs: float | None  # epochs spent on the plateau
    left_plateau: bool | None
    megabytes: float  # sent per worker (with one worker: of its messages)
    compression: float | None  # bytes of uncompressed SGD's gradients over bytes of this run's messages
    seconds: float


def row(run: Run) -> Row:
    """Summarise a run, finished or not."""
    last = run.metrics[-1] if run.metrics else {}
    summary = run.summary or {}
    spent, left = plateau(run.metrics, run.config.get("plateau"))
    return Row(
        run=run.label + ("" if run.summary else " (unfinished)"),
        final_loss=summary.get("final_loss", last.get("loss")),
        test_loss=summary.get("test_loss"),
        plateau_epochs=spent,
        left_plateau=left,
        megabytes=(last.get("sent") or last.get("payload", 0)) / 1e6,
        compression=summary.get("compression"),
        seconds=last.get("seconds", 0.0),
    )


def plateau(metrics: Sequence[dict[str, Any]], level: float | None) -> tuple[float | None, bool | None]:
    """Return the epochs spent on a plateau, and whether it was left.

    It is entered at the first line of metrics whose loss is at most 5% above `level` and left at the first
    later one whose loss is 5% below it; a run that does not leave it stays to its end.
    """
    if level is None:
        return None, None
    entered = next((line["epoch"] for line in metrics if line["loss"] <= level * (1 + PLATEAU_TOLERANCE)), None)
    if entered is None:
        return 0.0, None
    after = [line for line in metrics if line["epoch"] >= entered]
    left = next((line["epoch"] for line in after if line["loss"] < level * (1 - PLATEAU_TOLERANCE)), None)
    return (after[-1]["epoch"] if left is None else left) - entered, left is not None


def cells(r: Row) -> list[str]:
    """Format a row for people."""
    spent = "-" if r.plateau_epochs is None else f"{r.plateau_epochs:.1f}"
    if r.left_plateau is False:
        spent += "+"
    return [
        r.run,
        _number(r.final_loss, ".4f"),
        _number(r.test_loss, ".4f"),
        spent,
        f"{r.megabytes:,.1f}",
        "-" if r.compression is None else f"{r.compression:,.1f}x",
        f"{r.seconds:.1f}",
    ]


HEADINGS = ("run", "final loss", "test loss", "epochs on plateau", "MB per worker", "compression", "seconds")


CERTIFICATE_HEADINGS = ("run", "epoch", "verdict", "loss", "gradient norm", "smallest eigenvalue in", "threshold")


def certificate_cells(c: dict[str, Any]) -> list[str]:
    """Format a certificate of a run for people."""
    looked = c.get("lambda_min_lower") is not None and c["verdict"] != "gradient too large"
    bounds = f"[{c['lambda_min_lower']:.2e}, {c['lambda_min_upper']:.2e}]" if looked else "-"
    return [
        f"{c['epoch']:.1f}",
        c["verdict"],
        _number(c["loss"], ".4f"),
        _number(c.get("grad_norm"), ".2e"),
        bounds,
        _number(c.get("threshold"), ".2e"),
    ]


def write_report(runs: Sequence[Run], folder: Path, *, overwrite: bool = False) -> Path:
    """Write index.html, figure.png, figure.svg and table.csv into a new folder and return the page's path.

    Raises ConfigError if the folder exists, unless `overwrite`; MissingExtraError without the plot extra.
    """
    jinja2 = require("jinja2", "plot", "writing the report")
    figure = figures.draw(runs)
    if not (overwrite and folder.is_dir()):
        make_new(folder)
    figures.save(figure, folder)
    rows = [row(run) for run in runs]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows([getattr(r, f.name) for f in fields(Row)] for r in rows)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("packsaddle").joinpath("report.html.j2").read_text()
    )
    page = template.render(
        headings=HEADINGS,
        table=[cells(r) for r in rows],
        figure=figures.to_svg(figure),
        runs=runs,
        configs=[json.dumps(run.config, indent=2) for run in runs],
        environments=[json.dumps(run.environment, indent=2) for run in runs],
        tolerance=PLATEAU_TOLERANCE,
        certificate_headings=CERTIFICATE_HEADINGS,
        certificates=[(run.label, certificate_cells(c)) for run in runs for c in run.certificates],
    )
    (folder / "index.html").write_text(page)
    return folder / "index.html"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
