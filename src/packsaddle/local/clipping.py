"""Clipping: a worker's update v is scaled so that its norm is at most c times the median norm of all workers' updates.

`Workers.clip` sets c. With the scale factor s and the compressor C, the worker sends C(s v). The residual v - C(s v)
stays in the worker's error memory, so no update is lost.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.numerics.devices import wide, widened

_log = logging.getLogger("packsaddle")


@dataclass(frozen=True)
class Clip:
    """Record of one worker's update that was scaled down in an applied round, since its norm exceeded
    `Workers.clip`."""

    step: int  # index t of the round, counted per fragment (parameters exchanged together)
    worker: str  # rank of the worker; with elastic workers, the worker's name in hexadecimal
    factor: float  # scale factor of the update, in [0, 1)


class Clips:
    """Records of the workers' updates that were scaled down because their norms exceeded a limit (see `Workers.clip`),
    for one fragment, i.e. for parameters that are exchanged together.

    `found` lists the records since construction, or since a saved state was loaded. `count` is the number of records
    over the whole training. If `logs` is True, a worker whose updates are clipped in consecutive rounds is logged at
    the 1st, 2nd, 4th, ... of these rounds.
    """

    def __init__(self, *, logs: bool) -> None:
        self.found: list[Clip] = []
        self.count, self._logs = 0, logs
        self._in_a_row: dict[str, int] = {}

    def record(self, step: int, factors: Tensor, workers: Sequence[str]) -> None:
        """Record the clipped updates of the applied round with the index `step`. `factors`, float64[W], are the scale
        factors of all workers' updates, and `workers` are the names of the workers. If `workers` is empty, ranks are
        used as names."""
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


def norm_of(v: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the norm of a worker's update, float32[1]. `v`, float[n], is this process's part of the update, and
    `total` sums a tensor over the processes of the worker."""
    norm: Tensor = torch.linalg.vector_norm(v, dtype=wide(v.device)).reshape(1)
    return total(norm.square_()).sqrt_().float()


def factors_of(norms: Tensor, most: float) -> Tensor:
    """Return the factor by which each worker's update is scaled, float64[W]. It is min(1, most m / norm).

    `norms`, float32[W], has the norm of each worker's update, by rank, and NaN for a worker without an update, whose
    factor is 1. `most` is the limit on a norm as a multiple of m, the median of the norms. For an even number of norms,
    m is the lower of the two middle norms, so that half of the workers cannot raise it.
    """
    norms = widened(norms)
    limit = most * norms.nanmedian()
    factors: Tensor = torch.where(norms > limit, limit / norms, 1.0)
    return factors
