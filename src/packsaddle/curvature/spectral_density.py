"""The spectral density of the Hessian by stochastic Lanczos quadrature, with standard errors over probe vectors.

Let H be the Hessian of d coordinates. For a probe vector b, uniform on the unit sphere, E[b^T f(H) b] = tr f(H) / d for
every function f. Do k Lanczos steps from b, and let theta_j be the Ritz values, and tau_j the squared first components
of the eigenvectors of the tridiagonal matrix. Then sum_j tau_j f(theta_j) is a Gauss quadrature of b^T f(H) b, exact
for polynomials f of degree at most 2 k - 1 (Golub and Meurant 1994; Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl.
38, 2017).

If f is a Gaussian density with mean t, the mean of the quadratures over several probes estimates the density of
eigenvalues at t, smoothed by the Gaussian's width. The variation between probes gives the standard error of this
estimate, which excludes the error of the quadrature. The error of the quadrature is small if the width is at least the
range of the eigenvalues divided by k.

The fraction of eigenvalues below t needs no smoothing. The Chebyshev-Markov-Stieltjes inequalities bound each probe's
estimate of this fraction from both sides by sums of the probe's weights tau_j.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packsaddle.curvature.hessian import Curvature, LossFn, certifying
from packsaddle.curvature.lanczos import Ritz
from packsaddle.curvature.options import Search
from packsaddle.curvature.products import Products, choose_products, lanczos_over, with_products
from packsaddle.errors import check_positive


@dataclass(frozen=True)
class Estimate:
    """The mean of an estimate over several probe vectors, and the standard error of this mean.

    With only one probe vector the standard error is inf.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(statistics.fmean(values), error)


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the Hessian's eigenvalues, as a probability density."""

    values: tuple[float, ...]  # points t on the axis of eigenvalues at which the density is given, ascending
    density: tuple[float, ...]  # density of eigenvalues at each point of `values`, smoothed by a Gaussian of `width`
    error: tuple[float, ...]  # standard error of each number in `density`, from the variation between probe vectors
    width: float  # standard deviation of the Gaussian by which the density is smoothed
    nodes: tuple[tuple[float, ...], ...]  # Ritz values of the Hessian for each probe vector, ascending
    weights: tuple[tuple[float, ...], ...]  # quadrature weight of each Ritz value, for each probe vector
    d: int  # number of trainable coordinates
    examples: int  # number of examples in the mean loss
    hvp: str  # method of the Hessian-vector products
    hvp_error: float  # error of a Hessian-vector product with a unit vector; Ritz values have the same error
    hvps: int  # number of Hessian-vector products

    @property
    def trace(self) -> Estimate:
        """The estimated trace of the Hessian, with its standard error."""
        pairs = zip(self.nodes, self.weights, strict=True)
        return Estimate.of([self.d * sum(t * w for t, w in zip(*pair, strict=True)) for pair in pairs])

    def share_below(self, t: float) -> tuple[Estimate, Estimate]:
        """Return two estimates: a lower and an upper bound on the fraction of the Hessian's eigenvalues that are below
        t. Each is a mean over the probe vectors with its standard error."""
        least, most = [], []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            below = sum(theta < t for theta in nodes)
            least.append(sum(weights[: max(below - 1, 0)]))
            most.append(sum(weights[: below + 1]))
        return Estimate.of(least), Estimate.of(most)

    def __str__(self) -> str:
        least, most = self.share_below(0.0)
        trace = self.trace
        return (
            f"spectral density of {self.d:,} eigenvalues from {len(self.nodes)} probes, {self.hvps} products by "
            f"{self.hvp}\n"
            f"  Ritz values from {min(n[0] for n in self.nodes):.3e} to {max(n[-1] for n in self.nodes):.3e}, each "
            f"within {self.hvp_error:.1e}\n"
            f"  trace {trace.mean:.4g} (standard error {trace.error:.1e})\n"
            f"  below 0: {least.mean:.2%} to {most.mean:.2%} of eigenvalues (standard errors {least.error:.1%} and "
            f"{most.error:.1%})"
        )


def spectral_density(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    probes: int = 8,
    steps: int = 40,
    width: float | None = None,
    points: int = 400,
    search: Search = Search(),  # noqa: B008 -- immutable
    process_group: Any = None,
    progress: Callable[[int], None] = lambda products: None,
) -> SpectralDensity:
    """Estimate the density of the Hessian's eigenvalues at the model's current parameters; collective.

    Args:
        model, loss_fn, batches, process_group: see `certify`.
        probes: number of random vectors; standard errors fall as the inverse square root of their number.
        steps: maximum number of Lanczos steps per random vector, each with one Hessian-vector product; fewer are done
            if the Krylov space is exhausted.
        width: standard deviation of the smoothing Gaussian; by default the range of Ritz values divided by `steps`.
        points: number of points at which the density is given, evenly spaced from four widths below the smallest Ritz
            value to four widths above the largest.
        search: only its fields `hvp`, `memory_limit` and `generator` are used; the random vectors are drawn from
            `generator`.
        progress: called with the number of Hessian-vector products so far, at most probes * steps.

    Raises ValueError for invalid arguments and for losses that vary between evaluations.
    """
    for name, count in (("probes", probes), ("steps", steps), ("points", points)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    check_positive(width=width)

    # Compute the nodes theta_j and weights tau_j of each probe's Gauss quadrature.
    with certifying(model, process_group) as channel:
        curvature = Curvature(model, loss_fn, batches, channel)

        def quadratures(products: Products) -> tuple[str, list[Ritz]]:
            runs = (lanczos_over(products, search).run for _ in range(probes))
            return products.name, [run(steps, lambda _: False, lambda _: progress(curvature.products)) for run in runs]

        name, ritzes = with_products(choose_products(curvature, search.hvp), search.hvp, quadratures)

    # Compute the mean over probes of sum_j tau_j exp(-(t - theta_j)^2 / (2 width^2)), and its standard error.
    nodes, weights = tuple(r.thetas for r in ritzes), tuple(r.shares for r in ritzes)
    low, high = min(n[0] for n in nodes), max(n[-1] for n in nodes)
    narrowest = max(*(r.rounding for r in ritzes), 1e-12 * max(abs(low), abs(high)), 1e-30)
    spread = max((high - low) / steps, narrowest) if width is None else width
    grid = torch.linspace(low - 4 * spread, high + 4 * spread, points, dtype=torch.float64)
    smoothed = []
    for thetas, taus in zip(nodes, weights, strict=True):
        bells = torch.exp(-((grid[:, None] - torch.tensor(thetas, dtype=torch.float64)) ** 2) / (2 * spread**2))
        smoothed.append(bells.div_(spread * math.sqrt(2 * math.pi)) @ torch.tensor(taus, dtype=torch.float64))
    found = [Estimate.of(column) for column in torch.stack(smoothed).T.tolist()]
    return SpectralDensity(
        values=tuple(grid.tolist()),
        density=tuple(f.mean for f in found),
        error=tuple(f.error for f in found),
        width=spread,
        nodes=nodes,
        weights=weights,
        d=curvature.d,
        examples=curvature.examples,
        hvp=name,
        hvp_error=max(r.rounding for r in ritzes),
        hvps=curvature.products,
    )
