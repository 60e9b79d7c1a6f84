"""The artificial noise xi_t that is added to gradients (Algorithm 1, line 9), and schedules for its standard deviation
r.

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
    """A schedule of the noise's standard deviation: `std` until step `start`, then linear to `final` at step `stop`,
    then constant.

    `std` and `final` are standard deviations of each coordinate, in units of a gradient. In Figure 2, the paper lowers
    the noise late in the run, so that the gradient converges. Raises ValueError if `std` or `final` is negative, and if
    0 <= start <= stop does not hold.

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
        """Return the sum, over the first `steps` steps, of the squared standard deviation of the noise."""
        before, width = min(self.start, steps), self.stop - self.start
        # Number of steps in the linear part; these have the indices k = 0, ..., n - 1 below.
        n = min(self.stop, steps) - before
        fall = (self.final - self.std) / max(1, width)
        falling = n * self.std**2 + self.std * fall * n * (n - 1) + fall**2 * (n - 1) * n * (2 * n - 1) / 6
        return before * self.std**2 + falling + (steps - before - n) * self.final**2


@dataclass(frozen=True)
class GaussianNoise:
    """The noise vector xi_t of one step, float[d], which is identical on all workers. It is not stored.

    Every range of its coordinates can be drawn separately.
    """

    std: float
    key: Keys

    def add_to(self, out: Tensor, alpha: float = 1.0, start: int = 0) -> None:
        """Add a range of the noise xi_t, multiplied by `alpha`, to `out`, float[n], in place.

        The range has the n coordinates of xi_t from index `start` on.
        """
        add_gaussians(out, alpha * self.std, self.key, start)


@dataclass(frozen=True)
class Noise:
    """The artificial noise of Algorithm 1, shared by all workers: xi_t is a pure function of (seed, t).

    An argument of this type may also be a number or a function of the step. It then stands for `Noise(std)` with this
    number or function as `std`.

    Args:
        std: r, the standard deviation of each coordinate of xi_t, finite and at least 0, or a function of the step that
            returns r (see `Ramp`). Its unit is that of a gradient; in local updates, it is that of a parameter.
        lazy: True: draw the noise of a coordinate only in the steps that send the coordinate. A step then draws one
            number for each coordinate that it sends, instead of one for each coordinate of the parameters. The
            distribution of the iterates x_0, x_1, ... does not change (see
            `packsaddle.sgd.lazy_noise.OutstandingNoise`). This requires `CompressedSGD`, RandomK by all-reduce, and no
            escape check, since an escape check reads the error memory. False: draw the noise of all coordinates in
            every step. None: True if possible, else False.

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
        """Return `given` as a `Noise`. If it is a number or a function, it becomes the `std` of a new `Noise`."""
        return given if isinstance(given, Noise) else cls(given)

    def at_step(self, step: int) -> float:
        """Return r, the standard deviation of the noise at `step`. Raises ValueError if it is not a number, is negative
        or is not finite."""
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
        """Return the noise vector xi_t of `step`, as an object from which ranges of coordinates can be drawn.

        `seed` must be identical on all workers. Returns None if the standard deviation at this step is 0.
        """
        r = self.at_step(step)
        return GaussianNoise(r, keys(seed, step, Stream.NOISE)) if r else None

    def vector(self, like: Tensor, *, seed: int, step: int) -> Tensor | None:
        """Return the noise vector xi_t of `step`, float[d], with the shape, dtype and device of `like`.

        `seed` must be identical on all workers. Returns None if the standard deviation at this step is 0.
        """
        noise = self.drawn(seed=seed, step=step)
        if noise is None:
            return None
        xi = torch.zeros_like(like)
        noise.add_to(xi)
        return xi

    def check_eager(self) -> None:
        """Raise ValueError if `lazy` is True, which only `CompressedSGD` supports."""
        if self.lazy:
            raise ValueError("noise must be eager except in CompressedSGD, got lazy=True")
