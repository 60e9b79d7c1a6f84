"""The artificial noise xi_t of Algorithm 1, line 9, and schedules for its standard deviation r.

r is the standard deviation of each coordinate (as in the paper's Figure 2), so ||xi_t|| is about r sqrt(d).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.seeds import Stream, generator


@dataclass(frozen=True)
class Ramp:
    """r is `std` until step `start`, then falls linearly to `final` at step `stop` and stays there.

    The paper lowers its noise late in Figure 2 so that the gradient converges.
    """

    std: float
    start: int
    stop: int
    final: float = 0.0

    def __post_init__(self) -> None:
        for name in ("std", "final"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} of Ramp must be finite and not negative, got {value}")
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"Ramp needs 0 <= start <= stop, got start={self.start}, stop={self.stop}")

    def __call__(self, step: int) -> float:
        if step < self.start:
            return self.std
        if step >= self.stop:
            return self.final
        return self.std + (self.final - self.std) * (step - self.start) / (self.stop - self.start)


class Perturbation:
    """Shared Gaussian noise: xi_t is the same on every worker, a pure function of (seed, t).

    `noise` is r, or a function of the step that gives r. Raises ValueError if r is negative or not finite.
    """

    def __init__(self, noise: float | Callable[[int], float]) -> None:
        self._noise = noise
        self.std(0)

    def std(self, step: int) -> float:
        """Return r at a step."""
        r = float(self._noise(step)) if callable(self._noise) else float(self._noise)
        if not (math.isfinite(r) and r >= 0):
            raise ValueError(f"noise must be finite and not negative, got {r} at step {step}")
        return r

    def draw(self, like: Tensor, *, seed: int, step: int) -> Tensor | None:
        """Return xi_t shaped as `like`, float[d], or None when r is 0. Workers must use one type of device."""
        r = self.std(step)
        if r == 0:
            return None
        rng = generator(seed, step, Stream.NOISE, device=like.device)
        return torch.empty_like(like).normal_(0.0, r, generator=rng)
