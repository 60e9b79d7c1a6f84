"""Measured contraction mu: the fraction of its energy that a vector keeps in one exchange."""

from collections.abc import Mapping

import torch
from torch import Tensor

from packsaddle.feedback.slices import Slice
from packsaddle.feedback.state import Path, Value, attribute


class Every:
    """Falls due every N steps, and stays due until done, since not every step exchanges; never if N is 0."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.last = 0  # the step count when it was done last

    def due(self, step: int) -> bool:
        """Return True if it is due in this step, from 0."""
        return self.steps > 0 and (step + 1) // self.steps > self.last // self.steps

    def done(self, step: int) -> None:
        """Mark it as done in this step."""
        self.last = step + 1


class Contraction:
    """Measures mu_t = 1 - ||v - C(v)||^2 / ||v||^2 of this worker's v every `every` steps; 0 never measures.

    A step has one slice or several, and mu_t is of all of them together. Nothing is read from a device before `close`.
    Noise that is drawn only where it reaches x (see `sgd.lazy_noise.OutstandingNoise`) is not in v.

    Args:
        every: steps between two measurements.
        of: the one slice of all steps, to measure each of its tensors as well.
    """

    def __init__(self, every: int, of: Slice | None = None) -> None:
        self._every, self._slice = Every(every), of
        self.whole: float | None = None  # the last mu_t
        self.by_tensor: Mapping[str, float] = {}  # the last mu_t of each tensor; 1 for a tensor of zeros
        self._energies: list[Tensor] = []  # of v and of its residual for each slice, float64[tensors or 1]

    def measure(self, step: int, vector: Tensor) -> None:
        """Measure v of a slice, float[n], and after the exchange its residual, if the step is due."""
        if self._every.due(step):
            self._energies.append(self._energy(vector))

    def _energy(self, vector: Tensor) -> Tensor:
        if self._slice is None:
            energies: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64).square().reshape(1)
        else:
            views = [view.reshape(-1) for view in self._slice.views(vector)]
            energies = torch.stack(torch._foreach_norm(views)).double().square()
        return energies

    def close(self, step: int, *, apply: bool) -> None:
        """End a step; a rejected one is not measured."""
        energies, self._energies = self._energies, []
        if not (apply and energies):
            return
        before, after = torch.stack(energies).view(-1, 2, len(energies[0])).sum(0).tolist()
        self.whole = contraction(sum(before), sum(after))
        if self._slice is not None:
            each = zip(self._slice.names, before, after, strict=True)
            self.by_tensor = {name: contraction(b, a) for name, b, a in each}
        self._every.done(step)

    def fields(self, path: Path = ("contraction",)) -> list[Value]:
        """Return the fields of the saved state, at a path: the last measurement and its step."""
        last = (
            attribute((*path, "whole"), self, "whole", float | None),
            attribute((*path, "steps"), self._every, "last", int),
        )
        tensors = attribute((*path, "by_tensor"), self, "by_tensor", dict[str, float])
        return [*last] if self._slice is None else [*last, tensors]


def contraction(before: float, after: float) -> float:
    """Return 1 - ||v - C(v)||^2 / ||v||^2, from the two squares; 1 for v = 0."""
    return 1.0 - after / before if before != 0 else 1.0  # a NaN stays one
