"""Random numbers as pure functions of (seed, step): there is no generator state to store, resume or synchronize.

A *shared* stream is identical on every worker (the noise xi_t of Algorithm 1, the compressor's randomness); a *private*
stream also depends on the worker (the order of its batches). Global random state is never read or written.

Counter-based numbers are functions of a counter and a key, so any range of a sequence can be computed alone. A random
word is the 32-bit counter, hashed twice (a multiply-xorshift permutation with low bias, found by Chris Wellons's
search, https://github.com/skeeto/hash-prospector). A key is added before each of the two hashes, so that the sequences
of different keys do not overlap as shifted copies. Normal numbers are computed by the Box-Muller transform in float32.
A sequence repeats after 2^32 words, or 2^33 normal numbers.
"""

import math
import operator
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from packsaddle.numerics.devices import indices_where, to_device
from packsaddle.numerics.kernels import kernel

_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 6
# Up to this n a Feistel network has too few bits to mix well, and drawing the whole permutation is cheap.
_SMALL_DOMAIN = 4096


class Stream(IntEnum):
    """The purpose of random numbers; two streams of one (seed, step) are independent."""

    SUPPORT = 1  # cells of coordinates that RandomK keeps
    NOISE = 2  # noise xi_t that is added to gradients
    SKETCH = 3  # sketches of norms and compressors, and LowRank's Gaussian Q
    BATCH = 4  # order of a worker's examples
    SHARD = 5  # assignment of examples to workers
    INIT = 6  # initial parameters x_0
    ROUNDING = 7  # stochastic rounding
    CERTIFY = 8  # start vectors and examples for certifying a stationary point
    ITERATES = 9  # selection of the iterates of a run to certify
    OUTSTANDING = 10  # noise that is applied to the parameters x later than its step; drawn when it is applied
    # Noise that is not applied to x yet, drawn to read the error memory e, or y = x - eta e with the learning rate eta.
    SETTLED = 11
    PROJECTION = 12  # SharedTopK's projections of blocks


