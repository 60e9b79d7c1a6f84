"""Reports on runs: tables, figures and a self-contained HTML page, made from run folders only."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.runs.report import figures
from lab.runs.report.curves import Curve, curve, read_curves, write_curves
from lab.runs.report.page import render
from lab.runs.report.settings import Estimate, Setting, estimate, settings
from lab.runs.report.tables import SettingRow, plateau, row, setting_row
from lab.runs.run_folder import Run
from packsaddle.cli.certificate_figure import COLOURS, STYLE, save
from packsaddle.cli.folders import make_new, written
from packsaddle.errors import ConfigError

__all__ = [
    "COLOURS",
    "STYLE",
    "Curve",
    "Estimate",
    "Setting",
    "curve",
    "estimate",
    "plateau",
    "read_curves",
    "row",
    "settings",
    "write_curves",
    "write_report",
]


def write_report(runs: Sequence[Run], folder: Path, *, overwrite: bool = False) -> Path:
    """Write an HTML page, figures and CSV tables to a new folder, and return the path of index.html.

    Raises ConfigError if the folder exists and `overwrite` is False, or if it cannot be written. Raises
    MissingExtraError without the plot extra.
    """
    if folder.exists() and not overwrite:
        raise ConfigError(f"report folder {folder} already exists; add --overwrite, or choose another with --out")
    found = settings(runs)
    curves = [curve(setting) for setting in found]
    page, figure = render(found, curves), figures.draw(found, curves)
    if not folder.is_dir():
        make_new(folder)
    with written(folder):
        save(figure, folder)
        _write(folder / "table.csv", [vars(row(run)) for run in runs])
        _write(folder / "settings.csv", [_flat(setting_row(setting)) for setting in found])
        write_curves(curves, folder / "curves.csv")
        (folder / "index.html").write_text(page, encoding="utf-8", newline="")
    return folder / "index.html"


def _flat(r: SettingRow) -> dict[str, Any]:
    found = {name: value for name, value in vars(r).items() if name != "estimates"}
    for name, e in r.estimates.items():
        ends = (None, None, None) if e is None else (e.mean, e.low, e.high)
        found |= zip((name, f"{name}_low", f"{name}_high"), ends, strict=True)
    return found


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
