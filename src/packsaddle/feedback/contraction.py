"""Measured contraction: the share mu of its energy that a vector keeps in single steps, whole and by tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packsaddle.feedback.slices import FlatParameters


class Every:
    """Falls due every N steps, and stays due until it is done: not every step exchanges. Never, if N is 0."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._done = 0  # the step count when it was done last

    def due(self, step: int) -> bool:
        """Tell if a measurement is due in this step, from 0."""
        return self.steps > 0 and (step + 1) // self.steps > self._done // self.steps

    def done(self, step: int) -> None:
        """Mark it as done in this step."""
        self.finished(step + 1)

    def finished(self, steps: int) -> None:
        """Mark it as done at a number of steps."""
        self._done = steps

    @property
    def last(self) -> int:
        """The number of steps at the last measurement."""
        return self._done


class ContractionMonitor:
    """Measures mu_t = 1 - ||v - C(v)||^2 / ||v||^2 of this worker's v = eta (e + grad F_i + xi) every `every` steps.

    Noise that is drawn only where it reaches x (see `sgd.lazy_noise.OutstandingNoise`) is not in v.

    Two norms of a vector at each measured step, and nothing at the others; 0 switches it off.
    """

    def __init__(self, flat: FlatParameters, every: int) -> None:
        self._every = Every(every)
        self.whole: float | None = None  # the last measured mu_t
        self.by_tensor: Mapping[str, float] = {}  # the same for each tensor; a tensor of zeros counts as 1
        self._flat = flat
        self._before: list[float] | None = None

    def before(self, step: int, pending: Tensor) -> None:
        """Measure what is to be exchanged, float[d], if the step is due."""
        self._before = self._energies(pending) if self._every.due(step) else None

    def after(self, step: int, pending: Tensor) -> None:
        """Measure what the exchange has left of it, if the step is due."""
        before = self._before
        if before is None:
            return
        self._every.done(step)
        after = self._energies(pending)
        self.whole = contraction(sum(before), sum(after))
        self.by_tensor = {name: contraction(b, a) for name, b, a in zip(self._flat.names, before, after, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured last, and when."""
        return {"whole": self.whole, "by_tensor": dict(self.by_tensor), "steps": self._every.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, if it has anything."""
        self.whole, self.by_tensor = state.get("whole"), dict(state.get("by_tensor", {}))
        self._every.finished(state.get("steps", 0))

    def _energies(self, pending: Tensor) -> list[float]:
        views = [view.reshape(-1) for view in self._flat.views(pending)]
        norms = torch.stack(torch._foreach_norm(views)) if views else torch.zeros(0)
        energies: list[float] = norms.double().square().tolist()
        return energies


class SlicedMonitor:
    """Measures mu_t of a vector that is exchanged slice by slice: of the whole, once it is known that a step was taken.

    Nothing is read before `settle`, so that an exchange waits for no GPU.
    """

    def __init__(self, every: int) -> None:
        self._every = Every(every)
        self.whole: float | None = None  # the last measured mu_t
        self._energies: list[Tensor] = []  # ||v||^2 and ||v - C(v)||^2 of each slice

    def measure(self, step: int, vector: Tensor) -> None:
        """Measure a slice, float[n], before it is exchanged, or what that has left of it, if the step is due."""
        if self._every.due(step):
            self._energies.append(torch.linalg.vector_norm(vector, dtype=torch.float64).square())

    def settle(self, step: int, *, taken: bool) -> None:
        """End a step; one that was not taken has measured nothing."""
        energies, self._energies = self._energies, []
        if taken and energies:
            self.whole = contraction(*torch.stack(energies).view(-1, 2).sum(0).tolist())
            self._every.done(step)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured last, and when."""
        return {"whole": self.whole, "steps": self._every.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.whole = state["whole"]
        self._every.finished(state["steps"])


def contraction(before: float, after: float) -> float:
    """Return 1 - ||v - C(v)||^2 / ||v||^2, from the two squares; 1 for v = 0."""
    return 1.0 - after / before if before != 0 else 1.0  # a NaN stays one
