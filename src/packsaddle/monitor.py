"""How much compression really keeps: the contraction mu of single steps, whole and by tensor."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from packsaddle.flat import FlatParameters


class ContractionMonitor:
    """Measures mu_t = 1 - ||v - C(v)||^2 / ||v||^2 of this worker's v = eta (e + grad F_i + xi) every `every` steps.

    Noise that is drawn only where it reaches x (see `noise.OutstandingNoise`) is not in v.

    Two norms of a vector at each measured step, and nothing at the others; 0 switches it off.
    """

    def __init__(self, flat: FlatParameters, every: int) -> None:
        if every < 0:
            raise ValueError(f"monitor_every must be 0 or more steps, got {every}")
        self.every = every
        self.whole: float | None = None  # the last measured mu_t
        self.by_tensor: Mapping[str, float] = {}  # the same for each tensor; a tensor of zeros counts as 1
        self._flat = flat
        self._measured = 0  # the step count at the last measurement: not every step may exchange

    @contextmanager
    def watching(self, step: int, pending: Tensor) -> Iterator[None]:
        """Measure what the exchange inside leaves of `pending`, float[d], if the step is due."""
        if not self.every or (step + 1) // self.every == self._measured // self.every:
            yield
            return
        self._measured = step + 1
        before = self._energies(pending)
        yield
        after = self._energies(pending)
        self.whole = _contraction(sum(before), sum(after))
        self.by_tensor = {name: _contraction(b, a) for name, b, a in zip(self._flat.names, before, after, strict=True)}

    def _energies(self, pending: Tensor) -> list[float]:
        views = [view.reshape(-1) for view in self._flat.views(pending)]
        norms = torch.stack(torch._foreach_norm(views)) if views else torch.zeros(0)
        energies: list[float] = norms.double().square().tolist()
        return energies


def _contraction(before: float, after: float) -> float:
    return 1.0 - after / before if before != 0 else 1.0  # a NaN stays one
