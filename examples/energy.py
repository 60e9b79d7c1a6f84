"""Is a geometry a transition state? The energy of three argon atoms, certified at a line and at a triangle.

    python examples/energy.py

A point is a tensor and needs no module: packsaddle.certify(x, energy). Rigid motions of the atoms do not change the
energy, so six eigenvalues are 0 also at a minimum. This is why the verdict needs an epsilon: it says that no curvature
is below -sqrt(rho epsilon).
"""

import torch
from torch import Tensor

import packsaddle

PAIRS = torch.triu_indices(3, 3, offset=1)


def energy(x: Tensor) -> Tensor:
    """Return the Lennard-Jones energy of atoms at x, float64[3, 3], in units of the well's depth and of sigma."""
    square = (x[PAIRS[0]] - x[PAIRS[1]]).square().sum(-1)
    return 4 * (square**-6 - square**-3).sum()


def relaxed(x: Tensor) -> Tensor:
    """Return the stationary point next to x. Forces do not break the symmetry of x, so a line stays a line."""
    x = x.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = energy(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


def main() -> None:
    line = torch.tensor([[-1.1, 0, 0], [0, 0, 0], [1.1, 0, 0]], dtype=torch.float64)
    triangle = torch.tensor([[0, 0, 0], [1.1, 0, 0], [0.55, 0.95, 0]], dtype=torch.float64)
    search = packsaddle.Search(generator=torch.Generator().manual_seed(0))
    for name, start in (("line", line), ("triangle", triangle)):
        x = relaxed(start)
        found = packsaddle.certify(x, energy, epsilon=1e-6, hessian_lipschitz=1.0, search=search)
        print(f"{name}, energy {float(energy(x)):.4f}\n{found}\n")


if __name__ == "__main__":
    main()
