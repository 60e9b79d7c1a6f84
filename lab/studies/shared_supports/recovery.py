"""How many of planted heavy hitters SketchTopK finds at its defaults; TopK of the same vector finds all of them.

    python -m lab.studies.shared_supports.recovery recovery.csv

A vector of d independent N(0, 1) coordinates, to k of which +-c ||noise|| / sqrt(k) is added, so that at c = 1 they
have together the noise's energy; "mixed" draws each coordinate's c from 1 to 10^4, log-uniformly. Found is a planted
coordinate that is kept. Bytes are those of the two all-reduces' payloads, beside the d float32 of a dense one.
"""

import csv
import math
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from packsaddle import SketchTopK

SIZES = [(20_011, 50, 200), (1_000_000, 200, 200), (1_000_000, 1_000, 20), (10_000_000, 1_000, 10)]  # d, k, seeds
MAGNITUDES = [1.0, 10.0, 100.0, 1e4, "mixed"]


def planted(d: int, k: int, magnitude: float | str, seed: int) -> tuple[Tensor, Tensor]:
    """Return a vector, float[d], and where its heavy coordinates are, int64[k]."""
    rng = torch.Generator().manual_seed(seed)
    v, at = torch.randn(d, generator=rng), torch.randperm(d, generator=rng)[:k]
    c = torch.full((k,), magnitude) if isinstance(magnitude, float) else 10 ** (4 * torch.rand(k, generator=rng))
    signs = torch.where(torch.rand(k, generator=rng) < 0.5, -1.0, 1.0)
    v[at] += signs * c * float(v.norm()) / math.sqrt(k)
    return v, at


def rows() -> Iterator[dict[str, object]]:
    for d, k, seeds in SIZES:
        compressor = SketchTopK(k=k)
        r, columns, candidates = compressor.shape(d)
        for magnitude in MAGNITUDES:
            start, found = time.perf_counter(), []
            for seed in range(seeds):
                v, at = planted(d, k, magnitude, seed)
                kept = compressor.encode(v, seed=seed, step=0)
                found.append(float(torch.isin(at, compressor.support_of(kept, d)).double().mean()))
            yield {
                "d": d,
                "k": k,
                "magnitude": magnitude if isinstance(magnitude, str) else f"{magnitude:g}",
                "seeds": seeds,
                "rows": r,
                "columns": columns,
                "candidates": candidates,
                "found_mean": f"{sum(found) / seeds:.4f}",
                "found_least": f"{min(found):.4f}",
                "bytes_of_dense": f"{compressor.message_bytes(d) / (4 * d):.4f}",
                "seconds_a_seed": f"{(time.perf_counter() - start) / seeds:.3f}",
            }


def main(path: str) -> None:
    torch.set_num_threads(1)
    with open(path, "w", newline="") as file:
        writer = None
        for row in rows():
            writer = writer or csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
