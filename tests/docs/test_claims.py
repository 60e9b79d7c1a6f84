"""Numbers in the docs that are cheap to measure again."""

import re
from pathlib import Path

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
