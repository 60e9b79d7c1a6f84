"""Bit-level encodings, on the device of their tensors: fixed-width packing, sign bits, and sets of indices."""

import math

import numpy as np
import torch
from torch import Tensor

from packsaddle.compressors.parts import Expected, octets, require
from packsaddle.numerics.kernels import kernel
from packsaddle.numerics.transfers import indices_where

_BITMAP, _FIXED, _RICE = 0, 1, 2
_COMPILED_WIDTH = 56  # largest width in bits that the compiled loops support
_SLAB = 1 << 18  # numbers expanded to bits at a time, a multiple of 8, to bound scratch memory


def pack(numbers: Tensor, width: int) -> Tensor:
    """Pack `numbers` below 2^width, int64[n], into uint8[ceil(n width / 8)], most significant bit first."""
    if width == 0:
        return torch.empty(0, dtype=torch.uint8, device=numbers.device)
    if 8 % width == 0:  # numbers do not cross byte boundaries
        per_byte = 8 // width
        padded = torch.nn.functional.pad(numbers.to(torch.uint8), (0, -len(numbers) % per_byte)).view(-1, per_byte)
        packed = torch.zeros(len(padded), dtype=torch.uint8, device=numbers.device)
        for column in padded.unbind(1):
            packed = (packed << width if width < 8 else packed) | column
        return packed
    if width <= _COMPILED_WIDTH and (loop := kernel("pack_numbers", device=numbers.device)):
        coded: Tensor = loop(numbers, width)
        return coded
    shifts = torch.arange(width - 1, -1, -1, device=numbers.device)
    slabs = [pack_bits(((slab[:, None] >> shifts) & 1).flatten()) for slab in torch.split(numbers, _SLAB)]
    return torch.cat(slabs)


