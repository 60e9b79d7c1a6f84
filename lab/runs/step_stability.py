"""A check that no single coordinate has an effective step size too large for its curvature, as RandomK can cause.

A coordinate that is sent with probability mu per step waits T steps, on average 1 / mu, and then moves by the sum of
the gradients of these steps. On a quadratic with step size eta and curvature H_jj, this is x_j <- (1 - eta T H_jj) x_j
with geometrically distributed T. The coordinate grows without bound if E ln|1 - eta T H_jj| > 0. For small mu, T mu is
nearly exponentially distributed, and the inequality holds if (eta / mu) H_jj > 2.68. For mu = 1 it holds if (eta / mu)
H_jj > 2.

Directions spread over many coordinates are not affected, since only a few of these move at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.products import Products, choose_products, with_products

LIMIT = 2.684  # largest stable `gain` for small mu: the a with E ln|1 - a U| = 0, where U is exponential of mean 1


@dataclass(frozen=True)
class CoordinateStep:
    """The learning rate of a parameter, and the mean number of steps between two sends of one of its coordinates."""

    name: str  # name of the parameter
    lr: float  # learning rate eta of the parameter
    wait: float  # 1 / mu, mean number of steps between two sends of a coordinate

    @property
    def effective(self) -> float:
        """The effective step size eta / mu: when sent, a coordinate moves by 1 / mu gradients on average."""
        return self.lr * self.wait


@dataclass(frozen=True)
class Overshoot:
    """The least stable coordinate found, i.e. the one with the largest product of effective step size and curvature,
    (eta / mu) H_jj."""

    step: CoordinateStep  # learning rate and waiting time of the coordinate's parameter
    index: tuple[int, ...]  # index of the coordinate in its parameter
    curvature: float  # second derivative H_jj of the loss, minus the error of the product

    @property
    def gain(self) -> float:
        """The effective step size times the curvature, (eta / mu) H_jj. At a gain of 2 an average step ends as far
        beyond the minimum as it started before it."""
        return self.step.effective * self.curvature

    @property
    def is_unstable(self) -> bool:
        """True if, on a quadratic loss, the coordinate would grow without bound."""
        return self.gain > LIMIT

    def advice(self) -> str:
        """Return a warning with the measured values and the options to change."""
        lr, where = self.step.lr * LIMIT / self.gain, ", ".join(map(str, self.index))
        return (
            f"past stability: {self.step.name}[{where}] waits 1/mu = {self.step.wait:,.0f} steps to be sent and then "
            f"moves by all their gradients, an effective step eta/mu = {self.step.effective:.3g} at curvature "
            f"{self.curvature:.3g}; their product is {self.gain:.3g}, and beyond {LIMIT:.1f} it overshoots more each "
            f"time. Lower lr below {lr:.2g}, send {self.gain / LIMIT:.2g} times as many coordinates, or send vectors "
            f"and small tensors dense (dense_below = 256)"
        )


def largest_overshoot(
    curvature: Curvature,
    steps: Sequence[CoordinateStep],
    generator: torch.Generator,
    *,
    probes: int = 6,
    candidates: int = 4,
) -> Overshoot:
    """Return the coordinate whose effective step size times curvature is the largest found; collective.

    The search uses `probes` + `candidates` Hessian-vector products. Hutchinson's estimate of the diagonal (Bekas,
    Kokiopoulou and Saad 2007) proposes candidates, whose curvature is then computed. So the result is correct for its
    coordinate, but another coordinate may be less stable. `steps` are in the order of `curvature.parameters`; the
    generator, on the CPU, must be in the same state on every worker.
    """
    sizes = [p.numel() for p in curvature.parameters]
    scale = torch.cat([torch.full((n,), s.effective, dtype=torch.float64) for n, s in zip(sizes, steps, strict=True)])
    scale = scale.to(curvature.device)
    # Divide vectors of random signs by a power of two near their norm, sqrt(d), since division by a power of two is
    # exact.
    length = 2.0 ** round(math.log2(curvature.d) / 2)

    def worst(products: Products) -> Overshoot:
        # The Hessian's diagonal is E[s * H s] for random signs s.
        diagonal = torch.zeros_like(scale)
        for _ in range(probes):
            signs = torch.randint(0, 2, (curvature.d,), generator=generator, dtype=torch.int8).to(scale) * 2 - 1
            diagonal += signs * products(signs / length) * length / probes
        found = torch.topk(scale * diagonal, min(candidates, curvature.d)).indices.tolist()
        return max((_measured(products, steps, sizes, j) for j in found), key=lambda o: o.gain)

    return with_products(choose_products(curvature, "auto"), "auto", worst)


def _measured(products: Products, steps: Sequence[CoordinateStep], sizes: Sequence[int], j: int) -> Overshoot:
    curvature = products.curvature
    unit = torch.zeros(curvature.d, dtype=torch.float64, device=curvature.device)
    unit[j] = 1.0
    product, error = products.checked(unit)
    which, rest = 0, j
    while rest >= sizes[which]:
        which, rest = which + 1, rest - sizes[which]
    place = torch.unravel_index(torch.tensor(rest), curvature.parameters[which].shape)
    return Overshoot(steps[which], tuple(int(i) for i in place), float(product[j]) - error)
