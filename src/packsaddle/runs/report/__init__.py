"""Run folders to tables, figures and one self-contained HTML page. Reads files only; knows no algorithm."""

import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from packsaddle.messages import cell
from packsaddle.runs.report import figures
from packsaddle.runs.report.curves import Curve, curve, read_curves, write_curves
from packsaddle.runs.report.figures import COLOURS, STYLE, save
from packsaddle.runs.report.page import render
from packsaddle.runs.report.settings import Estimate, Setting, estimate, settings
from packsaddle.runs.report.tables import Row, SettingRow, plateau, row, setting_row
from packsaddle.runs.run_folder import Run, make_new, written

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
    "save",
    "settings",
    "write_curves",
    "write_report",
]


def write_report(runs: Sequence[Run], folder: Path, *, overwrite: bool = False) -> Path:
    """Write index.html, figure.png, figure.svg, table.csv (of runs), settings.csv and curves.csv into a new folder,
    and return the page's path.

    Raises ConfigError if the folder exists, unless `overwrite`; MissingExtraError without the plot extra;
    ConfigError also where the disk is full.
    """
    found = settings(runs)
    curves = [curve(setting) for setting in found]
    page, figure = render(found, curves), figures.draw(found, curves)
    if not (overwrite and folder.is_dir()):
        make_new(folder)
    with written(folder):
        save(figure, folder)
        _write_runs([row(run) for run in runs], folder / "table.csv")
        _write_settings(found, folder / "settings.csv")
        write_curves(curves, folder / "curves.csv")
        (folder / "index.html").write_text(page, encoding="utf-8", newline="")
    return folder / "index.html"


def _write_runs(rows: Sequence[Row], path: Path) -> None:
    names = [f.name for f in fields(Row)]
    _write(path, names, [[getattr(r, name) for name in names] for r in rows])


def _write_settings(found: Sequence[Setting], path: Path) -> None:
    """A line per setting; of an estimate its mean and the ends of its interval."""
    rows = [setting_row(setting) for setting in found]
    estimated = {f.name for f in fields(SettingRow)} - {"setting", "seeds", "unfinished", "on_plateau", "still"}
    names = [f.name for f in fields(SettingRow)]
    headings = [h for n in names for h in ((n, f"{n}_low", f"{n}_high") if n in estimated else (n,))]
    cells = [[c for n in names for c in (_ends(getattr(r, n)) if n in estimated else [getattr(r, n)])] for r in rows]
    _write(path, headings, cells)


def _ends(found: Estimate | None) -> list[float | None]:
    return [None, None, None] if found is None else [found.mean, found.low, found.high]


def _write(path: Path, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(headings)
        writer.writerows([cell(value) for value in line] for line in rows)
