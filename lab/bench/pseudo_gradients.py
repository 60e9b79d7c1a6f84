"""Which fraction of the energy of AdamW's local updates do TopK and TopK by chunks keep?

    python -m lab.bench.pseudo_gradients [--rounds 25]

A small character transformer on this project's documentation, 8 steps per round, one worker, error feedback; each
compressor has its own error memory and gets the same local updates. One seed: it separates the two, but not 1% from 2%.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from packsaddle import Compressor, TopK
from packsaddle.compressors import describe

CONTEXT, WIDTH, STEPS, BATCH = 64, 128, 8, 8
LAST = 10  # number of last rounds that are averaged
COMPRESSORS: list[Compressor] = [
    TopK(ratio, values="int2", chunk=chunk) for ratio in (1 / 32, 1 / 64) for chunk in (None, 4096)
] + [TopK(1 / 32, values=values, chunk=4096) for values in ("int1", "int3", None)]


class Transformer(nn.Module):
    """Two blocks with a causal mask."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.out = nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x) + self.position.weight
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.out(hidden)
        return logits


def share(v: Tensor, kept: Tensor) -> float:
    return float(1 - (v - kept).square().sum() / v.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    text = "".join(p.read_text() for p in sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
    characters = sorted(set(text))
    codes = torch.tensor([characters.index(c) for c in text])
    model = Transformer(len(characters))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    inner, rng = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99)), torch.Generator().manual_seed(1)

    def flat() -> Tensor:
        return torch.cat([p.detach().flatten() for p in matrices])

    errors = [torch.zeros_like(flat()) for _ in COMPRESSORS]
    of_moved: list[list[float]] = [[] for _ in COMPRESSORS]
    of_corrected: list[list[float]] = [[] for _ in COMPRESSORS]
    for _ in range(rounds):
        anchor = flat()
        for _ in range(STEPS):
            start = torch.randint(len(codes) - CONTEXT - 1, (BATCH,), generator=rng)
            x = torch.stack([codes[i : i + CONTEXT + 1] for i in start.tolist()])
            inner.zero_grad()
            nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
            inner.step()
        moved = anchor - flat()
        for i, c in enumerate(COMPRESSORS):
            v = errors[i] + moved
            kept = c(v)
            of_moved[i].append(share(moved, c(moved)))
            of_corrected[i].append(share(v, kept))
            errors[i] = v - kept
    print(f"d = {len(anchor):,}, {rounds} rounds; kept of D, and of e + D in the last {LAST}")
    for c, d, v in zip(COMPRESSORS, of_moved, of_corrected, strict=True):
        print(f"{describe(c):55}{mean(d):8.2%}{mean(v[-LAST:]):8.2%}")


if __name__ == "__main__":
    main()
