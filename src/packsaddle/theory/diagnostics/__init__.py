"""The proof's ideas as measurements: run `CompressedSGD` on a problem of known geometry and compare with the lemmas.

Everything runs the library's optimizer in double precision, with every coordinate compressed and without resets
unless said otherwise: one segment of Algorithm 1, which is what the lemmas speak of (t' = 0).
"""

from packsaddle.theory.diagnostics.error_growth import (
    ErrorGrowth,
    accumulate,
    error_growth,
    random_k_limit,
    residual_gap,
)
from packsaddle.theory.diagnostics.escape import (
    Coupling,
    EscapeTimes,
    couple,
    escape_times,
    negative_curvature,
    octopus_escapes,
    reflect,
)
from packsaddle.theory.diagnostics.trajectory import Localisation, Method, Trajectory, follow, improve_or_localise
from packsaddle.theory.saddle_dynamics import coupling_std, growth_rate, predicted_escape_time

__all__ = [
    "Coupling",
    "ErrorGrowth",
    "EscapeTimes",
    "Localisation",
    "Method",
    "Trajectory",
    "accumulate",
    "couple",
    "coupling_std",
    "error_growth",
    "escape_times",
    "follow",
    "growth_rate",
    "improve_or_localise",
    "negative_curvature",
    "octopus_escapes",
    "predicted_escape_time",
    "random_k_limit",
    "reflect",
    "residual_gap",
]
