"""Tables of runs and of settings, one row each: as numbers, as formatted text, and as one JSON document."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lab.runs.report.curves import standstill
from lab.runs.report.settings import Estimate, Setting, estimate, settings
from lab.runs.run_folder import Run
from packsaddle.version import __version__

PLATEAU_TOLERANCE = 0.05


@dataclass(frozen=True)
class Row:
    """The table row of one run. A value is None if it is unknown or not applicable."""

    run: str
    seed: int | None
    finished: bool
    final_loss: float | None  # mean training loss of the last epoch
    test_loss: float | None
    test_accuracy: float | None
    plateau_epochs: float | None  # epochs spent on the plateau
    left_plateau: bool | None
    still_since: int | None  # first step of a standstill of the loss that lasts to the end (see `standstill`)
    megabytes: float  # megabytes sent per worker; with one worker, size of its messages
    compression: float | None  # bytes of uncompressed SGD's gradients over bytes of this run's messages
    seconds: float


@dataclass(frozen=True)
class SettingRow:
    """The table row of one setting, i.e. of runs that differ only in their seed.

    A value is None if it is unknown or not applicable.
    """

    setting: str
    seeds: int  # number of runs
    unfinished: int  # number of unfinished runs
    on_plateau: int  # number of runs on the plateau at the end
    still: int  # number of runs with a standstill at the end
    estimates: dict[str, Estimate | None]  # estimates over seeds by quantity, in the order of the columns


def row(run: Run) -> Row:
    """Return the table row of a run, finished or not."""
    last = run.metrics[-1] if run.metrics else {}
    summary = run.summary or {}
    spent, left = plateau(run.metrics, run.config.get("plateau"))
    still = standstill(run.metrics)
    return Row(
        run=run.label,
        seed=run.config.get("seed"),
        finished=run.summary is not None,
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
    return next((line[quantity] for line in reversed(run.metrics) if line.get(quantity) is not None), None)


def setting_row(setting: Setting) -> SettingRow:
    """Return the table row of a setting. Each quantity is averaged over the setting's runs that recorded it."""
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
    """Return the number of epochs that a run spent on a plateau at loss `level`, and True if the run left the plateau.

    The plateau begins with the first line of metrics whose loss is at most 5% above `level`. It ends with the next line
    whose loss is more than 5% below `level`, or with the run. Both results are None if not applicable.
    """
    if level is None:
        return None, None
    entered = next((line["epoch"] for line in metrics if line["loss"] <= level * (1 + PLATEAU_TOLERANCE)), None)
    if entered is None:
        return 0.0, None
    after = [line for line in metrics if line["epoch"] >= entered]
    left = next((line["epoch"] for line in after if line["loss"] < level * (1 - PLATEAU_TOLERANCE)), None)
    return (after[-1]["epoch"] if left is None else left) - entered, left is not None


@dataclass(frozen=True)
class Column:
    """A column of the tables, for one quantity."""

    heading: str
    write: Callable[[float], str]
    meaning: str  # text for the legend of the table


_COLUMNS = {
    "final_loss": Column("final loss", "{:.4f}".format, "mean training loss of the last epoch"),
    "test_loss": Column("test loss", "{:.4f}".format, "mean loss of the test examples"),
    "test_accuracy": Column("test accuracy", "{:.2%}".format, "fraction of the test examples classified correctly"),
    "plateau_epochs": Column(
        "epochs on plateau",
        "{:.1f}".format,
        f"from the first loss at most {PLATEAU_TOLERANCE:.0%} above the plateau's level to the first one "
        f"{PLATEAU_TOLERANCE:.0%} below it",
    ),
    "still_since": Column(
        "still since step",
        "{:,}".format,
        "the loss did not fall from this step to the end; a certificate distinguishes a plateau from a minimum",
    ),
    "megabytes": Column(
        "MB per worker", "{:,.1f}".format, "megabytes sent by a worker; with one worker, the size of its messages"
    ),
    "compression": Column(
        "compression",
        "{:,.1f}x".format,
        "bytes of uncompressed SGD's gradients over bytes of the run's messages, with uncompressed parts and escape "
        "checks",
    ),
    "seconds": Column("seconds", "{:.1f}".format, "training time, without certificates and tests"),
}
_OPTIONAL = {"test_accuracy", "still_since"}  # columns that are omitted if no run has a value
_MARKS = {
    "+": "after a number of epochs: a lower bound, since a run was still on the plateau at its end",
    "±": "half of the 95% confidence interval of the mean over seeds (Student's t)",
    "standing still": "the loss did not fall up to the end; a certificate distinguishes a plateau from a minimum",
}