def unpack(packed: Tensor, width: int, n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Invert `pack`: return n numbers of `width` bits each from `packed`, uint8[...], as a tensor [n] in `dtype`."""
    if width == 0:
        return torch.zeros(n, dtype=dtype, device=packed.device)
    if width <= _COMPILED_WIDTH and (loop := kernel("unpack_numbers", device=packed.device)):
        numbers: Tensor = loop(packed, width, n, dtype)
        return numbers
    if 8 % width == 0:
        shifts = torch.arange(8 - width, -1, -width, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> shifts) & ((1 << width) - 1)).view(-1)[:n].to(dtype)
    shifts = torch.arange(width - 1, -1, -1, device=packed.device)
    slabs = [torch.zeros(0, dtype=dtype, device=packed.device)]
    for i, slab in enumerate(torch.split(packed, _SLAB * width // 8)):
        count = min(_SLAB, n - i * _SLAB)
        bits = unpack_bits(slab, count * width).view(count, width)
        slabs.append((bits.to(torch.int64) << shifts).sum(1).to(dtype))
    return torch.cat(slabs)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack bool[n] into uint8[ceil(n / 8)], most significant bit first, padded with zeros."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy()))
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    packed = torch.zeros(len(padded), dtype=torch.uint8, device=bits.device)
    for column in padded.unbind(1):  # eight passes over bytes avoid a wider intermediate tensor
        packed = (packed << 1) | column
    return packed


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=n)).view(torch.bool)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:n].to(torch.bool)


def pack_rice(numbers: Tensor, b: int, unary: int | None = None) -> Tensor:
    """Encode nonnegative integers, int64[n] or uint8[n], in Rice codes with parameter b, uint8[...]; n is not stored.
    The quotients by 2^b are stored first, each in unary as zeros and a one, then the remainders of b bits. `unary` is
    the number of bits of the quotients. If it is None, the host waits for it on a GPU."""
    if b <= _COMPILED_WIDTH and (loop := kernel("pack_rice", device=numbers.device)):
        coded: Tensor = loop(numbers, b)
        return coded
    ends = torch.cumsum((numbers >> b) + 1, 0)
    if unary is None:
        unary = int(ends[-1]) if len(ends) else 0
    bits = torch.zeros(unary, dtype=torch.bool, device=numbers.device).index_fill_(0, ends - 1, True)
    return torch.cat([pack_bits(bits), pack(numbers & ((1 << b) - 1), b)])


def unpack_rice(packed: Tensor, n: int, b: int, most: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Invert `pack_rice`: return the n numbers, and a bool[] that is True if `packed` encodes exactly n numbers, all at
    most `most`."""
    wrong = packed.new_zeros((), dtype=torch.bool)
    if b <= _COMPILED_WIDTH and (loop := kernel("unpack_rice", device=packed.device)):
        found: Tensor | None = loop(packed, n, b, most, dtype)
        return packed.new_zeros(n, dtype=dtype) if found is None else found, ~wrong if found is not None else wrong
    split = len(packed) - math.ceil(n * b / 8)
    bits = unpack_bits(packed[: max(0, split)], 8 * max(0, split))
    ends = indices_where(bits, n)
    if split < 0 or len(ends) != n or not n:
        return packed.new_zeros(n, dtype=dtype), wrong | (split == n == 0)
    quotients = torch.nn.functional.pad(ends, (1, 0), value=-1).diff() - 1
    numbers = (quotients << b) | unpack(packed[split:], b, n)
    # Check the quotients too: a number with a very long quotient could overflow.
    is_whole = (bits.sum() == n) & (ends[-1] // 8 + 1 == split)
    return numbers.to(dtype), is_whole & (quotients.max() <= most >> b) & (numbers.max() <= most)


def pack_gaps(index: Tensor, kept: int, size: int, b: int) -> Tensor:
    """Encode the gaps between increasing indices, int64[k], in Rice codes, uint8[...]; nothing else is stored.

    There are `kept` indices in each chunk of `size` coordinates: index i is in [c size, (c + 1) size) with
    c = floor(i / kept), and the first gap of a chunk is relative to its start.
    """
    return pack_rice(gaps_of(index, kept, size), b)


def gaps_of(index: Tensor, kept: int, size: int) -> Tensor:
    """Return the number of integers between each index and the previous index in its chunk (for the first index, the
    chunk's start), int64[k]: the gaps that `pack_gaps` encodes. The arguments are those of `pack_gaps`."""
    gaps, first = torch.empty_like(index), index[::kept]
    torch.sub(index[1:], index[:-1], out=gaps[1:]).sub_(1)
    gaps[::kept] = first - torch.arange(len(first), device=index.device) * size
    return gaps


def unary_bits(numbers: Tensor, b: int) -> Tensor:
    """Return the number of bits that `pack_rice` with parameter b takes for the quotients of `numbers`, int64[]."""
    return (numbers >> b).sum() + len(numbers)


def unpack_gaps(packed: Tensor, k: int, kept: int, size: int, b: int, stop: int, part: str = "indices") -> Tensor:
    """Invert `pack_gaps`: return the indices, int64[k]. Checks, with `require`, that every index is in its chunk and
    below `stop`; an error names `part`."""
    index, is_valid = unpack_rice(packed, k, b, stop, torch.int64)
    # Sum the gaps of each chunk from the chunk's start, in place. The last chunk may have fewer than `kept` gaps.
    edge, starts = k // kept * kept, torch.arange(0, k, kept, device=packed.device) // kept * size - 1
    whole = index.add_(1)[:edge].view(-1, kept)
    whole.cumsum_(1).add_(starts[: edge // kept, None])
    index[edge:].cumsum_(0).add_(starts[edge // kept :])
    is_valid = is_valid & (whole[: max(0, len(starts) - 1), -1] <= starts[1:]).all()
    return _required(index, is_valid, stop, part, f"the gaps between {k} numbers below {stop}", len(packed))


def _required(index: Tensor, is_valid: Tensor, stop: int, part: str, expected: str, size: int) -> Tensor:
    """Return increasing indices, decoded from a message's `part` of `size` bytes, after checking with `require` that
    they are valid and below `stop`. Except on the CPU the check is deferred, so the indices are clamped: memory may be
    accessed at them before the check."""
    require(is_valid & (index[-1:] < stop).all(), part, expected, f"{size} bytes that are not")
    return index if index.device.type == "cpu" else index.clamp_(0, max(0, stop - 1))


def encode_indices(index: Tensor, d: int) -> Tensor:
    """Encode increasing indices of [0, d), int64[k], in the shortest of three codes, uint8[...]; k is not stored.

    A bitmap takes d bits. Indices of fixed width take k ceil(log2 d) bits. Rice codes of the gaps between indices, with
    parameter b, take k (b + 1) bits plus the sum of floor(gap / 2^b), which is about log2(d / k) + 1.5 bits per index
    for a random set. On average, the shortest code exceeds log2 C(d, k) bits, the entropy of a random set, by at most
    7.5% and three bytes if k/d is at most 1/2.
    """
    k = len(index)
    if k in (0, d):
        return torch.empty(0, dtype=torch.uint8, device=index.device)
    width, b = _width(d), _rice_parameter(d, k)
    # If b is 0, there are no remainders, and the Rice codes are the bits of the bitmap up to its last 1.
    rice = pack_gaps(index, k, d, b) if b else _bitmap(index, d)[: int(index[-1]) // 8 + 1]
    sizes = {_BITMAP: math.ceil(d / 8), _FIXED: math.ceil(k * width / 8), _RICE: len(rice)}
    code = min(sizes, key=lambda c: sizes[c])
    body = pack(index, width) if code == _FIXED else _bitmap(index, d) if code == _BITMAP and b else rice
    return torch.cat([body.new_full((1,), code), body])


def _bitmap(index: Tensor, d: int) -> Tensor:
    return pack_bits(torch.zeros(d, dtype=torch.bool, device=index.device).index_fill_(0, index, True))


def decode_indices(coded: Tensor, k: int, d: int) -> Tensor:
    """Invert `encode_indices`: return the increasing indices, int64[k]. `coded` must match `index_bytes`. Raises
    MessageError unless it encodes k indices of [0, d)."""
    if k in (0, d):
        return torch.arange(k, device=coded.device)
    # The encoder uses the shortest code, so the code follows from the length. The first byte is only compared with this
    # code, on the device, since the host would have to wait for a GPU to read it.
    sizes, body = {code: math.ceil(bits / 8) for code, bits in ((_BITMAP, d), (_FIXED, k * _width(d)))}, coded[1:]
    code = _RICE if len(body) < min(sizes.values()) else min(sizes, key=lambda c: sizes[c])
    require(coded[0] == code, "indices", f"in code {code} if it has {len(coded)} bytes", "another code")
    if code == _RICE:
        return unpack_gaps(body, k, k, d, _rice_parameter(d, k), d)
    bits = unpack_bits(body, d) if code == _BITMAP else None
    index = unpack(body, _width(d), k) if bits is None else indices_where(bits, k)
    is_valid = (index[1:] > index[:-1]).all() if bits is None else bits.sum() == k
    return _required(index, is_valid, d, "indices", f"{k} increasing numbers below {d}", len(coded))


def index_bytes(d: int, k: int) -> Expected:
    return octets(0) if k in (0, d) else octets(2, 1 + math.ceil(min(d, k * _width(d)) / 8))


def gap_bytes(k: int, chunks: int, size: int, b: int) -> Expected:
    remainders = math.ceil(k * b / 8)
    return octets(remainders + math.ceil(k / 8), remainders + math.ceil((k + chunks * (size >> b)) / 8))


def index_bits(d: int, k: int) -> float:
    """Predict the number of bits of `encode_indices` for k random indices of [0, d), including the first byte."""
    if k in (0, d):
        return 0.0
    b = _rice_parameter(d, k)
    # A gap is nearly geometric with success probability p = k / d. With q = (1 - p)^(2^b), its quotient by 2^b has the
    # mean q / (1 - q).
    q = (1 - k / d) ** (1 << b)
    rice = k * (b + 1 + q / (1 - q))
    return 8 + min(d, k * _width(d), rice)


def _width(d: int) -> int:
    return max(1, (d - 1).bit_length())


def _rice_parameter(d: int, k: int) -> int:
    """Return the Rice parameter, the least b with 2^b >= log(2) * mean gap, for k indices below d (Golomb 1966)."""
    mean_gap = (d - k) / k
    return max(0, math.ceil(math.log2(mean_gap * math.log(2)))) if mean_gap > 1 else 0


def shortest_rice(n: int, k: int) -> int:
    """Return the Rice parameter with the shortest codes for k random indices in [0, n) (Kiely 2004, "Selecting the
    Golomb Parameter")."""
    if 2 * k >= n:
        return 0
    golden = (5**0.5 - 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden) / math.log1p(-k / n))))
