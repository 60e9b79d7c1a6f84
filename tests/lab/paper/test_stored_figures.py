"""The committed figures are those of the committed curves, and the cards say what the summaries say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lab.paper.results import digest, save_figure
from lab.paper.studies import REPRODUCTIONS
from lab.runs.report.curves import Curve, read_curves

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
STORED = {path.parent.name: json.loads(path.read_text()) for path in sorted(EXPERIMENTS.glob("*/summary.json"))}
DRAWN = [name for name, summary in STORED.items() if REPRODUCTIONS[summary["study"]].draw]
# Mean difference of grey levels, of 255: another version of matplotlib moves letters by a pixel or so.
TOLERANCE = 0.5


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), dtype=float)


def source(path: Path) -> str:
    """The hash that a figure says its curves have."""
    with Image.open(path) as image:
        return str(image.info["Source"])


def difference(one: Path, other: Path) -> float:
    a, b = map(grey, (one, other))
    height, width = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    assert abs(a.shape[0] - b.shape[0]) <= 4
    assert abs(a.shape[1] - b.shape[1]) <= 4
    return float(np.abs(a[:height, :width] - b[:height, :width]).mean())


def redraw(name: str, curves: list[Curve]) -> Any:
    draw = REPRODUCTIONS[STORED[name]["study"]].draw
    assert draw is not None
    return draw(curves)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_rebuilt_from_its_stored_curves(name: str, tmp_path: Path) -> None:
    """And the comparison can fail: one setting's curve in another's place is another figure."""
    stored = EXPERIMENTS / name / "figure.png"
    first, second, *others = read_curves(EXPERIMENTS / name / "curves.csv")
    assert source(stored) == digest(EXPERIMENTS / name / "curves.csv")
    here, other = tmp_path / "figure.png", tmp_path / "swapped.png"
    (tmp_path / "curves.csv").write_bytes((EXPERIMENTS / name / "curves.csv").read_bytes())
    save_figure(redraw(name, [first, second, *others]), tmp_path)
    assert difference(stored, here) < TOLERANCE
    swapped = [Curve(first.setting, second.columns), Curve(second.setting, first.columns), *others]
    redraw(name, swapped).savefig(other, dpi=130)
    assert difference(here, other) > TOLERANCE


@pytest.mark.parametrize("name", STORED)
def test_cards_say_what_summaries_say(name: str) -> None:
    summary, card = STORED[name], " ".join((EXPERIMENTS / name / "README.md").read_text().split())
    findings = REPRODUCTIONS[summary["study"]].findings
    for line in findings(summary, read_curves(EXPERIMENTS / name / "curves.csv")) if findings else []:
        assert line in card
    commits = summary["commit"] if isinstance(summary["commit"], list) else [summary["commit"]]
    for commit in commits:
        assert commit in card
        assert not commit.endswith("+"), "runs must come from committed code"
    for entry in summary["settings"]:
        assert f"{entry['final_loss']['mean']:.4f}" in card, entry["setting"]
