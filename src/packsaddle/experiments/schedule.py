"""The learning rate over a training: a linear warm-up, then half a cosine down to a tenth."""

import math

_LAST_SHARE = 0.1  # of the peak rate


def share_of_peak(step: float, warm_up: float, end: float) -> float:
    """Return the share of the peak rate at a step, from 0, of a training of `end` steps with `warm_up` steps of it."""
    if step + 1 < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1.0, end - warm_up)) if step > warm_up else 0.0
    return _LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2
