"""Shares of several sections of a vector in what is chosen among them all, estimated from a sample of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from packsaddle.compressors.selection import holding, largest

_FEWEST = 64  # sampled coordinates that shares rest on; fewer would make them jump


def counts_among_largest(samples: Sequence[Tensor], sizes: Sequence[int], k: int) -> list[float]:
    """Estimate how many of the k largest magnitudes of all sections each section has.

    `samples` are coordinates of each section, float[m], of its `sizes`, in about the same proportion everywhere. Where
    they are all the coordinates it is exact for k of 64 or more; below, it is in proportion to the 64 largest.
    """
    pooled = torch.cat(list(samples))
    rank = min(len(pooled), max(_FEWEST, round(k * len(pooled) / sum(sizes))))
    found = _by_section(largest(pooled, rank), torch.ones_like(pooled[:rank]), samples)
    return [count * size / len(sample) for count, sample, size in zip(found, samples, sizes, strict=True)]


def shares_of_support(samples: Sequence[Tensor], share: float) -> list[float]:
    """Estimate what share of its own energy each section has in the smallest support that holds `share` of all energy.

    `samples` are as in `counts_among_largest`. Each is from 1e-6 to 1; all are `share` if the samples are zero.
    """
    pooled = torch.cat(list(samples)).double()
    energies = (pooled / pooled.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).square()
    index = holding(pooled, share)
    kept = _by_section(index, energies[index], samples)
    totals = _by_section(torch.arange(len(pooled), device=pooled.device), energies, samples)
    return [min(1.0, max(1e-6, k / t if t else share)) for k, t in zip(kept, totals, strict=True)]


def _by_section(index: Tensor, values: Tensor, samples: Sequence[Tensor]) -> list[float]:
    """Sum the values of the pooled coordinates at increasing indices by the section whose sample has them."""
    ends = torch.tensor([len(sample) for sample in samples], device=index.device).cumsum(0)
    section = torch.bucketize(index, ends, right=True)
    sums = torch.zeros(len(samples), dtype=torch.float64, device=index.device)
    found: list[float] = sums.index_add_(0, section, values.double()).tolist()
    return found


def shared_out(weights: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Return whole numbers in proportion to `weights` that add up to `total`, each from 1 to its size.

    Where bounds hold some back, or lift them, the others are in proportion; largest remainders decide on rounding.
    `total` is raised to the number of sizes, if it is below, and lowered to their sum; sizes are at least 1.
    """
    total = min(max(total, len(sizes)), sum(sizes))
    # A little by size, so that weights of zero do not keep the total from being met.
    most = max(weights) or 1.0
    shares = [w / most for w in weights]
    lifted = [w + 1e-9 * (sum(shares) or 1.0) * n / sum(sizes) for w, n in zip(shares, sizes, strict=True)]

    def exact(scale: float) -> list[float]:
        return [min(max(scale * w, 1.0), float(n)) for w, n in zip(lifted, sizes, strict=True)]

    # The scale at which they add up to the total, by bisection: the sum grows with it.
    low, high = 0.0, max(n / w for w, n in zip(lifted, sizes, strict=True))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(exact(middle)) <= total else (low, middle)
    parts = exact(low)
    counts = [int(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
