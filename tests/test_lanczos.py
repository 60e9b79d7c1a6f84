"""Eigenvalue bounds against dense linear algebra: always from above, from below with the promised probability."""

import math

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from packsaddle.lanczos import lanczos


def spectrum(name: str, n: int) -> Tensor:
    """Eigenvalues, float64[n], of kinds that are easy, hard, or degenerate for Lanczos."""
    bulk = torch.cos(torch.linspace(0.01, math.pi - 0.01, n, dtype=torch.float64))  # dense at both ends
    kinds = {
        "chebyshev": bulk,
        "outlier": torch.cat([bulk[:-1], torch.tensor([-1.04], dtype=torch.float64)]),
        "clustered": torch.cat(
            [torch.full((n // 2,), -1.0, dtype=torch.float64) + 1e-9 * torch.arange(n // 2), bulk[: n - n // 2]]
        ),
        "repeated": torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64).repeat(n)[:n],
        "zero": torch.zeros(n, dtype=torch.float64),
        "nearly zero": 1e-12 * bulk,
        "positive": bulk + 2,
        "1e8": 1e8 * bulk,
        "1e-8": 1e-8 * bulk,
    }
    return kinds[name]


KINDS = ["chebyshev", "outlier", "clustered", "repeated", "zero", "nearly zero", "positive", "1e8", "1e-8"]


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_bracket_the_smallest_eigenvalue(kind: str) -> None:
    """Over 500 starts (a diagonal matrix is as good as any: the start is rotation invariant), at every step at once."""
    n, delta = 60, 0.05
    eigenvalues = spectrum(kind, n)
    smallest, scale = float(eigenvalues.min()), float(eigenvalues.abs().max())
    failures = 0
    for seed in range(500):
        wrong = False
        for ritz in lanczos(lambda v: eigenvalues * v, n, torch.Generator().manual_seed(seed)):
            assert ritz.theta_min >= smallest - 1e-12 * scale
            wrong |= ritz.lower_bound(delta) > smallest + 1e-12 * scale
            if ritz.steps == 25:
                break
        failures += wrong
    assert failures <= 500 * delta + 4 * math.sqrt(500 * delta * (1 - delta))


@pytest.mark.parametrize("kind", KINDS)
def test_exhausted_means_exact(kind: str) -> None:
    n = 30
    eigenvalues = spectrum(kind, n)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    matrix = rotation @ torch.diag(eigenvalues) @ rotation.T
    last = list(lanczos(lambda v: matrix @ v, n, torch.Generator().manual_seed(1)))[-1]
    scale = float(eigenvalues.abs().max())
    assert last.exhausted
    assert last.steps <= len(set(eigenvalues.tolist()))
    assert last.theta_min == pytest.approx(float(eigenvalues.min()), abs=1e-8 * scale)
    assert last.theta_max == pytest.approx(float(eigenvalues.max()), abs=1e-8 * scale)
    assert last.lower_bound(1e-3) <= float(eigenvalues.min()) + 1e-9 * scale
    v = last.vector()
    assert float((matrix @ v - last.theta_min * v).norm()) <= last.residual + 1e-10 * scale + 1e-300


def test_residual_and_agreement_with_scipy() -> None:
    """On a random symmetric matrix of 400: an eigenvalue lies within the residual, and ARPACK finds the same one."""
    a = torch.randn(400, 400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    matrix = (a + a.T) / 2
    exact = torch.linalg.eigvalsh(matrix)
    operator = LinearOperator(
        (400, 400), matvec=lambda v: (matrix @ torch.as_tensor(v).reshape(-1)).numpy(), dtype=float
    )
    arpack = float(eigsh(operator, k=1, which="SA", tol=1e-8, return_eigenvectors=False)[0])
    for ritz in lanczos(lambda v: matrix @ v, 400, torch.Generator().manual_seed(3)):
        v = ritz.vector()
        assert float(v @ matrix @ v) == pytest.approx(ritz.theta_min, abs=1e-10)
        assert float((matrix @ v - ritz.theta_min * v).norm()) == pytest.approx(ritz.residual, abs=1e-10)
        assert float((exact - ritz.theta_min).abs().min()) <= ritz.residual + 1e-10
        if ritz.residual < 1e-6:
            break
    assert ritz.theta_min == pytest.approx(arpack, abs=1e-6)
    assert ritz.theta_min == pytest.approx(float(exact[0]), abs=1e-6)


def test_lower_bound_says_nothing_too_early() -> None:
    eigenvalues = spectrum("chebyshev", 1000)
    bounds = []
    for ritz in lanczos(lambda v: eigenvalues * v, 1000, torch.Generator().manual_seed(0)):
        bounds.append(ritz.lower_bound(1e-3))
        if ritz.steps == 60:
            break
    assert bounds[1] == -math.inf
    assert -1.35 < bounds[-1] <= -1
    with pytest.raises(ValueError, match=r"failure_probability must be in \(0, 1\), got 0"):
        ritz.lower_bound(0)
