"""Measure the proof's ideas on small problems and draw them: a CSV file per idea and one figure.

python -m lab.studies.diagnostics --out DIR
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lab.paper.problems import Octopus, Oracle, Quadratic, QuadraticQuartic
from lab.paper.proof import (
    Method,
    couple,
    error_growth,
    escape_times,
    follow,
    growth_rate,
    improve_or_localise,
    octopus_escapes,
    predicted_escape_time,
    random_k_limit,
)
from lab.studies.diagnostics_figure import draw
from packsaddle import Compressor, Identity, LinearSketch, RandomK, Sign, TopK

Row = dict[str, Any]
COMPRESSORS: dict[str, Compressor] = {"Identity": Identity(), "RandomK": RandomK(k=2), "TopK": TopK(k=2)}
SEEDS = 20
ESCAPE_SEEDS = 50


def zeros(d: int) -> torch.Tensor:
    """A start at the origin, float64[d]."""
    return torch.zeros(d, dtype=torch.float64)


def coupling() -> Iterator[Row]:
    """Coupled runs from the saddle of x_1^4/4 - x_1^2/2 + ||y||^2/2, d = 20: medians and quantiles over seeds.

    sigma is 0.0002 per coordinate, below r: with more, both runs tend to fall on the side that theta_t chooses.
    """
    oracle, steps = Oracle(QuadraticQuartic(20), sigma=0.001), 320
    for name, compressor in COMPRESSORS.items():
        method = Method(0.05, compressor, 1e-3)
        runs = [couple(oracle, method, zeros(20), steps=steps, seed=s) for s in range(SEEDS)]
        gaps = torch.stack([run.along.abs() for run in runs])
        for t in range(0, steps + 1, 4):
            low, median, high = quantiles(gaps[:, t])
            yield {
                "compressor": name,
                "step": t,
                "gap": median,
                "gap_10": low,
                "gap_90": high,
                "predicted_median": 0.6745 * float(runs[0].predicted_std[t]),
                "y_gap": quantiles(torch.stack([run.y_gap[t] for run in runs]))[1],
                "e_gap": quantiles(torch.stack([run.e_gap[t] for run in runs]))[1],
                "f": quantiles(torch.stack([run.f[t] for run in runs]))[1],
            }


def rates() -> Iterator[Row]:
    """Growth per step of coupled runs on -x_1^2/4 + ||y||^2/2, d = 20, where it lasts: slopes over 2,000 steps."""
    oracle, eta, gamma = Oracle(Quadratic((-0.5,) + (1.0,) * 19)), 0.05, 0.5
    for name, compressor in {**COMPRESSORS, "RandomK, k = 1": RandomK(k=1)}.items():
        runs = [couple(oracle, Method(eta, compressor, 1e-3), zeros(20), steps=2200, seed=s) for s in range(10)]
        slopes = torch.tensor([run.growth_rate(200) for run in runs])
        mu = compressor.mu(20) if name.startswith("RandomK") else 1.0
        yield {
            "compressor": name,
            "rate": float(slopes.mean()),
            "standard_error": float(slopes.std()) / len(runs) ** 0.5,
            "predicted": growth_rate(eta, gamma, mu),
            "uncompressed": growth_rate(eta, gamma),
        }


def localisation() -> Iterator[Row]:
    """Improve or localise on the same function with noise 0.01 and sigma 0.05: seed 0, and c over seeds."""
    oracle, steps = Oracle(QuadraticQuartic(20), sigma=0.05), 320
    for name, compressor in COMPRESSORS.items():
        runs = [follow(oracle, Method(0.05, compressor, 0.01), zeros(20), steps=steps, seed=s) for s in range(SEEDS)]
        results = [improve_or_localise(run, smoothness=2.0) for run in runs]
        constants = torch.tensor([result.constant for result in results])
        print(f"localisation {name}: smallest c {constants.median():.3f}, {constants.min():.3f}..{constants.max():.3f}")
        for t in range(0, steps + 1, 4):
            moved, bound = float(results[0].moved[t]), float(results[0].bound[t])
            yield {"compressor": name, "step": t, "moved": moved, "bound": bound, "c": results[0].constant}


def error() -> Iterator[Row]:
    """Lemma A.5 for a constant gradient of ones, d = 16 and k = 2, in units of ||g||^2."""
    oracle, steps, mu = Oracle(Quadratic((0.0,) * 16, slopes=(1.0,) * 16)), 100, 1 / 8
    for name in ("RandomK", "TopK"):
        growth = error_growth(oracle, Method(0.1, COMPRESSORS[name]), zeros(16), steps=steps, seeds=100)
        mean, se = float(growth.mean[-1]) / 16, float(growth.standard_error[-1]) / 16
        print(
            f"error {name}: {mean:.1f} +- {se:.1f}, limit {random_k_limit(mu):.0f}, bound {growth.bound[-1] / 16:.0f}"
        )
        for t in range(steps + 1):
            yield {
                "compressor": name,
                "step": t,
                "mean": float(growth.mean[t]) / 16,
                "standard_error": float(growth.standard_error[t]) / 16,
                "exact_random_k": sum(a**2 * mu * (1 - mu) ** a for a in range(t)) + t**2 * (1 - mu) ** t,
                "bound": float(growth.bound[t]) / 16,
            }


def sensitivity() -> Iterator[Row]:
    """||e - e'|| of coupled runs whose gradients are near (1, ..., 1), d = 16, against the noise along v_1 = e_1."""
    oracle = Oracle(Quadratic((-0.5,) + (0.0,) * 15, slopes=(1.0,) * 16))
    compressors = {
        "RandomK": RandomK(k=4),
        "LinearSketch": LinearSketch(columns=4),
        "TopK": TopK(k=4),
        "Sign": Sign(),
    }
    direction = torch.eye(16)[0]
    for name, compressor in compressors.items():
        for noise in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            method = Method(0.02, compressor, noise)
            runs = [couple(oracle, method, zeros(16), steps=100, direction=direction, seed=s) for s in range(5)]
            low, median, high = quantiles(torch.stack([run.e_gap.square().mean().sqrt() for run in runs]))
            yield {"compressor": name, "noise": noise, "e_gap": median, "e_gap_10": low, "e_gap_90": high}