def mix(*words: int) -> int:
    """Hash integers to 64 bits (chained splitmix64 finalizers); identical on every platform."""
    state = 0
    for word in words:
        state = (state + (operator.index(word) & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def as_seed(seed: int) -> int:
    """Convert an integer `seed`, such as numpy.int64, to int. Raises ValueError for any other type, including bool."""
    try:
        if isinstance(seed, bool):
            raise TypeError
        return operator.index(seed)
    except TypeError:
        raise ValueError(f"seed must be an integer, got {seed!r}") from None


def generator(
    seed: int, step: int, stream: Stream, *, worker: int | None = None, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a torch.Generator on `device`, seeded by (seed, step, stream) and, if given, by `worker`."""
    private = () if worker is None else (worker + 1,)
    # PyTorch's CPU generator uses 32 bits of a seed, the CUDA generator 63: pass 32 bits to both.
    return torch.Generator(device).manual_seed(mix(seed, step, int(stream), *private) >> 32)


def sample_without_replacement(n: int, k: int, *, seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """Return k distinct random integers from [0, n), int64[k]. Each of the n integers is included with probability
    exactly k/n.

    A keyed permutation of [0, n) is evaluated at 0..k-1, in O(k) time and memory for any n and in integer arithmetic,
    so the result is identical on every device. The permutation is a Feistel network on the next power of two, iterated
    until the result is below n (cycle walking), followed by a uniform rotation, which makes the probabilities exact.
    For n up to 4096 the permutation is drawn by torch.randperm. If k is n, the result is 0, 1, ..., n - 1.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k must be in [0, n = {n}], got {k}")
    if k == n:
        return torch.arange(n, device=device)
    if n <= _SMALL_DOMAIN:
        # Draw on the CPU, since CPU and CUDA generators give different numbers.
        return to_device(torch.randperm(n, generator=generator(seed, step, Stream.SUPPORT))[:k], device)
    keys = [mix(seed, step, int(Stream.SUPPORT), r) for r in range(_FEISTEL_ROUNDS + 1)]
    bits = (n - 1).bit_length()
    if loop := kernel("feistel_sample"):
        permuted: Tensor = loop(n, k, bits, keys).add_(keys[-1] % n).remainder_(n)
        return to_device(permuted, device)  # cycle walking on a GPU would synchronize
    index = _feistel(torch.arange(k, device=device), bits, keys)
    if index.device.type != "cpu":
        _walk(index, n, bits, keys)
    outside = (index >= n).nonzero().squeeze(1)
    while len(outside):
        walked = _feistel(index[outside], bits, keys)
        index[outside] = walked
        outside = outside[walked >= n]
    return index.add_(keys[-1] % n).remainder_(n)


def _walk(index: Tensor, n: int, bits: int, keys: list[int]) -> None:
    """Apply the permutation `_feistel` repeatedly to the numbers in `index`, int64[k], that are n or larger. Changes
    `index` in place. At the end the expected count of numbers that are n or larger is below 1/16. The caller must
    permute those that remain.

    How many numbers are n or larger is not read after each application, since the host would wait for a GPU. It is
    estimated instead, with a margin of six standard deviations.
    """
    outside = torch.arange(len(index), device=index.device)
    expected = float(len(index))
    while expected > 1 / 16:
        expected *= 1 - n / (1 << bits)
        most = min(len(outside), math.ceil(expected + 6 * math.sqrt(expected) + 8))
        outside = outside[indices_where(index[outside] >= n, most)]
        here = index[outside]
        index[outside] = torch.where(here >= n, _feistel(here, bits, keys), here)


def _feistel(x: Tensor, bits: int, keys: list[int]) -> Tensor:
    """Apply a Feistel network, i.e. a keyed permutation of the integers below 2^bits, to each number in x, int64[k].
    Each round XORs one half of the bits with a keyed hash of the other half."""
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    low, high = x & low_mask, x >> low_bits
    for r in range(_FEISTEL_ROUNDS):
        if r % 2:
            low = low ^ (_round(high, keys[r]) & low_mask)
        else:
            high = high ^ (_round(low, keys[r]) & high_mask)
    return (high << low_bits) | low


def _round(half: Tensor, key: int) -> Tensor:
    """Hash the int64 numbers in `half` to 32 bits with the key `key`. Products wrap modulo 2^64, and shifts are masked
    to be logical."""
    h = (half + _signed(key, 64)) * _signed(0x9E3779B97F4A7C15, 64)
    h = (h ^ ((h >> 32) & 0xFFFFFFFF)) * _signed(0xD6E8FEB86659FD93, 64)
    return (h >> 32) & 0xFFFFFFFF


_PAIRS = 1024  # the normal numbers 2048 c + i and 2048 c + 1024 + i, i < 1024, come from counter 1024 c + i
_SLAB = 64 * 2 * _PAIRS  # numbers generated at a time, to bound scratch memory


class Keys(NamedTuple):
    """Three 32-bit keys of a counter-based sequence of random words. Two words are computed from each counter. Each
    word is hashed in two rounds: both words have the same key in the first round, and different keys in the second."""

    first: int
    second: int
    third: int


def keys(seed: int, step: int, stream: Stream) -> Keys:
    return Keys(*(mix(seed, step, int(stream), i) >> 32 for i in range(3)))


def words(counters: Tensor, key: Keys) -> Tensor:
    return _mixed(_mixed(counters * _signed(0x9E3779B1) + _signed(key.first)) + _signed(key.second))


def _mixed(h: Tensor) -> Tensor:
    """Apply a permutation of 32-bit words to each number in h, int32[n], in place. Products wrap modulo 2^32, and
    shifts are masked to be logical."""
    h ^= (h >> 16) & 0xFFFF
    h *= _signed(0x7FEB352D)
    h ^= (h >> 15) & 0x1FFFF
    h *= _signed(0x846CA68B)
    h ^= (h >> 16) & 0xFFFF
    return h


def _signed(word: int, bits: int = 32) -> int:
    return word - (1 << bits) if word >= 1 << (bits - 1) else word


def add_gaussians(out: Tensor, scale: float, key: Keys, start: int = 0) -> None:
    """Add scale * N(0, 1) noise to out, float[n], in place. The n normal numbers are those from number `start` on in
    the sequence that `key` defines. They are identical on every device up to rounding in the logarithm, sine and
    cosine."""
    if loop := kernel("add_gaussians", out):
        loop(out, scale, key, start)
        return
    for slab in torch.split(out, _SLAB):
        first = start // (2 * _PAIRS)
        numbers = _gaussians(first, -(-(start + len(slab)) // (2 * _PAIRS)), key, out.device)
        skipped = start - first * 2 * _PAIRS
        slab.add_(numbers[skipped : skipped + len(slab)].to(out.dtype), alpha=scale)
        start += len(slab)


def add_cell_gaussians(out: Tensor, scales: Tensor, key: Keys) -> None:
    """Add scales[i] * N(0, 1) noise to cell i of out, in place, for each cell i. out has one cell of consecutive
    elements for each element of `scales`, and all cells have the same size. The normal numbers are the beginning of the
    sequence that `key` defines (see `add_gaussians`)."""
    numbers = torch.zeros_like(out)
    add_gaussians(numbers, 1.0, key)
    cells = len(scales), len(out) // max(1, len(scales))
    out.view(cells).add_(numbers.view(cells).mul_(scales[:, None]))


def _gaussians(first: int, last: int, key: Keys, device: torch.device) -> Tensor:
    """Return a part of the sequence of normal random numbers that `key` defines, float32[...]. The sequence is divided
    into chunks of 2048 numbers, and the part consists of the chunks `first` to `last` - 1."""
    counters = torch.arange(first * _PAIRS, last * _PAIRS, device=device).to(torch.int32)
    hashed = _mixed(counters * _signed(0x9E3779B1) + _signed(key.first))
    radial, angular = _mixed(hashed + _signed(key.second)), _mixed(hashed + _signed(key.third))
    u = ((radial >> 1) & 0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    radius = u.log_().mul_(-2).sqrt_()
    # The 32 bits of a random word: 30 bits are an angle within +-45 degrees, one bit negates the cosine, and one bit
    # swaps cosine and sine.
    angle = ((angular & 0x3FFFFFFF) - (1 << 29)).to(torch.float32).mul_(math.pi * 2.0**-31)
    sine, cosine = angle.sin().mul_(radius), angle.cos_().mul_(radius)
    cosine = torch.where(angular < 0, -cosine, cosine)
    swap = angular & (1 << 30) != 0
    pairs = torch.stack([torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)])
    return pairs.view(2, -1, _PAIRS).transpose(0, 1).reshape(-1)
