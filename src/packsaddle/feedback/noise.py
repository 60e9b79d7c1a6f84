"""The artificial noise xi_t that is added to gradients (Algorithm 1, line 9), and schedules for its std r.

r is the standard deviation of each coordinate (as in the paper's Figure 2), so ||xi_t|| is about r sqrt(d).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.errors import check_not_negative
from packsaddle.numerics.seeds import Keys, Stream, add_gaussians, keys


@dataclass(frozen=True)
class Ramp:
    """A schedule of the noise's std: `std` until step `start`, then linear to `final` at step `stop`, then constant.

    `std` and `final` are standard deviations of a coordinate, in units of a gradient. The paper lowers its noise late
    in Figure 2 so that the gradient converges. Raises ValueError if std or final is negative, or unless
    0 <= start <= stop.

    >>> from packsaddle import Ramp
    >>> noise = Ramp(0.01, start=100, stop=200)
    >>> noise(0), noise(150), noise(200)
    (0.01, 0.005, 0.0)
    """

    std: float
    start: int
    stop: int
    final: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(**{"std of Ramp": self.std, "final of Ramp": self.final})
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"Ramp needs 0 <= start <= stop, got start={self.start}, stop={self.stop}")

    def __call__(self, step: int) -> float:
        if step < self.start:
            return self.std
        if step >= self.stop:
            return self.final
        return self.std + (self.final - self.std) * (step - self.start) / (self.stop - self.start)

    def squares(self, steps: int) -> float:
        """Return the sum of the squares of the noise's std over the first `steps` steps."""
        before, width = min(self.start, steps), self.stop - self.start
        n = min(self.stop, steps) - before  # number of steps in the linear part, with indices k = 0, ..., n - 1
        fall = (self.final - self.std) / max(1, width)
        falling = n * self.std**2 + self.std * fall * n * (n - 1) + fall**2 * (n - 1) * n * (2 * n - 1) / 6
        return before * self.std**2 + falling + (steps - before - n) * self.final**2


@dataclass(frozen=True)
class GaussianNoise:
    """The noise vector xi_t of one step, float[d], identical on all workers. Each range
    of its coordinates can be drawn separately."""

    std: float
    key: Keys

    def add_to(self, out: Tensor, alpha: float = 1.0, start: int = 0) -> None:
        """Add alpha times n coordinates of the noise xi_t, from index `start` on, to out, float[n], in place."""
        add_gaussians(out, alpha * self.std, self.key, start)


@dataclass(frozen=True)
class Noise:
    """The artificial noise of Algorithm 1, shared by all workers: xi_t is a pure function of (seed, t).

    Arguments of this type also accept a number or function `std`, as short for `Noise(std)`.

    Args:
        std: r, the standard deviation of each coordinate of xi_t, finite and at least 0, or a function of the step that
            returns r (see `Ramp`). Its unit is that of a gradient; in local updates, it is that of a parameter.
        lazy: draw the noise of a coordinate only when the coordinate is sent. This draws one number for each of the
            coordinates that a step sends, instead of one for each coordinate of the parameters, and does not change the
            distribution of the iterates x_0, x_1, ... (see `packsaddle.sgd.lazy_noise.OutstandingNoise`). It requires
            `CompressedSGD`, RandomK by all-reduce, and no escape check, since an escape check reads the error memory.
            None, the default, draws lazily if this is possible.

    Raises ValueError if r is negative or not finite.

    >>> from packsaddle import Noise, Ramp
    >>> Noise(Ramp(0.01, start=100, stop=200)).at_step(150)
    0.005
    """

    std: float | Callable[[int], float] = 0.0
    lazy: bool | None = None

    def __post_init__(self) -> None:
        self.at_step(0)

    @classmethod
    def of(cls, given: "float | Callable[[int], float] | Noise") -> "Noise":
        """Return `given` if it is a `Noise`, and otherwise a new `Noise` whose `std` is this number or function."""
        return given if isinstance(given, Noise) else cls(given)

    def at_step(self, step: int) -> float:
        """Return the noise std r at `step`. Raises ValueError if it is negative or not finite."""
        given = self.std(step) if callable(self.std) else self.std
        try:
            r = float(given)
        except (TypeError, ValueError):
            expected = "a number, or a function of the step that returns one"
            raise ValueError(f"noise must be {expected}, got {given!r} at step {step}") from None
        if not (math.isfinite(r) and r >= 0):
            raise ValueError(f"noise must be finite and not negative, got {r} at step {step}")
        return r

    def drawn(self, *, seed: int, step: int) -> GaussianNoise | None:
        """Return the noise vector of `step` for the workers' shared `seed`, from which coordinates can be drawn.
        Returns None if its std is 0."""
        r = self.at_step(step)
        return GaussianNoise(r, keys(seed, step, Stream.NOISE)) if r else None

    def vector(self, like: Tensor, *, seed: int, step: int) -> Tensor | None:
        """Return the noise vector of `step` for the workers' shared `seed`, float[d], in the dtype of `like` and on its
        device. Returns None if its std is 0."""
        noise = self.drawn(seed=seed, step=step)
        if noise is None:
            return None
        xi = torch.zeros_like(like)
        noise.add_to(xi)
        return xi

    def check_eager(self) -> None:
        """Raise ValueError if lazy=True, which only `CompressedSGD` supports."""
        if self.lazy:
            raise ValueError("noise must be eager except in CompressedSGD, got lazy=True")
