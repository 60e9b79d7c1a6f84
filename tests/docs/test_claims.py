"""Numbers in the docs that are cheap to measure again, or to compute from the rows of an experiment."""

import csv
import re
from pathlib import Path
from statistics import fmean, mean

import torch
from stored_rows import at_best_rate, read

from packsaddle import SketchTopK, TopK

DOCS = Path(__file__).parents[2] / "docs"
D, K = 20_011, 50


def planted(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a vector of small Gaussians with K large coordinates, and where those are."""
    rng = torch.Generator().manual_seed(seed)
    v, at = 0.01 * torch.randn(D, generator=rng), torch.randperm(D, generator=rng)[:K]
    v[at] = 100 * torch.where(torch.rand(K, generator=rng) < 0.5, -1.0, 1.0)
    return v, at


def test_what_sketch_topk_finds() -> None:
    """compressors.md says how many of planted heavy hitters it finds."""
    said = re.search(r"`SketchTopK\(k=50\)` finds (\d+) to (\d+) \(20 seeds", (DOCS / "compressors.md").read_text())
    assert said, "compressors.md says how many are found"
    found = []
    for seed in range(20):
        v, at = planted(seed)
        found.append(int((SketchTopK(k=K)(v, seed=seed)[at] != 0).sum()))
        assert int((TopK(k=K)(v)[at] != 0).sum()) == K
    assert (min(found), max(found)) == tuple(map(int, said.groups()))


def muon(setting: str, *, seeds: str = "012") -> dict[str, tuple[float, float]]:
    """Return the mean loss over seeds at the best rate of seed 0, and the kB a step, of each method."""
    rows = [row for row in read(DOCS.parent / "experiments" / "muon" / f"{setting}.csv") if row["seed"] in seeds]
    found = {method: at_best_rate(rows, method) for method in {row["method"] for row in rows if row["seed"] == "0"}}
    return {method: (mean(losses), sent) for method, (losses, sent) in found.items()}


def kilobytes(sent: float) -> str:
    return f"{sent:,.0f}" if sent > 1000 else f"{sent:.1f}"


def test_local_updates_of_muon() -> None:
    """The guide's table, and the bytes on the front pages, are those of the rows."""
    methods = {
        "AdamW, dense gradients, every step": "AdamW, dense, beta1 0.8",
        "AdamW, `LocalUpdates`, every 8, 1 bit (the default)": "AdamW, local 8, Sign, mean momentum 0.5",
        "AdamW, `LocalUpdates`, every 2, 1 bit": "AdamW, local 2, Sign, mean momentum 0.5",
        "Muon and AdamW, dense gradients, every step": "Muon, dense",
        "Muon and AdamW, `LocalUpdates`, every 8, `Rounded()`, 2 bits": "Muon, local 8, Rounded int2",
        "Muon and AdamW, `LocalUpdates`, every 8, 1 bit (the default)": "Muon, local 8, Sign",
    }
    four, two = muon("char-w4"), muon("gpt-w2")
    guide = (DOCS / "local-updates.md").read_text()
    for name, method in methods.items():
        (line,) = [line for line in guide.splitlines() if line.startswith(f"| {name} |")]
        cells = [cell.strip() for cell in line.split("|")[2:6]]
        expected = [text for loss, sent in (four[method], two[method]) for text in (kilobytes(sent), f"{loss:.3f}")]
        assert cells == expected, name
    # What a mean momentum gains with AdamW, and loses with Muon.
    sign, mixed = "local 8, Sign", "local 8, Sign, mean momentum 0.5"
    first = muon("char-w4", seeds="0")
    said = r"loss of ([\d.]+) with it and of ([\d.]+) without it.*?loss \(([\d.]+), and ([\d.]+) without it, seed 0"
    gain = re.search(said, re.sub(r"\s+", " ", guide))
    assert gain
    losses = [four[f"AdamW, {how}"][0] for how in (mixed, sign)] + [first[f"Muon, {how}"][0] for how in (mixed, sign)]
    assert list(gain.groups()) == [f"{loss:.3f}" for loss in losses]


def test_all_methods_inside_muon_and_adamw() -> None:
    """In the card's table of all methods each cell is a mean over seeds, with their number if they are fewer than 3."""
    folder = DOCS.parent / "experiments" / "muon"
    card = (folder / "README.md").read_text()
    header, _, *table = card[card.index("| | of dense | Muon, char-w4 |") :].split("\n\n")[0].splitlines()
    assert len(table) == 15
    columns = [cell.strip().split(", ") for cell in header.split("|")[3:-1]]
    dense = muon("char-w4")["Muon, dense"][1]
    for line in table:
        method, share, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        sent = muon("char-w4")[f"Muon, {method}"][1]
        assert share == (f"1/{dense / sent:.0f}" if sent < 0.99 * dense else "1"), method
        for (inner, setting), cell in zip(columns, cells, strict=True):
            name = f"{inner}, {method}" + ", beta1 0.8" * (f"{inner}, {method}" == "AdamW, dense")
            rows = [row for row in read(folder / f"{setting}.csv") if row["method"] == name]
            losses = at_best_rate(rows, name)[0] if rows else []
            few = f" ({len(losses)})" if len(losses) < 3 else ""
            assert cell == (f"{fmean(losses):.3f}{few}" if losses else ""), (method, inner, setting)


def test_workers_of_unequal_speeds() -> None:
    """The tables of the guide and the card are means of three runs, in which paces reach 95% and 93% of all speeds."""
    folder = DOCS.parent / "experiments" / "pace"
    guide, card = (DOCS / "unequal-speeds.md").read_text(), (folder / "README.md").read_text()
    with (folder / "speeds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for speeds, way in {(row["speeds"], row["way"]) for row in rows}:
        runs = [row for row in rows if (row["speeds"], row["way"]) == (speeds, way)]
        assert len(runs) == 3
        of_the_sum = [float(row["of_the_sum"]) for row in runs]
        percent, rate = f"{fmean(of_the_sum):.1%}", fmean(float(row["examples_a_second"]) for row in runs)
        cells = [way, runs[0]["steps_in_a_round"].replace(" ", ", "), f"{rate:.1f}", percent]
        assert f" | {' | '.join(cells)} |" in card
        assert way == "without exchanges" or percent in guide
        assert way == "without exchanges" or f"{min(of_the_sum):.1%} to {max(of_the_sum):.1%}" in card
        assert way != "paces" or min(of_the_sum) >= (0.95 if speeds == "1 0.333333" else 0.93)
