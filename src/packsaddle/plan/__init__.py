"""Plans for a network link: the time of a training step is predicted for each compressor, to find the fastest one.

Start with `step_time` (the terms of a step's time), then `link` (compressed gradients at every step) and `local` (local
updates). `coding` measures the speed of compressors, `model` the time of a training step.
"""

from packsaddle.plan.coding import Line, Pace, measure
from packsaddle.plan.link import MEASURED, Forecast, Verdict, forecast
from packsaddle.plan.local import LocalForecast, Setting, forecast_local, measured_with
from packsaddle.plan.model import ModelSize, TrainingStep, update_seconds
from packsaddle.plan.step_time import LATENCY, Dense, Fleet, Link, Step, StepTime, compressed
from packsaddle.plan.timing import Timing, clocked, repeated, side_by_side

__all__ = [
    "LATENCY",
    "MEASURED",
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
    "TrainingStep",
    "Verdict",
    "clocked",
    "compressed",
    "forecast",
    "forecast_local",
    "measure",
    "measured_with",
    "repeated",
    "side_by_side",
    "update_seconds",
]
