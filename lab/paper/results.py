"""The results of a study's runs as plain numbers: summary.json and curves.csv, small enough to be committed."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from lab import charts
from lab.paper.study import Study
from lab.runs import RunFolder
from lab.runs.report import Estimate, Setting, curve, estimate, plateau, write_curves
from packsaddle.cli import plain_text, print_table

Json = Mapping[str, Any]
_CERTIFIED = ("epoch", "verdict", "epsilon", "loss", "grad_norm", "lambda_min_lower", "lambda_min_upper", "threshold")


def summarise(study: Study, found: Sequence[Setting]) -> Json:
    """Return a study's summary as plain types: its name, scale, commands and machines, and each setting's results.

    Every estimate also has the values of the single seeds.
    """
    environments = [run.environment for setting in found for run in setting.runs]
    return {
        "study": study.name,
        "scale": study.scale,
        **{key: _distinct(environments, key) for key in ("commit", "command", "torch", "python", "device", "cpus")},
        "settings": [_setting(setting) for setting in found],
    }


def _distinct(environments: Sequence[Json], key: str) -> Any:
    """Return the value of `key` that all environments have in common, or the list of distinct values."""
    values = list(dict.fromkeys(environment.get(key) for environment in environments))
    return values[0] if len(values) == 1 else values


def _setting(setting: Setting) -> Json:
    summaries = [run.summary or {} for run in setting.runs]
    lasts = [run.metrics[-1] for run in setting.runs]
    spent = [plateau(run.metrics, run.config.get("plateau")) for run in setting.runs]
    quantities = ("final_loss", "test_loss", "test_accuracy", "compression", "seconds")
    return {
        "setting": setting.label,
        "seeds": setting.seeds,
        **{key: summaries[0].get(key) for key in ("workers", "steps", "parameters", "compressed_parameters", "mu")},
        **{key: _estimate([s[key] for s in summaries if key in s]) for key in quantities},
        "grad_norm": _estimate([line["grad_norm"] for line in lasts]),
        "megabytes": _estimate([(line["sent"] or line["payload"]) / 1e6 for line in lasts]),
        "plateau_epochs": _estimate([epochs for epochs, _ in spent if epochs is not None]),
        "still_on_plateau": sum(left is False for _, left in spent),
        "bytes_by_purpose": {k: b["payload"] for k, b in summaries[0].get("bytes_by_purpose", {}).items()},
        "certificates": [
            {"seed": seed, **{key: c.get(key) for key in _CERTIFIED}}
            for seed, run in zip(setting.seeds, setting.runs, strict=True)
            for c in run.certificates
        ],
    }


def _estimate(values: Sequence[float]) -> Json | None:
    return asdict(estimate(values)) if values else None


def by_setting(summary: Json) -> dict[str, Json]:
    """Return a summary's settings, as a dictionary by label."""
    return {entry["setting"]: entry for entry in summary["settings"]}


def paired(one: Json, other: Json, quantity: str, combine: Callable[[float, float], float]) -> Estimate:
    """Combine a quantity of two settings for each seed that both have, and return the mean with its interval.

    Raises ValueError if the settings have no seed in common.
    """
    pairs = [dict(zip(entry["seeds"], entry[quantity]["values"], strict=True)) for entry in (one, other)]
    seeds = [seed for seed in one["seeds"] if seed in other["seeds"]]
    return estimate([combine(pairs[0][seed], pairs[1][seed]) for seed in seeds])


def interval(found: Estimate, spec: str) -> str:
    """Format a mean with its confidence interval, such as "0.12 [0.10, 0.14]"."""
    if found.low is None or found.high is None:
        return format(found.mean, spec)
    return f"{found.mean:{spec}} [{found.low:{spec}}, {found.high:{spec}}]"


def write_results(summary: Json, found: Sequence[Setting], folder: Path) -> None:
    """Write summary.json (atomically) and curves.csv into a folder; existing files are replaced."""
    RunFolder(folder).write_json("summary.json", summary)
    write_curves([curve(setting) for setting in found], folder / "curves.csv")


def save_figure(figure: Any, folder: Path) -> None:
    """Write figure-light.svg and figure-dark.svg, whose metadata contain the hash of the curves in the figure."""
    charts.save(figure, folder / "figure", source=digest(folder / "curves.csv"))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def print_settings(summary: Mapping[str, Any]) -> None:
    """Print a table of a study's settings: means over seeds with 95% intervals."""
    quantities = {
        "final_loss": ("final loss", ".4f"),
        "test_accuracy": ("test accuracy", ".3f"),
        "plateau_epochs": ("epochs on plateau", ".1f"),
        "megabytes": ("MB", ",.1f"),
        "compression": ("compression", ",.1f"),
        "seconds": ("seconds", ",.0f"),
    }
    shown = {key: h for key, h in quantities.items() if any(entry[key] for entry in summary["settings"])}
    table = Table("setting", "seeds", *(heading for heading, _ in shown.values()))
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in summary["settings"]:
        values = [_with_spread(entry[key], spec) for key, (_, spec) in shown.items()]
        table.add_row(plain_text(entry["setting"]), str(len(entry["seeds"])), *values)
    table.caption = "mean over seeds ± half of its 95% confidence interval"
    print_table(table)


def _with_spread(found: Mapping[str, Any] | None, spec: str) -> str:
    if found is None:
        return "-"
    spread = None if found["high"] is None else found["high"] - found["mean"]
    return format(found["mean"], spec) + (f" ± {spread:{spec}}" if spread else "")
