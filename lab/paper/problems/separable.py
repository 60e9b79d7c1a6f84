"""Objectives that treat coordinates (nearly) one by one: quadratics, cosines, double wells, the octopus."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.paper.problems.base import CriticalPoint, Problem


@dataclass(frozen=True)
class Quadratic(Problem):
    """A quadratic, f = sum_i (curvatures_i x_i^2 / 2 + slopes_i x_i), where linear recursions are exact: rho = 0.

    With curvatures of both signs its critical point is a saddle; if all curvatures are 0, the gradient is constant.
    f is unbounded below unless all curvatures are positive. `slopes` are zeros by default. Raises ValueError if
    `curvatures` and `slopes` have different lengths.

    >>> import torch
    >>> from lab.paper.problems import Quadratic
    >>> f = Quadratic((1.0, -1.0))
    >>> x = torch.tensor([2.0, 1.0], dtype=torch.float64)
    >>> f(x), f.gradient(x)
    (tensor(1.5000, dtype=torch.float64), tensor([ 2., -1.], dtype=torch.float64))
    """

    curvatures: tuple[float, ...]
    slopes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.slopes and len(self.slopes) != len(self.curvatures):
            raise ValueError(f"Quadratic needs a slope per curvature, got {len(self.slopes)} for {self.d}")

    @property
    def d(self) -> int:  # type: ignore[override]
        """The dimension of x."""
        return len(self.curvatures)

    def _coefficients(self, like: Tensor) -> tuple[Tensor, Tensor]:
        slopes = self.slopes or (0.0,) * self.d
        return torch.tensor(self.curvatures, dtype=like.dtype), torch.tensor(slopes, dtype=like.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        a, b = self._coefficients(x)
        return (a * x**2 / 2 + b * x).sum()

    def gradient(self, x: Tensor) -> Tensor:
        a, b = self._coefficients(x)
        return a * x + b

    def critical_points(self) -> list[CriticalPoint]:
        a, b = self._coefficients(torch.empty(0, dtype=torch.float64))
        if bool(((a == 0) & (b != 0)).any()):
            return []  # f is linear in some coordinate, so its gradient vanishes nowhere
        x = torch.where(a == 0, 0.0, -b / a)
        return [CriticalPoint(x, min(self.curvatures), sum(value < 0 for value in self.curvatures))]

    def constants(self, ball: float) -> tuple[float, float]:
        return max(map(abs, self.curvatures)), 0.0


@dataclass(frozen=True)
class Cosine(Problem):
    """A sum of cosines, f = w^3 (1 - cos(x_1 / w)) + sum_{i > 1} (1 - cos x_i), w = `width` in (0, 1].

    Assumption A holds everywhere: L = rho = 1 and f_max = 2 w^3 + 2 (d - 1). The critical points are all x with x_1 in
    w pi Z and the remaining coordinates in pi Z. The saddle at w pi e_1 has curvature -w, so it can be as weak as the
    theorems allow, and f decreases by 2 w^3 from it to a minimum. Raises ValueError unless w is in (0, 1].

    >>> from lab.paper.problems import Cosine
    >>> Cosine(3).constants(1.0)
    (1.0, 1.0)
    >>> sorted(point.index for point in Cosine(3).critical_points())
    [0, 1, 2, 3]
    """

    d: int
    width: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise ValueError(f"width of Cosine must be in (0, 1], got {self.width}")

    def _widths(self, x: Tensor) -> Tensor:
        widths = torch.ones_like(x)
        widths[0] = self.width
        return widths

    def __call__(self, x: Tensor) -> Tensor:
        w = self._widths(x)
        return (w**3 * (1 - (x / w).cos())).sum()

    def gradient(self, x: Tensor) -> Tensor:
        w = self._widths(x)
        return w**2 * (x / w).sin()

    def lambda_min(self, x: Tensor) -> float:
        """Return the smallest eigenvalue of the Hessian, which is diagonal, at x, float[d]."""
        w = self._widths(x)
        return float((w * (x / w).cos()).min())

    def critical_points(self) -> list[CriticalPoint]:
        points = []
        for index in range(self.d + 1):
            x = torch.zeros(self.d, dtype=torch.float64)
            x[:index] = math.pi
            x[0] *= self.width
            points.append(CriticalPoint(x, self.width if index == 0 else -self.width if index == 1 else -1.0, index))
        return points

    def constants(self, ball: float) -> tuple[float, float]:
        return 1.0, 1.0


@dataclass(frozen=True)
class DoubleWells(Problem):
    """A sum of double wells, f = sum_i (x_i^4 / 4 - x_i^2 / 2), with 2^d minima of -d / 4.

    The critical points are {-1, 0, 1}^d; the index of such a point is the number of its zeros.

    >>> import torch
    >>> from lab.paper.problems import DoubleWells
    >>> DoubleWells(2)(torch.ones(2, dtype=torch.float64))
    tensor(-0.5000, dtype=torch.float64)
    >>> [point.index for point in DoubleWells(2).critical_points()]
    [0, 1, 2]
    """

    d: int

    def __call__(self, x: Tensor) -> Tensor:
        return (x**4 / 4 - x**2 / 2).sum()

    def gradient(self, x: Tensor) -> Tensor:
        return x**3 - x

    def critical_points(self) -> list[CriticalPoint]:
        points = []
        for zeros in range(self.d + 1):
            x = torch.ones(self.d, dtype=torch.float64)
            x[:zeros] = 0.0
            points.append(CriticalPoint(x, -1.0 if zeros else 2.0, zeros))
        return points

    def constants(self, ball: float) -> tuple[float, float]:
        return max(1.0, 3 * ball - 1), 6 * math.sqrt(ball)


@dataclass(frozen=True)
class QuadraticQuartic(Problem):
    """f = x_1^4 / 4 - x_1^2 / 2 + (x_2^2 + ... + x_d^2) / 2, with a strict saddle at 0 and two minima at +-e_1.

    The minimum of f is -1 / 4.

    >>> import torch
    >>> from lab.paper.problems import QuadraticQuartic
    >>> QuadraticQuartic(3)(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    tensor(-0.2500, dtype=torch.float64)
    """

    d: int  # number of coordinates

    def __call__(self, x: Tensor) -> Tensor:
        return x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1:].square().sum() / 2

    def gradient(self, x: Tensor) -> Tensor:
        return torch.cat([x[:1] ** 3 - x[:1], x[1:]])

    def critical_points(self) -> list[CriticalPoint]:
        e = torch.eye(self.d, dtype=torch.float64)[0]
        return [CriticalPoint(0 * e, -1.0, 1), CriticalPoint(e, 2.0 if self.d == 1 else 1.0, 0)]

    def constants(self, ball: float) -> tuple[float, float]:
        return max(1.0, 3 * ball - 1), 6 * math.sqrt(ball)


@dataclass(frozen=True)
class Octopus(Problem):
    """The function on which gradient descent takes exponential time (Du et al. 2017), with d saddles in sequence.

    From near 0 the saddles (4 tau, ..., 4 tau, 0, ..., 0) are visited in order, so a run escapes exactly d times. Each
    has one negative curvature -2 gamma. At the minima all |x_i| = 4 tau and f = -d nu. f is defined if for some i
    |x_1|, ..., |x_{i-1}| lie in [2 tau, 6 tau], |x_i| <= 2 tau, and |x_{i+1}|, ..., |x_d| <= tau. Raises ValueError
    elsewhere.

    >>> from lab.paper.problems import Octopus
    >>> [point.index for point in Octopus(3).critical_points()]
    [1, 1, 1, 0]
    """

    d: int
    big: float = math.e  # L
    gamma: float = 1.0
    tau: float = math.e

    def _bridge(self, a: Tensor) -> Tensor:
        """Return g_1(a) for a in [tau, 2 tau], with g_1(tau) = -gamma tau^2.

        Its derivative is the cubic with g_1'(tau) = -2 gamma tau, g_1'(2 tau) = -4 L tau, g_1''(tau) = -2 gamma and
        g_1''(2 tau) = 2 L.
        """
        t, s = self.tau, (a - self.tau) / self.tau
        p0, p1, m0, m1 = -2 * self.gamma * t, -4 * self.big * t, -2 * self.gamma * t, 2 * self.big * t
        integral = (
            p0 * (s - s**3 + s**4 / 2)
            + m0 * (s**2 / 2 - 2 * s**3 / 3 + s**4 / 4)
            + p1 * (s**3 - s**4 / 2)
            + m1 * (s**4 / 4 - s**3 / 3)
        )
        return -self.gamma * t**2 + t * integral

    def _coupling(self, a: Tensor) -> Tensor:
        """Return g_2(a) for a in [tau, 2 tau]: from L at tau to -gamma at 2 tau.

        Its first and second derivatives vanish at both ends.
        """
        s = (a - 2 * self.tau) / self.tau
        return -self.gamma - (self.big + self.gamma) * (10 * s**3 + 15 * s**4 + 6 * s**5)

    @property
    def nu(self) -> float:
        """The depth of one leg: -g_1(2 tau) + 4 L tau^2."""
        end = torch.tensor(2 * self.tau, dtype=torch.float64)
        return float(4 * self.big * self.tau**2 - self._bridge(end))

    def stage(self, x: Tensor) -> int:
        """Return how many legs x, float[d], has passed: the number of leading coordinates with |x_i| >= 2 tau."""
        passed = (x.abs() >= 2 * self.tau).tolist()
        return passed.index(False) if False in passed else self.d

    def __call__(self, x: Tensor) -> Tensor:
        a, i = x.abs(), self.stage(x.detach())
        outside = bool((a[:i] > 6 * self.tau).any()) or bool((a[i + 1 :] > self.tau).any())
        if outside:
            raise ValueError(f"Octopus is not defined at {x.tolist()}")
        value = (self.big * (a[:i] - 4 * self.tau) ** 2).sum() - i * self.nu
        if i == self.d:
            return value
        if bool(a[i] <= self.tau):
            return value - self.gamma * x[i] ** 2 + self.big * x[i + 1 :].square().sum()
        value = value + self._bridge(a[i])
        if i + 1 < self.d:
            value = value + self._coupling(a[i]) * x[i + 1] ** 2 + self.big * x[i + 2 :].square().sum()
        return value

    def gradient(self, x: Tensor) -> Tensor:
        a, sign, i, t = x.abs(), x.sign(), self.stage(x), self.tau
        g = 2 * self.big * x
        g[:i] = 2 * self.big * (a[:i] - 4 * t) * sign[:i]
        if i == self.d:
            return g
        if float(a[i]) <= t:
            g[i] = -2 * self.gamma * x[i]
            return g
        s = (a[i] - t) / t
        p0, p1, m0, m1 = -2 * self.gamma * t, -4 * self.big * t, -2 * self.gamma * t, 2 * self.big * t
        slope = p0 * (1 - 3 * s**2 + 2 * s**3) + m0 * (s - 2 * s**2 + s**3)
        slope = slope + p1 * (3 * s**2 - 2 * s**3) + m1 * (s**3 - s**2)
        if i + 1 < self.d:
            u = (a[i] - 2 * t) / t
            slope = slope - (self.big + self.gamma) * (30 * u**2 + 60 * u**3 + 30 * u**4) / t * x[i + 1] ** 2
            g[i + 1] = 2 * self._coupling(a[i]) * x[i + 1]
        g[i] = slope * sign[i]
        return g

    def critical_points(self) -> list[CriticalPoint]:
        points = []
        for i in range(self.d + 1):
            x = torch.zeros(self.d, dtype=torch.float64)
            x[:i] = 4 * self.tau
            points.append(CriticalPoint(x, -2 * self.gamma if i < self.d else 2 * self.big, int(i < self.d)))
        return points

    def constants(self, ball: float) -> tuple[float, float]:
        """Return L and rho, which are valid wherever f is defined; `ball` is ignored.

        They are the sums of the largest second and third derivatives of g_1 and of g_2 x^2.
        """
        s = self.big + self.gamma
        return 2 * self.big + 20 * s, 200 * s / self.tau
