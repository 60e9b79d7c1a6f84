"""Tables of runs and of settings, one row each: as numbers, and as formatted text."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packsaddle.runs.report.curves import standstill
from packsaddle.runs.report.settings import Estimate, Setting, estimate
from packsaddle.runs.run_folder import Run

PLATEAU_TOLERANCE = 0.05


@dataclass(frozen=True)
class Row:
    """The row of one run; None: unknown or not applicable."""

    run: str
    final_loss: float | None  # mean training loss of the last epoch
    test_loss: float | None
    test_accuracy: float | None
    plateau_epochs: float | None  # epochs spent on the plateau
    left_plateau: bool | None
    still_since: int | None  # first step of a standstill of the loss that lasts to the end (see `standstill`)
    megabytes: float  # sent per worker; with one worker, of its messages
    compression: float | None  # bytes of uncompressed SGD's gradients over bytes of this run's messages
    seconds: float


@dataclass(frozen=True)
class SettingRow:
    """The row of one setting: quantities over its seeds; None: unknown or not applicable."""

    setting: str
    seeds: int  # number of runs
    unfinished: int  # number of unfinished runs
    on_plateau: int  # number of runs on the plateau at the end
    still: int  # number of runs with a standstill at the end
    estimates: dict[str, Estimate | None]  # by quantity, in the order of the columns


def row(run: Run) -> Row:
    """Summarize a run, finished or not."""
    last = run.metrics[-1] if run.metrics else {}
    summary = run.summary or {}
    spent, left = plateau(run.metrics, run.config.get("plateau"))
    still = standstill(run.metrics)
    return Row(
        run=run.label + ("" if run.summary else " (unfinished)"),
        final_loss=summary.get("final_loss", last.get("loss")),
        test_loss=summary.get("test_loss", _latest(run, "test_loss")),
        test_accuracy=summary.get("test_accuracy", _latest(run, "test_accuracy")),
        plateau_epochs=spent,
        left_plateau=left,
        still_since=None if still is None else still.since,
        megabytes=(last.get("sent") or last.get("payload") or 0) / 1e6,
        compression=summary.get("compression"),
        seconds=last.get("seconds", 0.0),
    )


def _latest(run: Run, quantity: str) -> float | None:
    """Return the last value of a quantity in a run's metrics, or None."""
    return next((line[quantity] for line in reversed(run.metrics) if line.get(quantity) is not None), None)


def setting_row(setting: Setting) -> SettingRow:
    """Summarize a setting. Each quantity is averaged over the runs that have it."""
    rows = [row(run) for run in setting.runs]

    def over(quantity: str) -> Estimate | None:
        values = [float(v) for r in rows if (v := getattr(r, quantity)) is not None]
        return estimate(values) if values else None

    return SettingRow(
        setting=setting.label,
        seeds=len(rows),
        unfinished=sum(run.summary is None for run in setting.runs),
        on_plateau=sum(r.left_plateau is False for r in rows),
        still=sum(r.still_since is not None for r in rows),
        estimates={quantity: over(quantity) for quantity in _COLUMNS if quantity != "still_since"},
    )


def plateau(metrics: Sequence[dict[str, Any]], level: float | None) -> tuple[float | None, bool | None]:
    """Return the number of epochs on a plateau at loss `level`, and True if the run left it; None: not applicable.

    The plateau begins with the first line of metrics whose loss is at most 5% above `level`. It ends with the first
    later line more than 5% below `level`, or else with the run.
    """
    if level is None:
        return None, None
    entered = next((line["epoch"] for line in metrics if line["loss"] <= level * (1 + PLATEAU_TOLERANCE)), None)
    if entered is None:
        return 0.0, None
    after = [line for line in metrics if line["epoch"] >= entered]
    left = next((line["epoch"] for line in after if line["loss"] < level * (1 - PLATEAU_TOLERANCE)), None)
    return (after[-1]["epoch"] if left is None else left) - entered, left is not None


# Quantities in the tables: heading and number format.
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "final_loss": ("final loss", "{:.4f}".format),
    "test_loss": ("test loss", "{:.4f}".format),
    "test_accuracy": ("test accuracy", "{:.2%}".format),
    "plateau_epochs": ("epochs on plateau", "{:.1f}".format),
    "still_since": ("still since step", "{:,}".format),
    "megabytes": ("MB per worker", "{:,.1f}".format),
    "compression": ("compression", "{:,.1f}x".format),
    "seconds": ("seconds", "{:.1f}".format),
}
_OPTIONAL = {"test_accuracy", "still_since"}  # columns that are omitted if no run has a value


@dataclass(frozen=True)
class Table:
    """A table of formatted text; the first column names the row."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def run_table(runs: Sequence[Run]) -> Table:
    """Return the table of runs."""
    rows = [row(run) for run in runs]
    shown = _shown(map(vars, rows))
    return Table(
        ("run", "seed", *(_COLUMNS[name][0] for name in shown)),
        tuple(
            (r.run, _seed(run), *(_cell(name, getattr(r, name), r) for name in shown))
            for run, r in zip(runs, rows, strict=True)
        ),
    )


def setting_table(settings: Sequence[Setting]) -> Table:
    """Return the table of settings: means over seeds, with 95% intervals for several seeds."""
    rows = [setting_row(setting) for setting in settings]
    shown = _shown(r.estimates for r in rows)
    return Table(
        ("setting", "seeds", *(_COLUMNS[name][0] for name in shown)),
        tuple(
            (r.setting + _progress(r), str(r.seeds), *(_interval(name, r.estimates[name], r) for name in shown))
            for r in rows
        ),
    )


def _seed(run: Run) -> str:
    return str(run.config.get("seed", "-"))


def _shown(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the quantities to show as columns."""
    found = [*rows]
    return [n for n in _COLUMNS if n not in _OPTIONAL or any(r.get(n) is not None for r in found)]


def _progress(r: SettingRow) -> str:
    """Return the suffix of a setting's name, such as " (1 of 3 unfinished)"; "" if there is none."""
    counts = {"unfinished": r.unfinished, "standing still": r.still}
    said = [what if n == r.seeds else f"{n} of {r.seeds} {what}" for what, n in counts.items() if n]
    return f" ({', '.join(said)})" if said else ""


def _cell(name: str, value: float | None, r: Row) -> str:
    still = "+" if name == "plateau_epochs" and r.left_plateau is False else ""
    return "-" if value is None else _COLUMNS[name][1](value) + still


def _interval(name: str, found: Estimate | None, r: SettingRow) -> str:
    write = _COLUMNS[name][1]
    if found is None:
        return "-"
    if not math.isfinite(found.mean):
        lost = sum(not math.isfinite(v) for v in found.values)
        return write(found.mean) if r.seeds == 1 else f"{found.mean:.0f} (not finite: {lost} of {len(found.values)})"
    still = "+" if name == "plateau_epochs" and r.on_plateau else ""
    half = "" if found.high is None else write(found.high - found.mean)
    spread = f" ± {half}" if any(digit in half for digit in "123456789") else ""  # not "± 0.0"
    return write(found.mean) + still + spread


def certificate_table(runs: Sequence[Run]) -> Table:
    """Return the table of all certificates along the runs."""
    return Table(
        ("run", "seed", "epoch", "verdict", "loss", "gradient norm", "smallest eigenvalue in", "threshold"),
        tuple((run.label, _seed(run), *_certificate_cells(c)) for run in runs for c in run.certificates),
    )


def _certificate_cells(c: dict[str, Any]) -> list[str]:
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


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
