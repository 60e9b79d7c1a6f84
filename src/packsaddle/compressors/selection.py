"""Selection of coordinates by magnitude: the k largest, or the fewest that hold a fraction of the energy ||v||^2.

Magnitudes are compared as integers, by their bit patterns: the order is the same and NaN is the largest, so compiled
loops and PyTorch code on the CPU select the same coordinates.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.devices import wide, widened
from packsaddle.numerics.kernels import kernel

_WORTH_SAMPLING = 1 << 18  # elements; `largest` ranks shorter vectors directly, without a sampled threshold
_SAMPLE = 1 << 16
_SLAB = 1 << 18  # elements processed at a time, to bound scratch memory
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
HISTOGRAM_BITS = 12  # leading bits of a magnitude that index a bin: the exponent and the first bits of the mantissa


def as_integers(v: Tensor) -> Tensor:
    """Return the magnitudes of v, float[n], as integers that have the same order as the magnitudes. The integers have
    as many bits as the elements of v."""
    integer = _INTEGER[v.element_size()]
    return v.view(integer) & torch.iinfo(integer).max


def largest(v: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest magnitudes of v, float[n]. The indices are int64[k], in increasing order.

    The CPU selects the first of equal magnitudes. In a long vector it ranks only the elements above a threshold, which
    is estimated from a sample such that slightly more than k elements exceed it. Other devices use torch.topk, which
    does not synchronize but breaks ties in its own way.
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
    """Return the indices of the k largest magnitudes of n values that are generated in blocks. The indices are
    int64[k], in increasing order.

    Each call of `blocks()` yields all n values in order, as consecutive float tensors. It is called several times, so
    that the values need not be stored. `sample(index)` returns the values at the indices `index`, int64[m]. Among equal
    magnitudes, those with indices from `first` on are preferred, in increasing order, and after them those with indices
    from 0 on.
    """
    device = next(iter(blocks())).device
    if device.type != "cpu":
        return (largest(torch.cat(list(blocks())).roll(-first), k) + first).remainder_(n).sort().values
    # Keep only magnitudes that reach a sampled threshold, or all magnitudes if fewer than k reach it.
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
        # The sampled threshold was too high, so keep all magnitudes.
        threshold, expected = 0, n
    # `_top` prefers low positions: rotate the indices from `first` on to the front.
    turn = int((index < first).sum())
    index, magnitudes = index.roll(-turn), magnitudes.roll(-turn)
    return index[_top(magnitudes, k)].sort().values


def _top(magnitudes: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest integers in `magnitudes`, int[n]. The indices are int64[k], in increasing
    order. Among equal integers, the first are selected. CPU only."""
    n = len(magnitudes)
    if k in (0, n):
        return torch.arange(k)
    compared = magnitudes.numpy()  # numpy, since torch.nonzero and masks take ten times as long
    least = np.partition(compared, n - k)[n - k]
    reached = compared >= least
    if surplus := np.count_nonzero(reached) - k:
        reached[np.flatnonzero(compared == least)[-surplus:]] = False
    return torch.from_numpy(np.flatnonzero(reached))


def sampled_threshold(sample: Tensor, k: int, n: int) -> tuple[int, int]:
    """Estimate a threshold that at least k of the magnitudes of n numbers reach. `sample`, float[m], contains m of the
    n numbers. Returns the threshold and the estimated number of magnitudes that reach it. The threshold is an integer,
    to be compared with results of `as_integers`. In rare cases, fewer than k magnitudes reach the threshold."""
    magnitudes = as_integers(sample)
    expected = len(sample) * k / n
    # Add a margin of four standard deviations of the count, and 8 more, since four standard deviations are too small a
    # margin if the expected count is small.
    rank = min(len(sample), math.ceil(expected + 4 * math.sqrt(expected) + 8))
    return int(torch.topk(magnitudes, rank, sorted=False).values.min()), math.ceil(rank * n / len(sample))


def reaching(v: Tensor, threshold: int, expected: int) -> Tensor:
    """Return the indices of v, float[n], whose magnitude is at least `threshold`, an integer to compare with results of
    `as_integers`. `expected` is an estimate of their number."""
    if loop := kernel("reaching", v):
        reached: Tensor = loop(v, threshold, expected)
        return reached
    return (as_integers(v) >= threshold).nonzero().squeeze(1)


