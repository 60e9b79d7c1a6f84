"""The committed figures are those of the committed curves, and the cards say what the summaries say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lab.paper import drawing, figure1, figure2, language
from lab.paper.results import digest, read_curves, save_figure

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
STORED = {path.parent.name: json.loads(path.read_text()) for path in sorted(EXPERIMENTS.glob("*/summary.json"))}
FINDINGS = {**figure1.FINDINGS, **figure2.FINDINGS, **language.FINDINGS}  # by the folders' names
TOLERANCE = 0.5  # mean distance of the curves' points, in points of the figure: versions of matplotlib place axes anew


def points(svg: Path) -> np.ndarray:
    """Return the coordinates of all lines in an SVG that are clipped to a panel, float64[n]."""
    lines = re.findall(r'<path d="M ([^"a-zA-Z]*)" clip-path', svg.read_text())
    return np.array(" ".join(lines).split(), dtype=float)


def distance(one: Path, other: Path) -> float:
    a, b = map(points, (one, other))
    return float(np.abs(a - b).mean()) if a.shape == b.shape else np.inf


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_a_figure_is_rebuilt_from_its_stored_curves(name: str, tmp_path: Path) -> None:
    draw, rows = figure2.draw if name == "figure2" else drawing.grid, EXPERIMENTS / name / "curves.csv"
    stored = [EXPERIMENTS / name / f"figure-{shade}.svg" for shade in ("light", "dark")]
    assert all(f"<dc:source>{digest(rows)}</dc:source>" in svg.read_text() for svg in stored)
    (tmp_path / "curves.csv").write_bytes(rows.read_bytes())
    save_figure(draw(read_curves(rows)), tmp_path)
    assert len(points(tmp_path / "figure-light.svg")) > 500
    for svg in stored:
        assert distance(svg, tmp_path / svg.name) < TOLERANCE
        assert svg.stat().st_size < 160_000


@pytest.mark.parametrize("name", STORED)
def test_cards_say_what_summaries_say(name: str) -> None:
    summary, card = STORED[name], " ".join((EXPERIMENTS / name / "README.md").read_text().split())
    findings = FINDINGS.get(name)
    for line in findings(summary, read_curves(EXPERIMENTS / name / "curves.csv")) if findings else []:
        assert line in card
    commits = summary["commit"] if isinstance(summary["commit"], list) else [summary["commit"]]
    for commit in commits:
        assert commit in card
        assert not commit.endswith("+"), "runs must come from committed code"
    for entry in summary["settings"]:
        assert f"{entry['final_loss']['mean']:.4f}" in card, entry["setting"]
