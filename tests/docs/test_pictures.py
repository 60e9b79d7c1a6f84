"""The pictures of ideas: pages show those that the script draws, readable on a phone, with their sources' numbers."""

import csv
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sphinx")
ROOT = Path(__file__).parents[2]

from lab.docs import pictures  # noqa: E402


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of each file that the script writes, by name."""
    out = tmp_path_factory.mktemp("pictures")
    pictures.write(out)
    return {path.name: path.read_text() for path in out.iterdir()}


def words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def shown() -> set[str]:
    """The files that pages show."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {page: re.findall(r'(?:src|srcset)="([^"]+\.svg)"', page.read_text()) for page in pages}
    files = [(page.parent / path).resolve() for page, paths in found.items() for path in paths]
    assert all(path.exists() for path in files)
    return {path.name for path in files if path.parent == pictures.OUT}


def test_pages_show_what_the_script_draws(drawn: dict[str, str]) -> None:
    assert shown() == set(drawn)


def test_committed_pictures_are_the_drawn_ones(drawn: dict[str, str]) -> None:
    """By their words: matplotlib's versions differ in how they write lines."""
    committed = {path.name: path.read_text() for path in pictures.OUT.iterdir()}
    assert {name: words(svg) for name, svg in committed.items()} == {name: words(svg) for name, svg in drawn.items()}


def test_algorithm_has_the_numbers_of_the_reference(drawn: dict[str, str]) -> None:
    source = (ROOT / "examples" / "reference.py").read_text().partition("    trace = ")[2]
    lines = {int(n) for comment in re.findall(r"# lines? (\d+(?: and \d+)?)", source) for n in comment.split(" and ")}
    assert {int(word) for word in words(drawn["algorithm-light.svg"]) if word.isdigit()} == lines | {14}


def test_bytes_are_those_of_the_race(drawn: dict[str, str]) -> None:
    """The table of the race's card, and the rows of the Muon benchmark, have the same network and workers."""
    card = (ROOT / "experiments" / "race" / "README.md").read_text()
    with (ROOT / "experiments" / "muon" / "gpt-w2.csv").open(newline="") as file:
        muon = {row["method"]: float(row["kB_a_step"]) for row in csv.DictReader(file)}
    expected = [
        re.search(rf"^\| `{re.escape(name)}` \| 600 \| 3 \| [^|]* \| ([\d,.]+) \|", card, re.MULTILINE)
        for name in ("ddp", "QSGD(127) hook=bucket")
    ]
    texts = words(drawn["wire-light.svg"])
    assert all(match and f"{float(match[1].replace(',', '')):,.0f} kB" in texts for match in expected)
    assert f"{muon['Muon, dense']:,.0f} kB" in texts
    assert f"{muon['Muon, local 8, Sign']:,.0f} kB" in texts


def test_certified_intervals_hold_and_decide() -> None:
    """The Hessian of the picture's loss is diagonal: its smallest eigenvalue is -0.5 at 0, and 0.05 at the minimum."""
    point = torch.zeros(pictures.D, dtype=torch.float64)
    at_saddle = pictures.certificate(point)
    point[0] = 0.5**0.5
    at_minimum = pictures.certificate(point)
    assert at_saddle.lambda_min_lower <= -0.5 <= at_saddle.lambda_min_upper < at_saddle.threshold
    smallest = 0.05 + 0.95 / (pictures.D - 1)
    assert at_minimum.threshold < at_minimum.lambda_min_lower <= smallest <= at_minimum.lambda_min_upper