def holding(v: Tensor, share: float) -> Tensor:
    """Return the indices of the fewest coordinates of v, float[n], that together have at least the fraction `share` of
    ||v||^2, where `share` is in (0, 1]. The indices are int64[m], in increasing order.

    A histogram of the energy over the leading bits of the magnitudes gives the leading bits of the smallest selected
    magnitude. Histograms of the magnitudes with these leading bits, over their next bits, give the other bits. Among
    equal magnitudes the first are selected. If v is zero, no index is returned. If v is non-finite, only the index of
    its largest magnitude is returned.
    """
    top = max(abs(float(x)) for x in torch.aminmax(v)) if len(v) else 0.0
    if not math.isfinite(top):
        return largest(v, 1)
    # Zeros have no energy and are never selected.
    if top == 0 or share == 1:
        return v.nonzero().squeeze(1)
    # Find the bin of the smallest selected magnitude. All magnitudes above this bin are selected.
    shift = 8 * v.element_size() - 1 - HISTOGRAM_BITS
    counts, energy = _histogram(v, top, shift)
    needed = share * float(energy.sum())
    last, needed = _last_bin(counts, energy, needed)
    threshold = last << shift
    reached = reaching(v, threshold, int(counts[last:].sum()))
    magnitudes = as_integers(v.index_select(0, reached))
    inside = reached[(magnitudes < threshold + (1 << shift)).nonzero().squeeze(1)]
    # Refine the bin to a single magnitude.
    while shift > 0:
        values, below = v[inside], shift
        shift = max(0, shift - HISTOGRAM_BITS)
        bins = (as_integers(values) - threshold) >> shift
        energy = torch.bincount(bins, weights=(widened(values) / top).square_(), minlength=1 << (below - shift))
        last, needed = _last_bin(torch.bincount(bins, minlength=len(energy)), energy, needed)
        threshold += last << shift
        inside = inside[(bins == last).nonzero().squeeze(1)]
    # All coordinates in `inside` now have the same magnitude x. Select the first ceil(needed / x^2) of them, which are
    # enough for the energy `needed`.
    one = float(widened(v[inside[0]]) / top) ** 2
    taken = min(len(inside), max(1, math.ceil(needed / one))) if one else 1
    kept = magnitudes >= threshold
    kept[(magnitudes == threshold).nonzero().squeeze(1)[taken:]] = False
    return reached[kept]


def _last_bin(counts: Tensor, energy: Tensor, needed: float) -> tuple[int, float]:
    """Return the highest bin for which this bin and all bins above it together contain at least the energy `needed`.
    Also returns the part of `needed` that this bin must contribute. Bins are over magnitudes: `counts` has the number
    of elements in each bin, and `energy` the sum of their squares."""
    held = energy.flip(0).cumsum(0)
    # Limit the result to bins that have elements: rounding may make the sum too small, and `needed` may be 0.
    occupied = counts.nonzero()
    last = min(max(len(counts) - 1 - int((held < needed).sum()), int(occupied[0])), int(occupied[-1]))
    return last, needed - float(energy[last + 1 :].sum())


def _histogram(v: Tensor, top: float, shift: int) -> tuple[Tensor, Tensor]:
    """Compute two histograms of v, float[n], whose bins are the values of the leading bits of a magnitude. The first,
    int64[bins], contains the number of elements x in each bin. The second, float[bins], contains the sum of (x / top)^2
    over the elements x in each bin. A bin is the bit pattern of a magnitude, shifted right by `shift` bits."""
    if loop := kernel("energy_histogram", v):
        counts, energy = loop(v, top, HISTOGRAM_BITS)
        return counts, energy
    counts = torch.zeros(1 << HISTOGRAM_BITS, dtype=torch.int64, device=v.device)
    energy = torch.zeros(1 << HISTOGRAM_BITS, dtype=wide(v.device), device=v.device)
    for slab in torch.split(v, _SLAB):
        bins = (as_integers(slab) >> shift).to(torch.int64)
        counts += torch.bincount(bins, minlength=len(counts))
        energy += torch.bincount(bins, weights=(widened(slab) / top).square_(), minlength=len(counts))
    return counts, energy