def escapes() -> Iterator[Row]:
    """Escape times from the saddle of -x_1^2/4 + ||y||^2/2, d = 20, r = 0.001 per coordinate, R = 1."""
    oracle = Oracle(Quadratic((-0.5,) + (1.0,) * 19))
    compressors = {**COMPRESSORS, "RandomK, k = 1": RandomK(k=1)}
    for eta in (0.05, 0.01):
        for name, compressor in compressors.items():
            mu = compressor.mu(20) if name.startswith("RandomK") else 1.0
            row = {
                "compressor": name,
                "eta": eta,
                "predicted": predicted_escape_time(eta, 0.5, 1e-3, 1.0),
                "predicted_with_mu": predicted_escape_time(eta, 0.5, 1e-3, 1.0, mu),
            }
            method = Method(eta, compressor, 1e-3)
            found = escape_times(oracle, method, zeros(20), radius=1.0, limit=10_000, seeds=ESCAPE_SEEDS)
            row |= {"median": found.median, "q10": found.quantile(0.1), "q90": found.quantile(0.9)}
            print(f"escapes {row}, improved {found.improved}/{ESCAPE_SEEDS}")
            yield row


def octopus() -> Iterator[Row]:
    """The octopus with four legs, from (0.001, ...): steps at which each saddle is left."""
    problem, start = Octopus(4), torch.full((4,), 1e-3)
    methods = {
        "no noise": (Method(0.02), 20_000, 1),
        "Identity": (Method(0.02, noise=0.02), 2000, SEEDS),
        "RandomK": (Method(0.02, RandomK(k=2), 0.02), 2000, SEEDS),
        "TopK": (Method(0.02, TopK(k=2), 0.02), 2000, SEEDS),
    }
    for name, (method, steps, seeds) in methods.items():
        runs = [follow(Oracle(problem), method, start, steps=steps, seed=s) for s in range(seeds)]
        times = [octopus_escapes(problem, run.x) for run in runs]
        print(f"octopus {name}: escapes per run {sorted({len(t) for t in times})}")
        for leg, left in enumerate(zip(*times, strict=True), 1):
            low, median, high = quantiles(torch.tensor(left, dtype=torch.float64))
            yield {"method": name, "leg": leg, "step": median, "step_10": low, "step_90": high}


def quantiles(values: torch.Tensor) -> tuple[float, float, float]:
    """Return the 10%, 50% and 90% quantiles."""
    low, median, high = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)).tolist()
    return low, median, high


def main() -> None:
    """Measure everything, write the tables, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSV files and figure.png")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for measure in (coupling, rates, localisation, error, sensitivity, escapes, octopus):
        rows = list(measure())
        with (folder / f"{measure.__name__}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    draw(folder)


if __name__ == "__main__":
    main()