@dataclass(frozen=True)
class Table:
    """A table of formatted text; the first column names the row."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: tuple[tuple[str, str], ...]  # (mark in the cells or heading, its meaning)


def _table(first: tuple[str, str], shown: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    names, numbers = " ".join(cells[0] for cells in rows), " ".join(cell for cells in rows for cell in cells[1:])
    marks = [(mark, said) for mark, said in _MARKS.items() if mark in (names if mark == "standing still" else numbers)]
    columns = [_COLUMNS[name] for name in shown]
    headings = (*first, *(c.heading for c in columns))
    return Table(headings, tuple(rows), (*marks, *((c.heading, c.meaning) for c in columns)))


def run_table(runs: Sequence[Run]) -> Table:
    rows = [row(run) for run in runs]
    shown = _shown(map(vars, rows))
    cells = []
    for r in rows:
        values = {name: getattr(r, name) for name in shown}
        written = {name: "-" if v is None else _COLUMNS[name].write(v) for name, v in values.items()}
        if r.left_plateau is False and r.plateau_epochs is not None:
            written["plateau_epochs"] += "+"
        cells.append((r.run + " (unfinished)" * (not r.finished), _number(r.seed, "d"), *written.values()))
    return _table(("run", "seed"), shown, cells)


def setting_table(settings: Sequence[Setting]) -> Table:
    """Return the table of settings: means over seeds, with 95% intervals if there are several seeds."""
    rows = [setting_row(setting) for setting in settings]
    shown = _shown(r.estimates for r in rows)
    cells = []
    for r in rows:
        # A suffix of the name, such as " (1 of 3 unfinished)".
        counts = {"unfinished": r.unfinished, "standing still": r.still}
        said = [what if n == r.seeds else f"{n} of {r.seeds} {what}" for what, n in counts.items() if n]
        name = r.setting + (f" ({', '.join(said)})" if said else "")
        cells.append((name, str(r.seeds), *(_interval(name, r.estimates[name], r) for name in shown)))
    return _table(("setting", "seeds"), shown, cells)


def _shown(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    found = [*rows]
    return [n for n in _COLUMNS if n not in _OPTIONAL or any(r.get(n) is not None for r in found)]


def _interval(name: str, found: Estimate | None, r: SettingRow) -> str:
    write = _COLUMNS[name].write
    if found is None:
        return "-"
    if not math.isfinite(found.mean):
        lost = sum(not math.isfinite(v) for v in found.values)
        return write(found.mean) if r.seeds == 1 else f"{found.mean:.0f} (not finite: {lost} of {len(found.values)})"
    still = "+" if name == "plateau_epochs" and r.on_plateau else ""
    half = "" if found.high is None else write(found.high - found.mean)
    spread = f" ± {half}" if any(digit in half for digit in "123456789") else ""  # not "± 0.0"
    return write(found.mean) + still + spread


_CERTIFICATE_LEGEND = (
    ("loss, gradient norm", "of the mean loss over the examples certified, in evaluation mode"),
    (
        "smallest eigenvalue in",
        "bounds on the smallest eigenvalue of the Hessian: the upper one always holds, the lower one with the "
        "configured failure probability; -: the gradient was too large to measure curvature",
    ),
    ("threshold", "-sqrt(rho epsilon): the point is a saddle if the smallest eigenvalue is below it"),
)


def certificate_table(runs: Sequence[Run]) -> Table:
    """Return the table of all certificates along the runs."""
    headings = ("run", "seed", "epoch", "verdict", "loss", "gradient norm", "smallest eigenvalue in", "threshold")
    rows = []
    for run in runs:
        for c in run.certificates:
            looked = c.get("lambda_min_lower") is not None and c["verdict"] != "gradient too large"
            bounds = f"[{c['lambda_min_lower']:.2e}, {c['lambda_min_upper']:.2e}]" if looked else "-"
            loss, norm = _number(c.get("loss"), ".4f"), _number(c.get("grad_norm"), ".2e")
            cells = (f"{c['epoch']:.1f}", c["verdict"], loss, norm, bounds, _number(c.get("threshold"), ".2e"))
            rows.append((run.label, _number(run.config.get("seed"), "d"), *cells))
    return Table(headings, tuple(rows), _CERTIFICATE_LEGEND)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


FORMAT = 1  # version of the JSON document, increased if a key is removed or changes its meaning


def document(runs: Sequence[Run]) -> dict[str, Any]:
    """Return settings, runs and certificates as plain types that strict JSON can represent (see docs/metrics.md).

    A value is None if it is unknown or not applicable. A non-finite number is the text "nan", "inf" or "-inf".
    """
    listed, of_settings, certificates = [], [], []
    for setting in settings(runs):
        summary = asdict(setting_row(setting))
        estimates = summary.pop("estimates")
        of_settings.append({**summary, **estimates})
        for run in setting.runs:
            identity = {"setting": setting.label, "seed": run.config.get("seed")}
            listed.append({**identity, "folder": str(run.path.absolute()), **asdict(row(run))})
            certificates += [{**identity, **{key: c.get(key) for key in _CERTIFICATE}} for c in run.certificates]
    found = {
        "format": FORMAT,
        "packsaddle": __version__,
        "settings": of_settings,
        "runs": listed,
        "certificates": certificates,
    }
    return {name: _plain(value) for name, value in found.items()}


_CERTIFICATE = ("step", "epoch", "verdict", "loss", "grad_norm", "lambda_min_lower", "lambda_min_upper", "threshold")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
