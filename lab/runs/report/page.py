"""The report as a self-contained HTML page: tables and charts, with no script and no network requests."""

import base64
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from lab.runs.report import tables
from lab.runs.report.curves import Curve
from lab.runs.report.figures import AXIS_NAMES, PANELS, inline_svg, line_style, panels
from lab.runs.report.settings import Setting
from lab.runs.run_folder import Run
from packsaddle.cli.certificate_figure import COLOURS
from packsaddle.errors import require
from packsaddle.messages import printable

_DASHES = {"-": "", "--": "6 4", ":": "2 3"}  # matplotlib's line styles in SVG


def render(settings: Sequence[Setting], curves: Sequence[Curve]) -> str:
    """Return the report on `settings` and their `curves` as HTML.

    Raises MissingExtraError without the plot extra.
    """
    jinja2 = require("jinja2", "lab", "writing the report")
    templates = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = files("lab.runs.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    runs = [run for setting in settings for run in setting.runs]

    # Without local updates, rounds equal steps and need no axis.
    has_rounds = any(setting.config.get("local") for setting in settings)
    axes = {axis: name for axis, name in AXIS_NAMES.items() if axis != "rounds" or has_rounds}
    charts = {
        panel: {axis: inline_svg(panel, axis, settings, curves) for axis in axes} for panel in panels(settings, curves)
    }
    page: str = templates.from_string(template).render(
        title=title(runs),
        axes=axes,
        against=[*axes][1:],
        charts=charts,
        names=PANELS,
        colours=COLOURS,
        settings=[_described(i, setting) for i, setting in enumerate(settings)],
        setting_table=tables.setting_table(settings),
        run_table=tables.run_table(runs),
        certificates=tables.certificate_table(runs),
        pictures=[
            {
                "name": f"{run.label}: {printable(png.parent.name)}/{printable(png.name)}",
                "text": _verdict(png),
                "data": base64.b64encode(png.read_bytes()).decode(),
            }
            for run in runs
            for png in sorted(run.path.glob("certificate*/*.png"))
            if (png.parent / "certificates.json").is_file()
        ],
    )
    return page


def title(runs: Sequence[Run]) -> str:
    """Return the title of a report, such as "autoencoder on digits, 120,458 parameters, 2 workers, 2026-11-28".

    Parts that are missing in the runs' files are omitted.
    """
    models, data = ([_text(run.config.get(table)) for run in runs] for table in ("model", "data"))
    task = " on ".join(found for names in (models, data) if (found := " and ".join(_distinct(names))))
    parameters = _range(run.summary.get("parameters") for run in runs if run.summary)
    workers = _range(run.environment.get("workers") for run in runs)
    days = sorted(str(day)[:10] for run in runs if (day := run.environment.get("started")))
    parts = (
        task,
        parameters and f"{parameters} parameters",
        workers and f"{workers} worker{'' if workers == '1' else 's'}",
        " to ".join(_distinct(days[:1] + days[-1:])),
    )
    return printable(", ".join(part for part in parts if part)) or "Training runs"


def _text(table: Any) -> str:
    """Return the entry `name` of a table of the configuration.

    It is "" if it is missing or not text, which happens in files of old versions.
    """
    name = table.get("name") if isinstance(table, dict) else None
    return name if isinstance(name, str) else ""


def _distinct(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def _range(values: Iterable[Any]) -> str:
    found = sorted({value for value in values if type(value) is int})
    return " to ".join(f"{value:,}" for value in dict.fromkeys(found[:1] + found[-1:]))


def _verdict(png: Path) -> str:
    """Return the headline and the numbers of the certificate that a PNG shows, read from the file beside it.

    Returns "" if this file is damaged.
    """
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        points = json.loads((png.parent / "certificates.json").read_text(encoding="utf-8"))["points"]
        point = next(p for p in points if len(points) == 1 or Path(p["file"]).stem == png.stem)
        names = ("grad_norm", "lambda_min_lower", "lambda_min_upper", "hessian_lipschitz")
        norm, low, high, rho = (f"{point[n]:.3g}" for n in names)
        limits = {n: "" if point[n] is None else f", {n} {point[n]:.3g}" for n in ("epsilon", "threshold")}
        measured = "estimated" if point["hessian_lipschitz_estimated"] else "given"
        return printable(
            f"{point['headline']}; gradient norm {norm}{limits['epsilon']}; smallest eigenvalue in [{low}, {high}]"
            f"{limits['threshold']}, rho {rho} ({measured})"
        )
    return ""


def _described(i: int, setting: Setting) -> dict[str, Any]:
    """Return the data of a setting for the page's template: label, style, configuration, environments and commands."""
    commands = [printable(str(c)) for run in setting.runs if (c := run.environment.get("command"))]
    own = ("command", "started")  # keys shown for each seed; the remaining keys are mostly identical for all seeds
    environments = [{k: v for k, v in run.environment.items() if k not in own} for run in setting.runs]
    return {
        "label": setting.label,
        "colour": i % len(COLOURS),
        "dashes": _DASHES[line_style(i)["linestyle"]],
        "config": json.dumps({k: v for k, v in setting.config.items() if k != "seed"}, indent=2),
        "seeds": setting.seeds,
        "environments": list(dict.fromkeys(json.dumps(e, indent=2) for e in environments)),
        "commands": list(dict.fromkeys(commands)),
        "folders": [printable(str(run.path.absolute())) for run in setting.runs],
    }
