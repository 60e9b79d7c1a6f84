"""A self-contained HTML page of settings: interactive charts and tables. It makes no network requests."""

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from packsaddle.errors import require
from packsaddle.messages import printable
from packsaddle.runs.report import tables
from packsaddle.runs.report.curves import (
    AXES,
    QUANTITIES,
    Curve,
    Point,
    Still,
    plateaus,
    points,
    smallest_threshold,
    stills,
)
from packsaddle.runs.report.figures import COLOURS, QUANTITY_NAMES, line_style
from packsaddle.runs.report.settings import Setting
from packsaddle.runs.run_folder import Run

# x axis of every chart: title and scale. Megabytes are logarithmic, since compression changes them by orders.
_AXES = {
    "epoch": {"title": "epochs", "log": False},
    "megabytes": {"title": "megabytes per worker", "log": True},
    "rounds": {"title": "rounds", "log": True},
    "seconds": {"title": "seconds", "log": False},
    "step": {"title": "steps", "log": False},
}
_DASHES = {"-": ("solid", ""), "--": ("dash", "6 4"), ":": ("dot", "2 3")}  # matplotlib: (plotly, SVG)


def render(settings: Sequence[Setting], curves: Sequence[Curve]) -> str:
    """Return the HTML page of settings and their curves. Raises MissingExtraError without the plot extra."""
    jinja2 = require("jinja2", "plot", "writing the report")
    plotly = require("plotly.offline", "plot", "writing the report").get_plotlyjs()
    templates = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    runs = [run for setting in settings for run in setting.runs]
    data, script = charts_of(settings, curves), _read("page.js")

    # Scripts are inline; the page's content security policy allows them by their hashes.
    page: str = templates.from_string(_read("page.html.j2")).render(
        axes=data["axes"],
        charts=data["charts"],
        colours=COLOURS,
        settings=[_described(i, setting) for i, setting in enumerate(settings)],
        setting_table=tables.setting_table(settings),
        run_table=tables.run_table(runs),
        certificates=tables.certificate_table(runs),
        pictures=[picture for run in runs for picture in _pictures(run)],
        tolerance=tables.PLATEAU_TOLERANCE,
        data=for_script(data),
        plotly=plotly,
        script=script,
        hashes=[_hash(plotly), _hash(script)],
    )
    return page


def _pictures(run: Run) -> list[dict[str, str]]:
    """Return name and base64 data of the PNG files that `packsaddle certify` wrote to a run's folder."""
    found = sorted(png for png in run.path.glob("certificate*/*.png") if (png.parent / "certificates.json").is_file())
    return [
        {
            "name": f"{run.label}: {printable(png.parent.name)}/{printable(png.name)}",
            "data": base64.b64encode(png.read_bytes()).decode(),
        }
        for png in found
    ]


def charts_of(settings: Sequence[Setting], curves: Sequence[Curve]) -> dict[str, Any]:
    """Return the data of the page's script: axes, settings and charts, as plain numbers."""
    charts: list[dict[str, Any]] = []
    for quantity in QUANTITIES:
        lines = [line for i, c in enumerate(curves) if (line := _line(i, c, quantity))["step"]]
        if lines:
            levels = plateaus(settings) if quantity == "loss" else []
            still = [_bar(i, s) for i, setting in enumerate(settings) for s in stills(setting) if quantity == "loss"]
            title, log = QUANTITY_NAMES[quantity].capitalize(), quantity == "grad_norm"
            kind = {"id": quantity, "title": title, "log": log, "percent": quantity == "test_accuracy"}
            charts.append({**kind, "levels": levels, "lines": lines, "still": still})

    # Certificates are drawn as points, since few steps have one.
    certified = [_mark(i, point) for i, setting in enumerate(settings) for point in points(setting)]
    if certified:
        title = "Bounds on the smallest eigenvalue of the Hessian"
        charts.append({"id": "curvature", "title": title, "scale": smallest_threshold(settings), "points": certified})
    named = [
        {
            "label": setting.label,
            "name": for_plotly(setting.label),
            "colour": i % len(COLOURS),
            "dash": _DASHES[line_style(i)["linestyle"]][0],
        }
        for i, setting in enumerate(settings)
    ]
    # Without local updates rounds equal steps: no axis of their own.
    has_rounds = any(setting.config.get("local") for setting in settings)
    axes = {name: axis for name, axis in _AXES.items() if name != "rounds" or has_rounds}
    return {"axes": axes, "settings": named, "charts": charts}


def _line(i: int, c: Curve, quantity: str) -> dict[str, Any]:
    """Return a setting's line for a quantity: the points with a mean, and a band if there are several seeds."""
    columns = {name: c.columns[f"{quantity}_{name}"] for name in ("mean", "low", "high")}
    columns |= {name: c.columns[name] for name in (*AXES, "seeds")}
    kept = [k for k, mean in enumerate(columns["mean"]) if math.isfinite(mean)]
    if max(columns["seeds"], default=0) <= 1:
        del columns["low"], columns["high"]
    return {"setting": i, **{name: [_short(values[k]) for k in kept] for name, values in columns.items()}}


def _mark(i: int, point: Point) -> dict[str, Any]:
    c = point.certificate
    numbers = {
        **point.x,
        "lower": c["lambda_min_lower"] if point.looked else None,
        "upper": c["lambda_min_upper"] if point.looked else None,
        "threshold": c.get("threshold"),
    }
    identity = {"setting": i, "seed": point.run.config.get("seed", 0), "verdict": c["verdict"]}
    return {**identity, **{name: _short(value) for name, value in numbers.items()}}


def _bar(i: int, still: Still) -> dict[str, Any]:
    """Return a standstill of a run's loss: both ends along every axis, its first step and level."""
    ends = {axis: [_short(x) for x in pair] for axis, pair in still.x.items()}
    identity = {"setting": i, "seed": still.run.config.get("seed", 0), "since": still.found.since}
    return {**identity, **ends, "level": _short(still.found.level)}


def _short(value: float | None) -> float | None:
    """Round to six digits, enough for charts; None for non-finite values, which JSON cannot represent."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def for_plotly(text: str) -> str:
    """Escape a text for plotly, which interprets a subset of HTML, with links, and formulas in labels."""
    return html.escape(text).replace("$", "&#36;")


def for_script(data: Any) -> str:
    """Serialize to JSON that is safe inside a <script> element, whatever strings it contains."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _described(i: int, setting: Setting) -> dict[str, Any]:
    """Return the data of a setting for the page's template: label, style, configuration, environments, commands."""
    commands = [printable(str(c)) for run in setting.runs if (c := run.environment.get("command"))]
    environments = [{k: v for k, v in run.environment.items() if k != "command"} for run in setting.runs]
    return {
        "label": setting.label,
        "colour": i % len(COLOURS),
        "dashes": _DASHES[line_style(i)["linestyle"]][1],
        "config": json.dumps({k: v for k, v in setting.config.items() if k != "seed"}, indent=2),
        "seeds": setting.seeds,
        "environments": list(dict.fromkeys(json.dumps(e, indent=2) for e in environments)),
        "commands": list(dict.fromkeys(commands)),
        "folders": [printable(str(run.path.absolute())) for run in setting.runs],
    }


def _read(name: str) -> str:
    return files("packsaddle.runs.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """Return the hash of a script for the page's content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
