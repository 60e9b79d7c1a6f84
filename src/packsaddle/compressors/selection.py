"""Choosing coordinates by magnitude: the k largest, and the fewest that hold a fraction of the energy.

Magnitudes are compared as the integers of their bits, which have the same order and in which NaN is the largest, so
every way of choosing gives the same coordinates. How a choice among several sections divides between them is estimated
from a sample of each.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels import kernel

_WORTH_SAMPLING = 1 << 18  # elements from which `largest` samples
_SAMPLE = 1 << 16
_SLAB = 1 << 18  # elements at a time, so that scratch memory does not grow with d
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FEWEST = 64  # sampled coordinates that shares rest on; fewer would make them jump
HISTOGRAM_BITS = 12  # of a magnitude, from the top: its exponent and the first bits of its mantissa


def as_integers(v: Tensor) -> Tensor:
    """Return the magnitudes of v, float[n], as integers in the same order, int[n] of as many bits."""
    integer = _INTEGER[v.element_size()]
    return v.view(integer) & torch.iinfo(integer).max


def largest(v: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest magnitudes, increasing int64[k]; of equal ones the first are taken.

    On the CPU a strided sample gives a threshold that a few more than k are expected to reach, and only these are
    ranked. Where fewer do, because the sample misleads, all are. Elsewhere it is torch.topk's choice, which nothing
    waits for.
    """
    if v.device.type != "cpu":
        return torch.topk(v.abs(), k, sorted=False).indices.sort().values
    n = v.numel()
    if n < _WORTH_SAMPLING or not 0 < k < n // 4:
        return _top(as_integers(v), k)
    reached = reaching(v, *sampled_threshold(v[:: n // _SAMPLE], k, n))
    if len(reached) < k:
        return _top(as_integers(v), k)
    return reached.index_select(0, _top(as_integers(v.index_select(0, reached)), k))


def largest_of_blocks(
    blocks: Callable[[], Iterable[Tensor]], sample: Callable[[Tensor], Tensor], n: int, k: int, first: int = 0
) -> Tensor:
    """Return `largest` of the n values in `blocks()`, on the CPU without holding them all.

    `sample` returns the values at given indices. Of equal magnitudes the first are chosen, counted from index `first`
    on and then from 0.
    """
    device = next(iter(blocks())).device
    if device.type != "cpu":
        return (largest(torch.cat(list(blocks())).roll(-first), k) + first).remainder_(n).sort().values
    # Hold only magnitudes that reach a sampled threshold; all of them if fewer than k do.
    threshold, expected = sampled_threshold(sample(torch.arange(0, n, max(1, n // _SAMPLE))), k, n)
    while True:
        start, found, values = 0, [], []
        for block in blocks():
            reached = reaching(block, threshold, -(-expected * len(block) // n))
            found.append(reached + start)
            values.append(block[reached])
            start += len(block)
        index, magnitudes = torch.cat(found), as_integers(torch.cat(values))
        if len(index) >= k:
            break
        threshold, expected = 0, n  # the sample misled
    # `_top` prefers the front: rotate those from `first` on to it.
    turn = int((index < first).sum())
    index, magnitudes = index.roll(-turn), magnitudes.roll(-turn)
    return index[_top(magnitudes, k)].sort().values


def _top(magnitudes: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest integers, on the CPU, increasing int64[k]; of equal ones the first."""
    n = len(magnitudes)
    if k in (0, n):
        return torch.arange(k)
    least = int(np.partition(magnitudes.numpy(), n - k)[n - k])
    kept = (magnitudes >= least).nonzero().squeeze(1)
    return _without_last_equal(kept, magnitudes[kept] == least, len(kept) - k)


def _without_last_equal(kept: Tensor, equal: Tensor, surplus: int) -> Tensor:
    """Drop the last `surplus` of those that are marked."""
    if surplus == 0:
        return kept
    places = equal.nonzero().squeeze(1)
    stays = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
    stays[places[len(places) - surplus :]] = False
    return kept[stays]


def sampled_threshold(sample: Tensor, k: int, n: int) -> tuple[int, int]:
    """Return a magnitude, as an integer, that k of the n values that were sampled should reach, and how many will."""
    magnitudes = as_integers(sample)
    expected = len(sample) * k / n
    # Four standard deviations, and something where so few are expected.
    rank = min(len(sample), math.ceil(expected + 4 * math.sqrt(expected) + 8))
    return int(torch.topk(magnitudes, rank, sorted=False).values.min()), math.ceil(rank * n / len(sample))


def reaching(v: Tensor, threshold: int, expected: int) -> Tensor:
    """Return the indices, increasing int64, whose magnitude as an integer is at least `threshold`."""
    if loop := kernel("reaching", v):
        reached: Tensor = loop(v, threshold, expected)
        return reached
    return (as_integers(v) >= threshold).nonzero().squeeze(1)


def holding(v: Tensor, share: float) -> Tensor:
    """Return the fewest indices, increasing int64, that hold a fraction of ||v||^2, in (0, 1]; none if v is zero.

    A histogram of the energy by the first bits of the magnitudes gives the bin of the smallest chosen one; histograms
    of that bin by the next bits narrow it down, until all bits are known. Of equal magnitudes the first are chosen.
    Returns the index of the largest magnitude alone if v is non-finite.
    """
    top = max((abs(float(x)) for x in torch.aminmax(v)), default=0.0) if len(v) else 0.0
    if not math.isfinite(top):
        return largest(v, 1)
    # Zeros hold no energy: none of them for a zero v, or for all of ||v||^2.
    if top == 0 or share == 1:
        return v.nonzero().squeeze(1)
    # The bin of the smallest chosen magnitude; all magnitudes above it are chosen.
    shift = _bits(v) - HISTOGRAM_BITS
    counts, energy = _histogram(v, top, shift)
    needed = share * float(energy.sum())
    last, needed = _last_bin(counts, energy, needed)
    threshold = last << shift
    reached = reaching(v, threshold, int(counts[last:].sum()))
    magnitudes = as_integers(v.index_select(0, reached))
    inside = reached[(magnitudes < threshold + (1 << shift)).nonzero().squeeze(1)]
    # Narrow the bin down to one magnitude.
    while shift > 0:
        values, below = v[inside], shift
        shift = max(0, shift - HISTOGRAM_BITS)
        bins = (as_integers(values) - threshold) >> shift
        energy = torch.bincount(bins, weights=(values.double() / top).square_(), minlength=1 << (below - shift))
        last, needed = _last_bin(torch.bincount(bins, minlength=len(energy)), energy, needed)
        threshold += last << shift
        inside = inside[(bins == last).nonzero().squeeze(1)]
    # Of the coordinates that have it, the first ceil(needed / x^2) suffice.
    one = float(v[inside[0]].double() / top) ** 2  # all inside are now of one magnitude
    taken = min(len(inside), max(1, math.ceil(needed / one))) if one else 1
    kept = (magnitudes >= threshold).nonzero().squeeze(1)
    return reached[_without_last_equal(kept, magnitudes[kept] == threshold, len(inside) - taken)]


def _last_bin(counts: Tensor, energy: Tensor, needed: float) -> tuple[int, float]:
    """Return the first bin from the top with which the energy needed is held, and what is needed of that bin's."""
    held = energy.flip(0).cumsum(0)
    occupied = counts.nonzero()  # rounding may leave the sum below what is needed, or nothing needed
    last = min(max(len(counts) - 1 - int((held < needed).sum()), int(occupied[0])), int(occupied[-1]))
    return last, needed - float(energy[last + 1 :].sum())


def _bits(v: Tensor) -> int:
    return 8 * v.element_size() - 1


def _histogram(v: Tensor, top: float, shift: int) -> tuple[Tensor, Tensor]:
    """Return how many magnitudes, and how much of ||v / top||^2, lie in each bin, int64 and float64."""
    if loop := kernel("energy_histogram", v):
        counts, energy = loop(v, top, HISTOGRAM_BITS)
        return counts, energy
    counts = torch.zeros(1 << HISTOGRAM_BITS, dtype=torch.int64, device=v.device)
    energy = torch.zeros(1 << HISTOGRAM_BITS, dtype=torch.float64, device=v.device)
    for slab in torch.split(v, _SLAB):
        bins = (as_integers(slab) >> shift).to(torch.int64)
        counts += torch.bincount(bins, minlength=len(counts))
        energy += torch.bincount(bins, weights=(slab.double() / top).square_(), minlength=len(counts))
    return counts, energy


def counts_among_largest(samples: Sequence[Tensor], sizes: Sequence[int], k: int) -> list[float]:
    """Estimate each section's number of coordinates among the k largest magnitudes of all sections.

    `samples` are coordinates of each section, float[m], in about equal proportion to its size in `sizes`. Exact if they
    are all coordinates and k is at least 64; for a smaller k, proportional to the numbers among the 64 largest.
    """
    pooled = torch.cat(list(samples))
    rank = min(len(pooled), max(_FEWEST, round(k * len(pooled) / sum(sizes))))
    found = _by_section(largest(pooled, rank), torch.ones_like(pooled[:rank]), samples)
    return [count * size / len(sample) for count, sample, size in zip(found, samples, sizes, strict=True)]


def shares_of_support(samples: Sequence[Tensor], share: float) -> list[float]:
    """Estimate the fraction of each section's energy in the smallest support that holds `share` of all energy.

    `samples` are as in `counts_among_largest`. Fractions are from 1e-6 to 1; all are `share` if the samples are zero.
    """
    pooled = torch.cat(list(samples)).double()
    energies = (pooled / pooled.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).square()
    index = holding(pooled, share)
    kept = _by_section(index, energies[index], samples)
    totals = _by_section(torch.arange(len(pooled), device=pooled.device), energies, samples)
    return [min(1.0, max(1e-6, k / t if t else share)) for k, t in zip(kept, totals, strict=True)]


def _by_section(index: Tensor, values: Tensor, samples: Sequence[Tensor]) -> list[float]:
    """Return the sum of the values in each section; `index` locates them in the pooled samples, increasing."""
    ends = torch.tensor([len(sample) for sample in samples], device=index.device).cumsum(0)
    section = torch.bucketize(index, ends, right=True)
    sums = torch.zeros(len(samples), dtype=torch.float64, device=index.device)
    found: list[float] = sums.index_add_(0, section, values.double()).tolist()
    return found


def shared_out(weights: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Return integers that add up to `total`, in proportion to `weights` except where the bounds 1 and size apply.

    Fractions are rounded by largest remainders. `total` is clamped to the sums of the bounds; sizes are at least 1.
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
