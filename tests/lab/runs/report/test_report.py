"""Reports are made from run folders alone: the plateau's length, tables, curves over seeds, the page."""

import csv
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lab.cli.report import report
from lab.runs.report import write_report
from lab.runs.report.curves import curve
from lab.runs.report.figures import inline_svg, thinned
from lab.runs.report.settings import settings
from lab.runs.report.tables import document, plateau
from lab.runs.run_folder import Run, RunFolder, read_runs
from packsaddle.cli.folders import make_new


@pytest.fixture(autouse=True)
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the page's charts, which take longer than the rest; one is tested below."""
    monkeypatch.setattr("lab.runs.report.page.inline_svg", lambda *arguments: "<svg></svg>")


def line(epoch: float, loss: float) -> dict[str, Any]:
    n = int(epoch * 1000)
    moved = {"payload": n, "sent": n, "received": n, "seconds": epoch, "resets": 0}
    return {"step": int(epoch * 10), "epoch": epoch, "loss": loss, "grad_norm": 0.1, **moved}


LINES = [line(*p) for p in ((0.5, 0.2), (1.0, 0.104), (1.5, 0.1), (2.0, 0.096), (2.5, 0.094), (3.0, 0.05))]


def make_run(folder: Path, label: str, lines: list[dict[str, Any]], *, seed: int = 0, done: bool = True) -> Path:
    run = RunFolder(folder)
    make_new(run.path)
    run.write_json("config.json", {"label": label, "seed": seed, "plateau": 0.1})
    run.write_json("environment.json", {"torch": "2"})
    for entry in lines:
        run.append("metrics.jsonl", entry)
    if done:
        results = {"final_loss": lines[-1]["loss"], "test_loss": 0.06, "compression": 40.0 + seed}
        run.write_json("summary.json", results)
    return folder


