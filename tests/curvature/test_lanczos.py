"""Eigenvalue bounds against dense linear algebra: always from above, from below with the promised probability."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.special import betaincinv
from torch import Tensor

from packsaddle.curvature.lanczos import Lanczos, Ritz


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


def start(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(eigenvalues: Tensor, seed: int, **options: Any) -> Iterator[Ritz]:
    """Every step on a diagonal matrix, which is as good as any: the start's law does not change under rotations."""
    n = len(eigenvalues)
    lanczos = Lanczos(lambda v: eigenvalues * v, start(n, seed), **options)
    while not lanczos.exhausted:
        yield lanczos.step()


BRACKETED: list[tuple[str, int | None, int]] = [
    (kind, None, 60) for kind in ("chebyshev", "outlier", "clustered", "zero", "1e-8")
]
BRACKETED += [("outlier", 2, 60), ("clustered", None, 2000)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "max_vectors", "n"), BRACKETED)
def test_bounds_bracket_the_extreme_eigenvalues(kind: str, max_vectors: int | None, n: int) -> None:
    """Over 40 starts, with every look at the bound counted; also on matrices of 2,000."""
    delta, starts, failures, above = 0.05, 40, 0, 0
    eigenvalues = spectrum(kind, n)
    smallest, largest, scale = float(eigenvalues.min()), float(eigenvalues.max()), float(eigenvalues.abs().max())
    for seed in range(starts):
        wrong = False
        for ritz in steps(eigenvalues, seed, max_vectors=max_vectors):
            assert ritz.theta_min >= smallest - 1e-12 * scale
            if ritz.steps % 5 == 1 or ritz.exhausted:
                wrong |= ritz.lower_bound(delta) > smallest + 1e-12 * scale
            if ritz.steps == 16:
                break
        failures += wrong
        assert ritz.theta_max <= largest + 1e-12 * scale
        above += ritz.upper_bound(delta) < largest - 1e-12 * scale
    assert max(failures, above) <= starts * delta + 4 * math.sqrt(starts * delta * (1 - delta))


@pytest.mark.slow
def test_the_failure_probability_is_used_up_where_spectra_are_hard() -> None:
    """A bound that never failed would be needlessly loose: of one far outlier only the start's share is known."""
    n, delta = 400, 0.2
    eigenvalues = torch.cat([torch.tensor([-1.05], dtype=torch.float64), spectrum("chebyshev", n - 1)])
    failures = 0
    for seed in range(100):
        looked_at = (ritz for ritz, _ in zip(steps(eigenvalues, seed), range(20), strict=False) if ritz.steps % 5 == 0)
        bounds = [ritz.lower_bound(delta) for ritz in looked_at]
        failures += max(bounds) > -1.05
    assert 0.02 * 100 < failures <= 100 * delta + 4 * math.sqrt(100 * delta * (1 - delta))


