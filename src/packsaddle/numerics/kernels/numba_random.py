"""Compiled counter-based random numbers; `numerics.seeds` defines the numbers, and has the PyTorch version."""

from typing import Any

import numpy as np
from torch import Tensor

from packsaddle.numerics.kernels.numba_common import Array, compiled_loop, in_parts, scalar

PAIRS = 1024  # pairs of normal numbers generated at a time, so few that scratch memory fits the L1 cache


@compiled_loop
def word(counter: Any, first: Any, second: Any) -> Any:
    """Return the 32 random bits that a uint32 counter and two uint32 keys define. After a change to this function,
    delete numba's disk cache: numba does not recompile loops in other modules that inline the function."""
    return mixed(np.uint32(mixed(np.uint32(np.uint32(counter * np.uint32(0x9E3779B1)) + first)) + second))


@compiled_loop
def mixed(h: Any) -> Any:
    """Apply a permutation of 32-bit words to h. The result of each operation is cast to uint32, since numba would widen
    it."""
    h = np.uint32(h ^ np.uint32(h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x7FEB352D))
    h = np.uint32(h ^ np.uint32(h >> np.uint32(15)))
    h = np.uint32(h * np.uint32(0x846CA68B))
    return np.uint32(h ^ np.uint32(h >> np.uint32(16)))


def add_gaussians(out: Tensor, scale: float, keys: tuple[int, int, int], start: int) -> None:
    """Add scale * N(0, 1) noise to out, float[n], in place. The n normal numbers are those from number `start` on in
    the sequence that `keys` define (see `seeds.add_gaussians`)."""
    o, (first, second, third) = out.numpy(), (np.uint32(key) for key in keys)
    factor = scalar(scale, o)
    in_parts(len(out), 2 * PAIRS, lambda a, b: _add_gaussians(o[a:b], factor, first, second, third, start + a))


@compiled_loop
def _add_gaussians(out: Array, scale: Any, first: Any, second: Any, third: Any, start: int) -> None:
    scratch = np.empty(6 * PAIRS, np.float32)
    done = 0
    while done < len(out):
        chunk, skipped = (start + done) // (2 * PAIRS), (start + done) % (2 * PAIRS)
        numbers = _chunk(np.uint32(chunk * PAIRS), first, second, third, scratch)
        target = out[done : done + 2 * PAIRS - skipped]
        source = numbers[skipped : skipped + len(target)]
        for i in range(len(target)):
            target[i] += scale * source[i]
        done += len(target)


@compiled_loop
def _chunk(counter: Any, first: Any, second: Any, third: Any, scratch: Array) -> Array:
    """Generate normal numbers from PAIRS consecutive counters, of which `counter` is the first. Two numbers are
    generated from each counter. Returns the 2 * PAIRS numbers, as a view of `scratch`, float32[6 * PAIRS]. `first`,
    `second` and `third` are the keys of the sequence."""
    # Each loop below reads and writes disjoint arrays; otherwise it would not vectorize.
    uniform, angles = scratch[:PAIRS], scratch[PAIRS : 2 * PAIRS].view(np.uint32)
    mantissas, radii = scratch[2 * PAIRS : 3 * PAIRS], scratch[3 * PAIRS : 4 * PAIRS]
    numbers = scratch[4 * PAIRS :]
    _hash(counter, first, second, third, uniform, angles)
    _split(uniform.view(np.int32), mantissas.view(np.int32), radii)
    _radii(mantissas, radii)
    _multiply_directions(angles, radii, numbers[:PAIRS], numbers[PAIRS:])
    return numbers


@compiled_loop
def _hash(start: Any, first: Any, second: Any, third: Any, u: Array, angles: Array) -> None:
    for i in range(len(u)):
        counter = np.uint32(start + np.uint32(i))
        h = mixed(np.uint32(np.uint32(counter * np.uint32(0x9E3779B1)) + first))
        radial = mixed(np.uint32(h + second))
        angles[i] = mixed(np.uint32(h + third))
        u[i] = (np.float32(np.int32(radial >> np.uint32(1))) + np.float32(0.5)) * np.float32(2.0**-31)


@compiled_loop
def _multiply_directions(angles: Array, radii: Array, cosines: Array, sines: Array) -> None:
    """Write radii * cos(angle) to `cosines` and radii * sin(angle) to `sines`, for random angles. The angles are given
    by `angles`, random words of 32 bits: 30 bits are an angle within +-45 degrees, one bit negates the cosine, and one
    bit swaps cosine and sine."""
    one = np.float32(1)
    for i in range(len(angles)):
        a = angles[i]
        x = np.float32(np.int32(a & np.uint32(0x3FFFFFFF)) - np.int32(1 << 29)) * np.float32(np.pi * 2.0**-31)
        z = x * x
        sine = x * (one + z * (np.float32(-1 / 6) + z * (np.float32(1 / 120) - z * np.float32(1 / 5040))))
        series = np.float32(1 / 24) + z * (np.float32(-1 / 720) + z * np.float32(1 / 40320))
        cosine = one + z * (np.float32(-1 / 2) + z * series)
        cosine *= one - np.float32(np.int32(a >> np.uint32(31))) * np.float32(2)
        swap = np.float32(np.int32((a >> np.uint32(30)) & np.uint32(1)))
        cosines[i] = radii[i] * (swap * sine + (one - swap) * cosine)
        sines[i] = radii[i] * (swap * cosine + (one - swap) * sine)


@compiled_loop
def _split(bits: Array, mantissas: Array, exponents: Array) -> None:
    """Split floating-point numbers u into mantissas and exponents: u = mantissa * 2^exponent, with mantissas in
    [sqrt(1/2), sqrt(2)). `bits` contains the numbers as bit patterns. The mantissas are written to `mantissas`, as bit
    patterns, and the exponents to `exponents`."""
    for i in range(len(bits)):
        exponent = (bits[i] - np.int32(0x3F3504F3)) >> np.int32(23)
        mantissas[i] = bits[i] - (exponent << np.int32(23))
        exponents[i] = np.float32(exponent)


@compiled_loop
def _radii(mantissas: Array, exponents: Array) -> None:
    """Replace each element of `exponents` with sqrt(-2 log u), where u = mantissa * 2^exponent. The result is the
    radius of a pair of normal random numbers in the Box-Muller transform. The logarithm is computed as in musl's
    logf."""
    one, two, half = np.float32(1), np.float32(2), np.float32(0.5)
    for i in range(len(mantissas)):
        f = mantissas[i] - one
        s = f / (two + f)
        z = s * s
        w = z * z
        r = z * (np.float32(0.66666662693) + w * np.float32(0.28498786688))
        r += w * (np.float32(0.40000972152) + w * np.float32(0.24279078841))
        square = half * f * f
        log = s * (square + r) - square + f + exponents[i] * np.float32(0.69314718056)
        exponents[i] = np.sqrt(-two * log)
