"""Clipping: a worker's update v is scaled so that its norm is at most c times the median norm of all workers' updates.

The residual v - C(s v), where s is the scale factor, stays in the error memory, so no update is lost.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_log = logging.getLogger("packsaddle")


@dataclass(frozen=True)
class Clip:
    """Record of one worker's update that was scaled down in an applied round, since it was too long (see `Workers`)."""

    step: int  # index t of the round, counted per fragment
    worker: str  # rank of the worker; with a manager its name in the log
    factor: float  # scale factor of the update, in [0, 1)


class Clips:
    """Records of the clipped updates of a fragment: the list `found` since construction or loading, `count` in total.
    With `logs`, a worker's 1st, 2nd, 4th, ... consecutive clipped update is logged."""

    def __init__(self, *, logs: bool) -> None:
        self.found: list[Clip] = []
        self.count, self._logs = 0, logs
        self._in_a_row: dict[str, int] = {}

    def record(self, step: int, factors: Tensor, workers: Sequence[str]) -> None:
        """Record an applied round from all workers' scale factors, float64[W], and names (empty: their ranks)."""
        names = workers or [str(rank) for rank in range(len(factors))]
        found = [Clip(step, name, s) for name, s in zip(names, factors.tolist(), strict=True) if s < 1]
        self.found += found
        self.count += len(found)
        self._in_a_row = {clip.worker: self._in_a_row.get(clip.worker, 0) + 1 for clip in found}
        for clip in found:
            n = self._in_a_row[clip.worker]
            if self._logs and n & (n - 1) == 0:
                row = f" ({n} in a row)" if n > 1 else ""
                _log.warning(
                    "round %d: the update of worker %s was too long, and is scaled by %.3g; the rest stays in its "
                    "error memory%s",
                    *(step, clip.worker, clip.factor, row),
                )


def norm_of(v: Tensor, share: float) -> Tensor:
    """Return the norm of an update v, float32[1]; NaN if its worker is not in the round (`share` 0)."""
    norm: Tensor = torch.linalg.vector_norm(v, dtype=torch.float64).float().reshape(1)
    return norm if share else norm.fill_(math.nan)


def factors_of(norms: Tensor, most: float) -> Tensor:
    """Return the scale factors of all workers' updates, min(1, most m / norm), float64[W], from `norms`, float32[W]. m
    is the median without NaNs and negative norms, whose updates are limited but not counted; of an even number the
    lower middle one, which half of the workers cannot raise."""
    wide = norms.double()
    limit = most * wide.masked_fill(wide.signbit(), math.nan).nanmedian()
    wide = wide.abs()
    factors: Tensor = torch.where(wide > limit, limit / wide, 1.0)
    return factors