@pytest.mark.parametrize("share", [1.01, 1.5, 5.0, 40.0])
@pytest.mark.parametrize("precision", ["double", "single"])
@pytest.mark.parametrize("kind", ["outlier", "low rank"])
def test_no_start_with_enough_of_the_eigenvector_breaks_the_bound(kind: str, precision: str, share: float) -> None:
    """Sharper than counting failures: given <b, v>^2 = `share` * w, above the quantile w, none is allowed; not even
    when single-precision products of a nearly low-rank matrix go on after its Krylov space has ended."""
    n, delta = 300, 1e-5
    rotation = torch.linalg.qr(torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    if kind == "low rank":
        matrix = rotation @ torch.diag(torch.tensor([-1e-4, 1.0, 0.3, 0.0], dtype=torch.float64)) @ rotation.T
        v, smallest = rotation[:, 0], -1e-4
    else:
        matrix, v, smallest = torch.diag(spectrum("outlier", n)), torch.eye(n, dtype=torch.float64)[-1], -1.04
    dtype = torch.float64 if precision == "double" else torch.float32
    rounded = matrix.to(dtype)
    along = math.sqrt(share * float(betaincinv(0.5, (n - 1) / 2, delta)))
    for seed in range(10):
        across = start(n, seed)
        across -= (across @ v) * v
        b = along * v + math.sqrt(1 - along**2) * across / across.norm()
        lanczos = Lanczos(lambda u: (rounded @ u.to(dtype)).double(), b, precision=torch.finfo(dtype).eps)
        for _ in range(20):
            ritz = lanczos.step()
            assert ritz.lower_bound(delta) <= smallest + 1e-12, (seed, ritz.steps)
            if lanczos.exhausted:
                break


def test_the_products_error_is_measured() -> None:
    """Products with far less precision than is claimed for them: what is not symmetric about them shows."""
    eigenvalues = spectrum("positive", 200)
    coarse = Lanczos(lambda v: (eigenvalues * v).bfloat16().double(), start(200, 0))
    exact = Lanczos(lambda v: eigenvalues * v, start(200, 0))
    for _ in range(10):
        rough, fine = coarse.step(), exact.step()
    assert fine.rounding < 1e-13
    assert rough.rounding > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_exhausted_means_exact(kind: str) -> None:
    n = 30
    eigenvalues = spectrum(kind, n)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    matrix = rotation @ torch.diag(eigenvalues) @ rotation.T
    lanczos = Lanczos(lambda v: matrix @ v, start(n, 1))
    while not lanczos.exhausted:
        last = lanczos.step()
    scale = float(eigenvalues.abs().max())
    assert last.exhausted
    assert last.steps <= len(set(eigenvalues.tolist()))
    assert last.theta_min == pytest.approx(float(eigenvalues.min()), abs=1e-8 * scale)
    assert last.theta_max == pytest.approx(float(eigenvalues.max()), abs=1e-8 * scale)
    assert last.lower_bound(1e-3) <= float(eigenvalues.min()) + 1e-9 * scale
    assert last.lower_bound(1e-3) >= float(eigenvalues.min()) - 1e-6 * scale
    assert sum(last.shares) == pytest.approx(1.0)
    v = lanczos.ritz_vector()
    assert float((matrix @ v - last.theta_min * v).norm()) <= last.residual + 1e-10 * scale + 1e-300
    with pytest.raises(RuntimeError, match="no further step"):
        lanczos.step()


def test_residual_and_agreement_with_scipy() -> None:
    """On a random symmetric matrix of 400: an eigenvalue lies within the residual, and ARPACK finds the same one."""
    a = torch.randn(400, 400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    matrix = (a + a.T) / 2
    exact = torch.linalg.eigvalsh(matrix)
    operator = LinearOperator(
        (400, 400), matvec=lambda v: (matrix @ torch.as_tensor(v).reshape(-1)).numpy(), dtype=float
    )
    arpack = float(eigsh(operator, k=1, which="SA", tol=1e-8, return_eigenvectors=False)[0])
    lanczos = Lanczos(lambda v: matrix @ v, start(400, 3))
    ritz = lanczos.step()
    while ritz.residual >= 1e-6:
        v = lanczos.ritz_vector()
        assert float(v @ matrix @ v) == pytest.approx(ritz.theta_min, abs=1e-10)
        assert float((matrix @ v - ritz.theta_min * v).norm()) == pytest.approx(ritz.residual, abs=1e-10)
        assert float((exact - ritz.theta_min).abs().min()) <= ritz.residual + 1e-10
        ritz = lanczos.step()
    assert ritz.theta_min == pytest.approx(arpack, abs=1e-6)
    assert ritz.theta_min == pytest.approx(float(exact[0]), abs=1e-6)


def test_bad_arguments_are_named() -> None:
    ritz = next(steps(spectrum("chebyshev", 1000), 0))
    assert -1e6 < ritz.lower_bound(1e-3) < -1
    for wrong in (0.0, 1e-200, 1.0):
        with pytest.raises(ValueError, match=rf"failure_probability must be in \[1e-100, 1\), got {wrong}"):
            ritz.lower_bound(wrong)
    with pytest.raises(ValueError, match="max_vectors must be at least 2, got 1"):
        next(steps(spectrum("chebyshev", 10), 0, max_vectors=1))


def test_squares_of_tiny_eigenvalues_underflow() -> None:
    eigenvalues = torch.linspace(1e-200, 1e-199, 30, dtype=torch.float64)
    *_, ritz = steps(eigenvalues, 0)
    assert ritz.theta_min == pytest.approx(1e-200, abs=1e-210)
    assert ritz.theta_max == pytest.approx(1e-199, abs=1e-210)
    assert ritz.lower_bound(1e-3) <= 1e-200
