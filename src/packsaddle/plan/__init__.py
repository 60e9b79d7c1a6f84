"""Plans for a link: a model of the time of a step, what pays at which rate, and the measurements that it needs.

Read `step_time` first (what a step costs, term by term), then `link` (compressed gradients at every step) and `local`
(local updates). `coding` times compressors, `model_size` a model's computing.
"""

from packsaddle.plan.coding import Line, Pace, measure
from packsaddle.plan.link import MEASURED, Forecast, Verdict, forecast, probe
from packsaddle.plan.local import LocalForecast, Setting, forecast_local, measured_with
from packsaddle.plan.model_size import MODELS, ModelSize, compute_seconds, update_seconds
from packsaddle.plan.step_time import LATENCY, Dense, Fleet, Link, Step, StepTime, compressed, expected_maximum
from packsaddle.plan.timing import Timing, clocked, copy_bandwidth, side_by_side

__all__ = [
    "LATENCY",
    "MEASURED",
    "MODELS",
    "Dense",
    "Fleet",
    "Forecast",
    "Line",
    "Link",
    "LocalForecast",
    "ModelSize",
    "Pace",
    "Setting",
    "Step",
    "StepTime",
    "Timing",
    "Verdict",
    "clocked",
    "compressed",
    "compute_seconds",
    "copy_bandwidth",
    "expected_maximum",
    "forecast",
    "forecast_local",
    "measure",
    "measured_with",
    "probe",
    "side_by_side",
    "update_seconds",
]
