"""Time: a model of the step, the plan for a link, measured coding speed, and benchmarks.

Read `step_time` first (what a step costs, term by term), then `link_planner` (what pays at which rate). `bench` has
one module for each subject of a benchmark.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packsaddle.performance.coding_speed import Line, Pace, measure
    from packsaddle.performance.link_planner import Forecast, Verdict, forecast, probe
    from packsaddle.performance.step_time import Dense, Fleet, Link, Step, StepTime, compressed, expected_maximum
    from packsaddle.performance.timing import clocked, copy_bandwidth, side_by_side
    from packsaddle.performance.workload import MODELS, ModelSize, compute_seconds, update_seconds

__all__ = [
    "MODELS",
    "Dense",
    "Fleet",
    "Forecast",
    "Line",
    "Link",
    "ModelSize",
    "Pace",
    "Step",
    "StepTime",
    "Verdict",
    "clocked",
    "compressed",
    "compute_seconds",
    "copy_bandwidth",
    "expected_maximum",
    "forecast",
    "measure",
    "probe",
    "side_by_side",
    "update_seconds",
]
_FILES = {
    "coding_speed": "Line Pace measure",
    "link_planner": "Forecast Verdict forecast probe",
    "step_time": "Dense Fleet Link Step StepTime compressed expected_maximum",
    "timing": "clocked copy_bandwidth side_by_side",
    "workload": "MODELS ModelSize compute_seconds update_seconds",
}
_HOMES = {name: file for file, names in _FILES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name's file when the name is first asked for: the command line needs few of them at its start."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
