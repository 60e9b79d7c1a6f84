"""The report's figures and CSVs over seeds."""

import csv
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lab.runs.report import write_report
from lab.runs.report.curves import curve
from lab.runs.report.figures import inline_svg, thinned
from lab.runs.report.settings import settings
from lab.runs.run_folder import RunFolder, read_runs
from packsaddle.cli.folders import make_new

STEPS = range(10, 60, 10)


def make_run(folder: Path, label: str, seed: int, *, done: bool = True, **lines: list[float]) -> list[float]:
    """Write a run, with these further quantities; NaN is not measured. Return its losses."""
    rng = np.random.default_rng(seed)
    values = {"loss": rng.random(len(STEPS)).tolist(), "grad_norm": rng.random(len(STEPS)).tolist()} | lines
    run = RunFolder(folder)
    make_new(run.path)
    run.write_json("config.json", {"label": label, "seed": seed, "plateau": 0.1})
    run.write_json("environment.json", {"torch": "2"})
    for i, step in enumerate(STEPS):
        moved = {"payload": step * 1000, "sent": step * 1000 + seed, "received": 0, "seconds": step + seed / 2}
        measured = {name: v[i] for name, v in values.items() if not math.isnan(v[i])}
        run.append("metrics.jsonl", {"step": step, "epoch": step / 10, "resets": 0, **moved, **measured})
    if done:
        run.write_json("summary.json", {"final_loss": values["loss"][-1], "compression": 40.0 + seed})
    return values["loss"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_curves_and_settings_equal_numpy(tmp_path: Path) -> None:
    """Of three seeds, one of which is not finished and without tests, and of a lone seed."""
    tests = {"test_loss": [math.nan, 0.5, math.nan, math.nan, 0.25]}
    made = [make_run(tmp_path / "three" / str(seed), "three", seed, **tests) for seed in (0, 1)]
    made.append(make_run(tmp_path / "three" / "2", "three", 2, done=False))
    make_run(tmp_path / "lone", "lone", 0)
    write_report(read_runs([tmp_path]), tmp_path / "report")
    rows = [r for r in rows_of(tmp_path / "report" / "curves.csv") if r["setting"] == "three"]
    losses = np.array(made)
    six = 1e-5  # the CSV has six digits
    for column, expected in (
        ("loss_mean", losses.mean(0)),
        ("loss_low", np.quantile(losses, 0.1, axis=0)),
        ("loss_high", np.quantile(losses, 0.9, axis=0)),
        ("megabytes", [(step * 1000 + 1) / 1e6 for step in STEPS]),
        ("seconds", [step + 0.5 for step in STEPS]),
    ):
        assert [float(r[column]) for r in rows] == pytest.approx(list(expected), rel=six), column
    assert [r["test_loss_mean"] for r in rows] == ["", "0.5", "", "", "0.25"]
    lone, first = sorted(rows_of(tmp_path / "report" / "settings.csv"), key=lambda row: row["seeds"])
    half = stats.t.ppf(0.975, 2) * losses[:, -1].std(ddof=1) / math.sqrt(3)
    found = [float(first[f"final_loss{end}"]) for end in ("", "_low", "_high")]
    assert found == pytest.approx([losses[:, -1].mean() + shift for shift in (0, -half, half)])
    assert (first["seeds"], first["unfinished"], first["compression"]) == ("3", "1", "40.5")
    assert (lone["seeds"], lone["final_loss_low"]) == ("1", "")


def test_lines_are_the_means_of_the_seeds(tmp_path: Path) -> None:
    """Up to a linear map: linear in epochs, logarithmic in megabytes."""
    made = [make_run(tmp_path / str(seed), "a", seed) for seed in (0, 1)]
    found = settings(read_runs([tmp_path]))
    means, x = np.mean(made, axis=0), np.array([*STEPS])
    for axis, place in (("epoch", x / 10), ("megabytes", np.log(x * 1000 + 0.5))):
        svg = inline_svg("loss", axis, found, [curve(s) for s in found])
        numbers = re.findall(r'<path d="(M[^"z]*)"[^>]*stroke: var\(--c0\); stroke-width: 1.8', svg)
        (drawn,) = (np.array(re.findall(r"[\d.]+", text), dtype=float).reshape(-1, 2) for text in numbers)
        for measured, shown in ((place, drawn[:, 0]), (means, drawn[:, 1])):
            assert np.polyval(np.polyfit(measured, shown, 1), measured) == pytest.approx(shown, abs=0.02)
        assert svg.startswith("<svg")
        assert "#000000" not in svg


@pytest.mark.parametrize("log", [False, True])
def test_thinned_curves_keep_all_extremes(log: bool) -> None:
    """In each of 200 intervals, by a loop over them; few points are kept as they are."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(1, 1000, 5000))
    columns = rng.normal(size=(2, 5000))
    kept = thinned(x.tolist(), columns.tolist(), log)
    assert kept == sorted(set(kept))
    assert len(kept) <= 4 * 201 + 2
    assert {0, 4999} <= set(kept)
    place = np.log(x) if log else x
    edges = np.linspace(place[0], place[-1], 201)
    for low, high in itertools.pairwise(edges):
        inside = np.flatnonzero((place > low) & (place < high))
        for column in columns[:, inside] if len(inside) else ():
            assert {inside[column.argmin()], inside[column.argmax()]} <= set(kept)
    assert thinned(x[:400].tolist(), columns[:, :400].tolist(), log) == list(range(400))
    nothing = [math.nan] * 500
    assert thinned(nothing, (nothing,), log)[-1] == 499
