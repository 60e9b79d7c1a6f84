"""The study of Corollary 3.3: its k, its gain on synthetic runs, and rows that are kept and continued."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lab.bench.rows_file import add_rows
from lab.paper.corollary import (
    SWEEPS,
    Row,
    corollary_k,
    fall,
    fits,
    missing,
    read,
)
from lab.paper.escape_times import predicted, tail_rate


@pytest.mark.parametrize(
    ("epsilon", "d", "alpha", "k"),
    [(0.0625, 64, "1", 8), (0.0625, 64, "d", 1), (0.0625, 256, "d", 2), (1.0, 10, "1", 10), (1e-4, 10, "1", 1)],
)
def test_k_is_the_corollarys_within_its_range(epsilon: float, d: int, alpha: str, k: int) -> None:
    assert corollary_k(epsilon, d, alpha) == k


def test_the_gain_of_synthetic_runs_is_that_of_k(tmp_path: Path) -> None:
    """Both methods take epsilon^-4 steps, so RandomK gains the exponent of k, about 3/4 in epsilon."""
    sweep = next(s for s in SWEEPS if s.name == "alpha d, epsilon, 16 eta")
    rows = [
        Row(sweep.name, method, e, d, seed, 1, 0.1, 100, 50, round(1e4 * (1 + seed / 50) * fall(e) * e**-4))
        for method in ("uncompressed", "RandomK")
        for e, d in sweep.points
        for seed in range(5)
    ]
    add_rows(tmp_path / "rows.csv", map(asdict, rows))
    assert read(tmp_path / "rows.csv") == rows
    dense, compressed = fits(rows)
    assert dense.half.value == pytest.approx(-4.0, abs=0.01)
    assert compressed.bytes.value == pytest.approx(-3.25, abs=0.01)
    assert compressed.gain is not None
    assert compressed.gain.value == pytest.approx(0.75, abs=0.01)
    assert compressed.gain.excludes(0.0)
    assert all(s is not sweep for s, *_ in missing(rows))


def test_a_tail_has_its_rate_and_late_runs_are_a_logarithm_later() -> None:
    quantiles = [predicted(q, 1) for q in (0.99, 0.999, 0.9999)]
    assert quantiles[2] - quantiles[1] == pytest.approx(quantiles[1] - quantiles[0], rel=0.01)
    times = list(np.random.default_rng(0).exponential(50.0, 20000))
    assert tail_rate(times) == pytest.approx(1 / 50, rel=0.1)
