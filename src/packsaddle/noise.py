"""The artificial noise xi_t of Algorithm 1, line 9, and schedules for its standard deviation r.

r is the standard deviation of each coordinate (as in the paper's Figure 2), so ||xi_t|| is about r sqrt(d).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packsaddle.compress.cells import Cells
from packsaddle.counter import Keys, add_cell_gaussians, add_gaussians, keys
from packsaddle.seeds import Stream

_NEGLIGIBLE = 1e-9  # of a sum in double precision


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

    def squares(self, steps: int) -> float:
        """Return the sum of r^2 over steps 0 ... steps - 1."""
        before, width = min(self.start, steps), self.stop - self.start
        n = min(self.stop, steps) - before  # steps on which it falls; of k = 0 ... n - 1
        fall = (self.final - self.std) / max(1, width)
        falling = n * self.std**2 + self.std * fall * n * (n - 1) + fall**2 * (n - 1) * n * (2 * n - 1) / 6
        return before * self.std**2 + falling + (steps - before - n) * self.final**2


class Rescheduled:
    """A schedule that may be replaced by another on the way: where the steps of an epoch change, say."""

    def __init__(self, ramp: Ramp) -> None:
        self.ramp = ramp

    def __call__(self, step: int) -> float:
        return self.ramp(step)

    def __repr__(self) -> str:
        return repr(self.ramp)


@dataclass(frozen=True)
class Noise:
    """xi_t, float[d], the same on every worker; a stretch of it can be added to a vector without making the rest."""

    std: float
    key: Keys

    def add_to(self, out: Tensor, alpha: float = 1.0, start: int = 0) -> None:
        """Add alpha times the coordinates `start`, start + 1, ... of xi_t to out, float[n], in place."""
        add_gaussians(out, alpha * self.std, self.key, start)


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

    def at(self, *, seed: int, step: int) -> Noise | None:
        """Return xi_t, or None when r is 0."""
        r = self.std(step)
        return Noise(r, keys(seed, step, Stream.NOISE)) if r else None

    def draw(self, like: Tensor, *, seed: int, step: int) -> Tensor | None:
        """Return xi_t as a vector like `like`, float[d], or None when r is 0."""
        noise = self.at(seed=seed, step=step)
        if noise is None:
            return None
        xi = torch.zeros_like(like)
        noise.add_to(xi)
        return xi


class OutstandingNoise:
    """The noise that has not reached x yet, known by its variance alone: one number for each cell of a grid.

    Where all workers keep the same cells of their vectors, the noise in the error memories is the same on all of them,
    and all that x sees of it is what a kept cell has gathered since it was kept last, sum_s eta_s xi_s over those
    steps s: Gaussian with variance sum_s (eta_s r_s)^2, independent of all that x has seen before. So it is drawn when
    the cell is kept, a Gaussian for each coordinate sent instead of each coordinate there is, and x has the law that
    Algorithm 1 gives it.
    """

    def __init__(self, cells: int, size: int, device: torch.device) -> None:
        self._size = size
        self._total = 0.0  # the variance that a coordinate would have if it had never been kept
        self._kept = torch.zeros(cells, dtype=torch.float64, device=device)  # what the total was when a cell was kept

    def grow(self, std: float) -> None:
        """Add independent noise of this standard deviation to every coordinate."""
        variance = std * std
        if 0 < variance < _NEGLIGIBLE * self._total:  # what all cells have received already would swallow it
            least = float(self._kept.min())
            self._kept -= least
            self._total -= least
        self._total += variance

    def take(self, cells: Cells, out: Tensor, alpha: float = 1.0, *, seed: int, step: int) -> None:
        """Draw the noise at these cells and add alpha times it to out, float[m b]; none is outstanding there then."""
        self._add(self._total - self._kept[cells.index], out, alpha, keys(seed, step, Stream.OUTSTANDING))
        self._kept[cells.index] = self._total

    def draw(self, like: Tensor, *, seed: int, step: int) -> Tensor:
        """Draw the noise at every coordinate, float[d] as `like`, and leave it outstanding."""
        noise = like.new_zeros(len(self._kept) * self._size)
        # Not the numbers that `take` draws at this step: what it takes may follow what was committed of these.
        self._add(self._total - self._kept, noise, 1.0, keys(seed, step, Stream.SETTLED))
        return noise[: len(like)]

    def _add(self, variance: Tensor, out: Tensor, alpha: float, key: Keys) -> None:
        add_cell_gaussians(out, variance.clamp_min_(0).sqrt_().mul_(alpha).to(out.dtype), key)

    @property
    def std(self) -> float:
        """At least the standard deviation that is outstanding at any coordinate."""
        return math.sqrt(self._total)

    def clone(self) -> "OutstandingNoise":
        """Return a copy."""
        return self.from_state(self.state_dict(), self._kept.device)

    @property
    def anything(self) -> bool:
        """Whether noise was added since all was cleared."""
        return self._total != 0

    def clear(self) -> None:
        """Leave none outstanding."""
        self._total = 0.0
        self._kept.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, tensors and plain types."""
        return {"total": self._total, "kept": self._kept, "size": self._size}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "OutstandingNoise":
        """Return what `state_dict` described."""
        made = cls(len(state["kept"]), state["size"], device)
        made._total = state["total"]
        made._kept.copy_(state["kept"])
        return made

    def is_on_grid_of(self, other: "OutstandingNoise") -> bool:
        """Whether both have the same cells."""
        return (len(self._kept), self._size) == (len(other._kept), other._size)
