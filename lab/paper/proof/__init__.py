"""The proof's ideas as measurements: run `CompressedSGD` on a problem of known geometry and compare with the lemmas.

All measurements run the library's optimizer in double precision, and compress every coordinate. Unless stated
otherwise, there are no resets: a run is one segment of Algorithm 1, for which the lemmas are stated (t' = 0).
"""

from lab.paper.proof.error_growth import (
    ErrorGrowth,
    accumulate,
    error_growth,
    random_k_limit,
    residual_gap,
)
from lab.paper.proof.escape import (
    Coupling,
    EscapeTimes,
    couple,
    coupling_std,
    escape_times,
    negative_curvature,
    octopus_escapes,
    reflect,
)
from lab.paper.proof.saddle_dynamics import growth_rate, predicted_escape_time
from lab.paper.proof.trajectory import Localisation, Method, Trajectory, follow, improve_or_localise

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
