"""The report as one JSON document: the numbers of the tables, for programs."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from packsaddle.runs.report.settings import settings
from packsaddle.runs.report.tables import row, setting_row
from packsaddle.runs.run_folder import Run
from packsaddle.version import __version__

FORMAT = 1  # increased if a key changes its meaning or is removed; keys may be added without


def document(runs: Sequence[Run]) -> dict[str, Any]:
    """Return settings, runs and certificates as plain types that strict JSON can represent (see docs/metrics.md).

    None: unknown or not applicable. A non-finite number is the text "nan", "inf" or "-inf".
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
    """Replace non-finite numbers by their names, in nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