def test_plateau() -> None:
    """Entered at 1.0 (0.104 <= 0.105), left at 2.5 (0.094 < 0.095)."""
    assert plateau(LINES, 0.1) == (1.5, True)
    assert plateau(LINES[:4], 0.1) == (1.0, False)
    assert plateau(LINES[:1], 0.1) == (0.0, None)
    assert plateau(LINES, None) == (None, None)


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a", "<b>bold</b> & co", LINES)
    make_run(tmp_path / "runs" / "b", "", LINES[:4], done=False)
    runs = read_runs([tmp_path / "runs"])
    assert [r.label for r in runs] == ["<b>bold</b> & co", "b"]
    html = write_report(runs, tmp_path / "report").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; co" in html
    assert "<b>bold" not in html
    assert "b (unfinished)" in html
    assert "1.0+" in html
    assert (tmp_path / "report" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "figure.svg").read_text().count("<svg") == 1
    with (tmp_path / "report" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["plateau_epochs"] == "1.5"
    assert float(rows[0]["megabytes"]) == pytest.approx(0.003)


def test_runs_of_one_seed_are_no_seeds_of_one_setting(tmp_path: Path) -> None:
    """A mean of a run, its copy and a repetition would have an interval as of three seeds."""
    folders = [make_run(tmp_path / str(i), "mine", LINES, seed=seed) for i, seed in enumerate((0, 0, 1, 0))]
    found = settings(read_runs(folders))
    assert [(s.label, s.seeds) for s in found] == [("mine", [0, 1]), ("mine (2)", [0]), ("mine (3)", [0])]


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    """A study's runs come by path, seed 2 before seed 10; a run without a label is called by its setting."""
    for name in ("b/seed-10", "b/seed-2", "a/seed-0"):
        make_run(tmp_path / "study" / "runs" / name, "", LINES)
    names = ["a/seed-0", "b/seed-2", "b/seed-10"]
    for above in ("study", "study/runs"):
        runs = read_runs([tmp_path / above])
        assert [str(run.path.relative_to(tmp_path / "study" / "runs")) for run in runs] == names
    assert [run.label for run in runs] == ["a", "b", "b"]
    assert len(read_runs([tmp_path / "study" / "runs" / "b"])) == 2


def test_the_report_as_json_has_the_numbers_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the lines on disk; a diverged loss is text that float reads, since JSON has no infinity."""
    folders = [make_run(tmp_path / "a", "a", LINES), make_run(tmp_path / "b", "a", LINES[:4], seed=1, done=False)]
    folders.append(make_run(tmp_path / "c", "c", [line(1.0, math.inf)]))
    certificate = {"step": 10, "epoch": 1.0, "verdict": "saddle", "lambda_min_lower": -0.3, "lambda_min_upper": -0.2}
    (folders[0] / "certificates.jsonl").write_text(json.dumps(certificate) + "\n")
    report(tuple(folders), json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["format"], [r["setting"] for r in found["runs"]]) == (1, ["a", "a", "c"])

    # Runs, by their files.
    for told, folder in zip(found["runs"], folders, strict=True):
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert (told["folder"], told["finished"]) == (str(folder), (folder / "summary.json").exists())
        assert (told["megabytes"], told["seconds"]) == (last["sent"] / 1e6, last["seconds"])
        assert float(told["final_loss"]) == last["loss"]
    assert [(r["plateau_epochs"], r["left_plateau"]) for r in found["runs"][:2]] == [(1.5, True), (1.0, False)]
    assert found["runs"][2]["final_loss"] == "inf"

    # Settings, and the certificate's line.
    a, c = found["settings"]
    assert (a["seeds"], a["unfinished"], a["on_plateau"], c["seeds"]) == (2, 1, 1, 1)
    assert a["final_loss"]["values"] == [0.05, 0.096]
    half = 12.7062 * abs(0.096 - 0.05) / 2  # Student's t with one degree of freedom
    interval = [a["final_loss"][name] for name in ("mean", "low", "high")]
    assert interval == pytest.approx([0.073, 0.073 - half, 0.073 + half], rel=1e-4)
    (told,) = found["certificates"]
    assert told.items() >= (certificate | {"setting": "a", "seed": 0, "threshold": None}).items()


def test_the_report_as_json_is_documented() -> None:
    """Every key of a run, and no other, has a row with its unit in docs/metrics.md."""
    text = (Path(__file__).parents[4] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| ", text[text.index("| of a run | unit |") :], re.MULTILINE)
    named = [name for keys, _ in rows for name in re.findall(r"`(\w+)`", keys)]
    (made,) = document([Run(Path("a"), {}, {}, [], None, [])])["runs"]
    assert sorted(named) == sorted(made)


STEPS = range(10, 60, 10)


def drawn_lines(seed: int) -> list[dict[str, Any]]:
    """Lines with random losses, at equal steps for all seeds."""
    losses, lines = np.random.default_rng(seed).random(len(STEPS)), []
    for step, loss in zip(STEPS, losses.tolist(), strict=True):
        moved = {"payload": step * 1000, "sent": step * 1000 + seed, "received": 0, "seconds": step + seed / 2}
        lines.append({"step": step, "epoch": step / 10, "loss": loss, "grad_norm": 0.1, "resets": 0, **moved})
    return lines


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_curves_and_settings_equal_numpy(tmp_path: Path) -> None:
    """Of three seeds, one of which is not finished and without tests, and of a lone seed."""
    made = [drawn_lines(seed) for seed in range(3)]
    for lines in made[:2]:
        lines[1]["test_loss"], lines[4]["test_loss"] = 0.5, 0.25
    for seed, lines in enumerate(made):
        make_run(tmp_path / "three" / str(seed), "three", lines, seed=seed, done=seed < 2)
    make_run(tmp_path / "lone", "lone", made[0])
    write_report(read_runs([tmp_path]), tmp_path / "report")
    rows = [r for r in rows_of(tmp_path / "report" / "curves.csv") if r["setting"] == "three"]
    losses = np.array([[entry["loss"] for entry in lines] for lines in made])
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
    made = [drawn_lines(seed) for seed in (0, 1)]
    found = settings(read_runs([make_run(tmp_path / str(i), "a", lines, seed=i) for i, lines in enumerate(made)]))
    means, x = np.mean([[entry["loss"] for entry in lines] for lines in made], axis=0), np.array([*STEPS])
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
