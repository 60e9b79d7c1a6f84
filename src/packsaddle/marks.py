"""What charts of settings mark beside their curves: certificates where they lie, the levels of plateaus, and where
losses stood still."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packsaddle.aggregate import Setting, position
from packsaddle.curves import AXES
from packsaddle.runfolder import Run
from packsaddle.standstill import Standstill, standstill


@dataclass(frozen=True)
class Point:
    """A certificate of a run, and where it lies along every axis."""

    run: Run
    x: dict[str, float]
    certificate: dict[str, Any]

    @property
    def looked(self) -> bool:
        """Whether curvature was looked into: not so where the gradient was too large."""
        return bool(self.certificate["verdict"] != "gradient too large")


def points(setting: Setting) -> list[Point]:
    """Return the certificates along a setting's runs that bound the smallest eigenvalue."""
    return [
        Point(run, _place(run, c), c)
        for run in setting.runs
        for c in run.certificates
        if run.metrics and c.get("lambda_min_lower") is not None and c.get("lambda_min_upper") is not None
    ]


def _place(run: Run, certificate: dict[str, Any]) -> dict[str, float]:
    """Where a certificate lies. Bytes and seconds are the last line's before it or else the first's: a logarithmic
    axis has no zero."""
    line = next((m for m in reversed(run.metrics) if m["step"] <= certificate["step"]), run.metrics[0])
    exact = {axis: float(certificate[axis]) for axis in ("step", "epoch")}
    return {axis: exact[axis] if axis in exact else position(line, axis) for axis in AXES}


@dataclass(frozen=True)
class Still:
    """The part of a run in which its loss stood still: from its first line to its last along every axis."""

    run: Run
    x: dict[str, tuple[float, float]]
    found: Standstill


def stills(setting: Setting) -> list[Still]:
    """Return where the losses of a setting's runs stood still up to their ends."""
    marked = []
    for run in setting.runs:
        if (found := standstill(run.metrics)) is not None:
            first, last = run.metrics[-found.lines], run.metrics[-1]
            marked.append(Still(run, {axis: (position(first, axis), position(last, axis)) for axis in AXES}, found))
    return marked


def plateaus(settings: Sequence[Setting]) -> list[float]:
    """Return the levels of the plateaus that configurations name."""
    found = {s.config["plateau"] for s in settings if s.config.get("plateau") is not None}
    return sorted(level for level in found if math.isfinite(level))


def smallest_threshold(settings: Sequence[Setting]) -> float:
    """Where the logarithmic part of the curvature's axis begins: at a tenth of the smallest threshold."""
    found = [-p.certificate["threshold"] for s in settings for p in points(s) if p.certificate.get("threshold")]
    return float(min((t for t in found if 0 < t < math.inf), default=1.0)) / 10
