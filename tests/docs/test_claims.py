"""Numbers in the docs that are cheap to measure again, or to compute from the rows of an experiment."""

import csv
import re
from pathlib import Path
from statistics import mean

import torch

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
    """compressors.md says how many of planted heavy hitters it finds, and choosing.md does not recommend it."""
    said = re.search(r"`SketchTopK\(k=50\)` finds (\d+) to (\d+) \(20 seeds", (DOCS / "compressors.md").read_text())
    assert said, "compressors.md says how many are found"
    found = []
    for seed in range(20):
        v, at = planted(seed)
        found.append(int((SketchTopK(k=K)(v, seed=seed)[at] != 0).sum()))
        assert int((TopK(k=K)(v)[at] != 0).sum()) == K
    assert (min(found), max(found)) == tuple(map(int, said.groups()))
    section = (DOCS / "choosing.md").read_text().partition("## By situation")[2].partition("\n## ")[0]
    taken = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")]
    assert len(taken) > 5
    assert not any("SketchTopK" in cell for cell in taken)


def test_what_local_updates_lose() -> None:
    """evidence.md says by how much, with two and four workers, every 2, 8 and 32 steps."""
    text = (DOCS / "evidence.md").read_text()
    said = re.search(
        r"local updates lose\s+([\d.]+) \(every 2\), ([\d.]+) \(every 8\) and ([\d.]+) \(every 32\), and with "
        r"four workers ([\d.]+), ([\d.]+) and\s+\(`TopK\(1/48\)`\) ([\d.]+)",
        text,
    )
    assert said, "evidence.md says how much is lost"
    with (DOCS.parent / "experiments" / "race" / "curves.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["steps"] == "600" and row["lr"] == "0.002"]

    def loss(workers: int, name: str) -> float:
        mine = [r for r in rows if int(r["workers"]) == workers and r["contender"].removesuffix(" lr=0.002") == name]
        return mean(float(row["losses"].split()[-1]) for row in mine)

    sign, sparse = "Sign(per_tensor=True) every={}", 'TopK(1/48, values="int2") every={}'
    for workers, kinds, numbers in (
        (2, (sign, sign, sign), said.groups()[:3]),
        (4, (sign, sign, sparse), said.groups()[3:]),
    ):
        for kind, every, number in zip(kinds, (2, 8, 32), numbers, strict=True):
            lost = loss(workers, kind.format(every)) - loss(workers, "ddp")
            assert float(number) == round(lost, 2), (workers, every, lost)
