"""The report's page, figures and CSVs over seeds: what they show, and that nothing in them runs or loads."""

import csv
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lab.runs.report import write_report
from lab.runs.report.curves import curve
from lab.runs.report.figures import inline_svg, thinned
from lab.runs.report.settings import estimate, settings
from lab.runs.run_folder import RunFolder, read_runs
from packsaddle.cli.folders import make_new
from packsaddle.messages import printable

NASTY = "</script><script>alert(1)</script><a href='https://evil.example/'>x</a>\u2028%{x} $a_b$ \"quoted\""
STEPS = range(10, 60, 10)
NAMES, TESTS = ("training loss", "stochastic gradient norm"), ("test loss", "test accuracy")
AXES = ("megabytes per worker", "epochs", "steps", "seconds")


def make_run(folder: Path, label: str, seed: int, *, done: bool = True, **lines: list[float]) -> dict[str, list[float]]:
    """Write a run; returns its losses and gradient norms, or those given."""
    rng = np.random.default_rng(seed)
    values = {"loss": rng.random(len(STEPS)).tolist(), "grad_norm": rng.random(len(STEPS)).tolist()} | lines
    run = RunFolder(folder)
    make_new(run.path)
    task = {"model": {"name": "autoencoder"}, "data": {"name": "digits"}}
    run.write_json("config.json", {"label": label, "seed": seed, "plateau": 0.1, **task})
    began = {"workers": 2 + seed, "started": f"2026-11-{20 + seed}T23:59:59+00:00"}
    run.write_json("environment.json", {"torch": "2", "command": f"python -m lab run {label}", **began})
    for i, step in enumerate(STEPS):
        moved = {"payload": step * 1000, "sent": step * 1000 + seed, "received": 0, "seconds": step + seed / 2}
        run.append("metrics.jsonl", {"step": step, "epoch": step / 10, "resets": 0, **moved, **measured(values, i)})
    if done:
        run.write_json(
            "summary.json", {"final_loss": values["loss"][-1], "compression": 40.0 + seed, "parameters": 1234}
        )
    return values


def measured(values: dict[str, list[float]], i: int) -> dict[str, float]:
    """Quantities of the i-th line; NaN is not measured, as tests are on some lines only."""
    return {name: v[i] for name, v in values.items() if not (name.startswith("test") and math.isnan(v[i]))}


class Page(HTMLParser):
    """The tags and attributes that a browser would see, and the classes of the marks in each chart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.charts: dict[str, set[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "figure" and "aria-label" in attributes:
            self.charts[str(attributes["aria-label"])] = set()
        if tag == "g" and attributes.get("class"):
            [*self.charts.values()][-1].add(str(attributes["class"]))


Compared = tuple[Path, dict[str, dict[str, list[float]]]]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The folder of a report of three seeds, a lone seed with a nasty label and tests along two runs; their numbers."""
    folder = tmp_path_factory.mktemp("compared")
    tests = {"test_loss": [math.nan, 0.5, math.nan, math.nan, 0.25], "test_accuracy": [math.nan, 0.5, *[math.nan] * 3]}
    made = {
        "a0": make_run(folder / "runs" / "a" / "seed-0", "three", 0, **tests),
        "a1": make_run(folder / "runs" / "a" / "seed-1", "three", 1, **tests),
        "a2": make_run(folder / "runs" / "a" / "seed-2", "three", 2, done=False),
        "b0": make_run(folder / "runs" / "b" / "seed-0", NASTY, 0, grad_norm=[0.0] * 5),
    }
    write_report(read_runs([folder]), folder / "report")
    return folder, made


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.xdist_group("compared")
def test_curves_and_settings_equal_numpy(compared: Compared) -> None:
    folder, made = compared
    rows = [r for r in rows_of(folder / "report" / "curves.csv") if r["setting"] == "three"]
    losses = np.array([made[name]["loss"] for name in ("a0", "a1", "a2")])
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
    first, lone = rows_of(folder / "report" / "settings.csv")
    half = stats.t.ppf(0.975, 2) * losses[:, -1].std(ddof=1) / math.sqrt(3)
    found = [float(first[f"final_loss{end}"]) for end in ("", "_low", "_high")]
    assert found == pytest.approx([losses[:, -1].mean() + shift for shift in (0, -half, half)])
    assert (first["seeds"], first["unfinished"], first["compression"]) == ("3", "1", "40.5")
    assert (lone["seeds"], lone["final_loss_low"], lone["setting"]) == ("1", "", printable(NASTY))
    assert len(rows_of(folder / "report" / "table.csv")) == 4


@pytest.mark.slow
@pytest.mark.xdist_group("compared")
def test_the_page_shows_settings(compared: Compared) -> None:
    """Titled by its runs, with charts against megabytes first; without a script, a choice hides the other axes."""
    folder, made = compared
    text = (folder / "report" / "index.html").read_text()
    page = Page(text)
    title = "autoencoder on digits, 1,234 parameters, 2 to 4 workers, 2026-11-20 to 2026-11-22"
    assert f"<h1>{title}</h1>" in text
    assert [*page.charts] == [f"{p} against {a}" for p in (*NAMES, *TESTS) for a in AXES]
    assert set(map(frozenset, page.charts.values())) == {frozenset({"setting-0", "setting-1"})}
    for axis in ("epoch", "step", "seconds"):
        assert f"body:has(#against-{axis}:not(:checked)) figure.against-{axis}" in text
    losses = np.array([made[name]["loss"] for name in ("a0", "a1", "a2")])
    half = estimate(losses[:, -1].tolist())
    assert half.high is not None
    assert f"<td>{half.mean:.4f} ± {half.high - half.mean:.4f}</td>" in text
    assert "three (1 of 3 unfinished)" in text
    for seed in (0, 1, 2):
        assert str(folder / "runs" / "a" / f"seed-{seed}") in text


def test_lines_are_the_means_of_the_seeds(tmp_path: Path) -> None:
    """Up to a linear map: linear in epochs, logarithmic in megabytes."""
    made = [make_run(tmp_path / str(seed), "a", seed)["loss"] for seed in (0, 1)]
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


@pytest.mark.slow
@pytest.mark.xdist_group("compared")
def test_the_page_asks_for_nothing(compared: Compared) -> None:
    """It has no script, no tag names an address outside of it, and a policy forbids every request and every script."""
    folder, _ = compared
    page = Page((folder / "report" / "index.html").read_text())
    loading = ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href")
    named = [attributes[a] or "" for _, attributes in page.tags for a in loading if a in attributes]
    assert [address for address in named if not address.startswith("#")] == []
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "img"} == set()
    assert [a for _, attributes in page.tags for a in attributes if a.startswith("on")] == []
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    assert "script" not in policy
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {address.removeprefix("#") for address in named} <= set(ids)
