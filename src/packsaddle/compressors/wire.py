"""Bit-level encodings, on the device of their tensors: fixed-width packing, sign bits, and sets of indices."""

import math

import numpy as np
import torch
from torch import Tensor

from packsaddle.compressors.parts import require
from packsaddle.numerics.devices import indices_where
from packsaddle.numerics.kernels import kernel

_SLAB = 1 << 18  # numbers expanded to bits at a time, a multiple of 8, to bound scratch memory


def pack(numbers: Tensor, width: int) -> Tensor:
    """Pack n integers of `width` bits each, int64[n], most significant bit first. Returns uint8[ceil(n width / 8)]. The
    integers must be nonnegative and below 2^width. `width` must be at most 56."""
    if width == 0:
        return torch.empty(0, dtype=torch.uint8, device=numbers.device)
    if 8 % width == 0:  # numbers do not cross byte boundaries
        per_byte = 8 // width
        padded = torch.nn.functional.pad(numbers.to(torch.uint8), (0, -len(numbers) % per_byte)).view(-1, per_byte)
        packed = torch.zeros(len(padded), dtype=torch.uint8, device=numbers.device)
        for column in padded.unbind(1):  # passes over bytes avoid a wider intermediate tensor
            packed = (packed << width if width < 8 else packed) | column
        return packed
    if loop := kernel("pack_numbers", device=numbers.device):
        coded: Tensor = loop(numbers, width)
        return coded
    shifts = torch.arange(width - 1, -1, -1, device=numbers.device)
    slabs = [pack_bits(((slab[:, None] >> shifts) & 1).flatten()) for slab in torch.split(numbers, _SLAB)]
    return torch.cat(slabs)


def unpack(packed: Tensor, width: int, n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Invert `pack`: return n integers of `width` bits each from `packed`, uint8[...]. The result has n elements in
    `dtype`."""
    if width == 0:
        return torch.zeros(n, dtype=dtype, device=packed.device)
    if loop := kernel("unpack_numbers", device=packed.device):
        numbers: Tensor = loop(packed, width, n, dtype)
        return numbers
    if 8 % width == 0:
        shifts = torch.arange(8 - width, -1, -width, dtype=torch.uint8, device=packed.device)
        return (packed[:, None] >> shifts).bitwise_and_((1 << width) - 1).view(-1)[:n].to(dtype)
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
    return pack(bits, 1)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=n)).view(torch.bool)
    return unpack(packed, 1, n, torch.bool)


def pack_rice(numbers: Tensor, b: int, unary: int) -> Tensor:
    """Encode n nonnegative integers, int64[n] or uint8[n], in Rice codes with parameter b. Returns uint8[...].

    The quotients by 2^b are stored first, each in unary as zeros and a one. The remainders of b bits follow. `unary` is
    the number of bits for the quotients, at least `unary_bits`; the bits that are not needed are zeros. n is not
    stored.
    """
    if loop := kernel("pack_rice", device=numbers.device):
        coded: Tensor = loop(numbers, b, unary)
        return coded
    ends = torch.cumsum((numbers >> b) + 1, 0)
    bits = torch.zeros(unary, dtype=torch.bool, device=numbers.device).index_fill_(0, ends - 1, True)
    return torch.cat([pack_bits(bits), pack(numbers & ((1 << b) - 1), b)])


def unpack_rice(
    packed: Tensor, n: int, b: int, most: int, dtype: torch.dtype, *, padded: bool = False
) -> tuple[Tensor, Tensor]:
    """Invert `pack_rice`: return the n numbers, and a bool[] that is True if `packed` encodes exactly n numbers, all at
    most `most`. With `padded`, any number of zero bytes may follow the quotients; otherwise such bytes make the bool[]
    False. So does a 1 after the last remainder, in the bits of its byte that are not needed."""
    wrong = packed.new_zeros((), dtype=torch.bool)
    ends_in_zeros = (packed[-1:] & ((1 << -n * b % 8) - 1) == 0).all()
    if loop := kernel("unpack_rice", device=packed.device):
        found: Tensor | None = loop(packed, n, b, most, dtype, padded)
        return (packed.new_zeros(n, dtype=dtype), wrong) if found is None else (found, ends_in_zeros)
    split = len(packed) - math.ceil(n * b / 8)
    bits = unpack_bits(packed[: max(0, split)], 8 * max(0, split))
    ends = indices_where(bits, n)
    if split < 0 or len(ends) != n or not n:
        return packed.new_zeros(n, dtype=dtype), wrong | (split == n == 0)
    quotients = torch.nn.functional.pad(ends, (1, 0), value=-1).diff() - 1
    numbers = (quotients << b) | unpack(packed[split:], b, n)
    # Check the quotients too: a number with a very long quotient could overflow.
    is_whole = (bits.sum() == n) & (padded | (ends[-1] // 8 + 1 == split))
    is_whole &= ends_in_zeros
    return numbers.to(dtype), is_whole & (quotients.max() <= most >> b) & (numbers.max() <= most)


def pack_gaps(index: Tensor, kept: int, size: int, b: int, unary: int) -> Tensor:
    """Encode k increasing indices, int64[k], by the gaps between them, in Rice codes with parameter b. Returns
    uint8[...], which contains only the codes of the gaps. `unary` is the number of bits for the quotients of the gaps
    by 2^b, at least `unary_bits` of the gaps.

    There are `kept` indices in each chunk of `size` coordinates: index i is in [c size, (c + 1) size) with
    c = floor(i / kept), and the first gap of a chunk is relative to its start.
    """
    return pack_rice(gaps_of(index, kept, size), b, unary)


def gaps_of(index: Tensor, kept: int, size: int) -> Tensor:
    """Return the gaps that `pack_gaps` encodes, int64[k], for the same arguments. A gap is the number of integers
    between an index and the previous index in its chunk. For the first index of a chunk, it is the number of integers
    from the chunk's start to the index."""
    gaps, first = torch.empty_like(index), index[::kept]
    torch.sub(index[1:], index[:-1], out=gaps[1:]).sub_(1)
    gaps[::kept] = first - torch.arange(len(first), device=index.device) * size
    return gaps


def unary_bits(numbers: Tensor, b: int) -> Tensor:
    """Return the number of bits, int64[], that `pack_rice` with parameter b takes for the quotients of `numbers` by
    2^b."""
    return (numbers >> b).sum() + len(numbers)


def unpack_gaps(
    packed: Tensor, k: int, kept: int, size: int, b: int, stop: int, *, part: str = "indices", padded: bool = True
) -> Tensor:
    """Invert `pack_gaps`: return the k indices, int64[k].

    Checks, with `require`, that every index is in its chunk and below `stop`. An error names `part`, the part of the
    message that contains `packed`. Pass padded=False if the argument `unary` of `pack_gaps` was exactly the result of
    `unary_bits` (see `unpack_rice`).
    """
    index, is_valid = unpack_rice(packed, k, b, stop, torch.int64, padded=padded)
    # Sum the gaps of each chunk from the chunk's start, in place. The last chunk may have fewer than `kept` gaps.
    edge, starts = k // kept * kept, torch.arange(0, k, kept, device=packed.device) // kept * size - 1
    whole = index.add_(1)[:edge].view(-1, kept)
    whole.cumsum_(1).add_(starts[: edge // kept, None])
    index[edge:].cumsum_(0).add_(starts[edge // kept :])
    is_valid = is_valid & (whole[: max(0, len(starts) - 1), -1] <= starts[1:]).all() & (index[-1:] < stop).all()
    require(is_valid, part, f"the gaps between {k} numbers below {stop}", f"{len(packed)} bytes that are not")
    # On other devices than the CPU the check is deferred. The indices are clamped, since memory may be accessed at them
    # before the check.
    return index if index.device.type == "cpu" else index.clamp_(0, max(0, stop - 1))


def encode_indices(index: Tensor, d: int) -> Tensor:
    """Encode k increasing indices of [0, d), int64[k]. Returns uint8[index_bytes(d, k)]; k is not stored.

    This is the code of Elias and Fano, as Rice codes with parameter b of the gaps between the indices. The gaps add up
    to at most d - k, so their quotients by 2^b take at most k + (d - k) / 2^b bits in unary. The code always has this
    size, at most log2(d / k) + 2 bits per index, so it need not be announced. If b is 0, the code is a bitmap.
    """
    k = len(index)
    if k in (0, d):
        return torch.empty(0, dtype=torch.uint8, device=index.device)
    b = gap_parameter(d, k)
    return pack_gaps(index, k, d, b, gap_bits(d, k, b))


def decode_indices(coded: Tensor, k: int, d: int) -> Tensor:
    """Invert `encode_indices`: return the increasing indices, int64[k]. `coded` must have `index_bytes` bytes. Raises
    MessageError unless it encodes k indices of [0, d)."""
    if k in (0, d):
        return torch.arange(k, device=coded.device)
    return unpack_gaps(coded, k, k, d, gap_parameter(d, k), d)


def index_bytes(d: int, k: int) -> int:
    """Return the number of bytes in which `encode_indices` encodes k indices of [0, d)."""
    if k in (0, d):
        return 0
    b = gap_parameter(d, k)
    return rice_bytes(k, b, gap_bits(d, k, b))


def gap_parameter(n: int, k: int) -> int:
    """Return the Rice parameter b that minimizes k b + `gap_bits`, the largest number of bits that the codes of k gaps
    in [0, n) take."""
    return max(0, ((n - k) // k).bit_length() - 1)


def gap_bits(n: int, k: int, b: int) -> int:
    """Return the largest number of bits that the quotients of k gaps in [0, n) by 2^b take in unary. The quotients are
    rounded down."""
    return k + ((n - k) >> b)


def rice_bytes(n: int, b: int, unary: int) -> int:
    """Return the number of bytes in which `pack_rice` encodes n numbers with parameter b. `unary` is the number of bits
    for their quotients by 2^b."""
    return math.ceil(unary / 8) + math.ceil(n * b / 8)


def shortest_rice(n: int, k: int) -> int:
    """Return the Rice parameter for which the codes of the gaps between k random indices in [0, n) are shortest on
    average (Kiely 2004, "Selecting the Golomb Parameter")."""
    if 2 * k >= n:
        return 0
    golden = (5**0.5 - 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden) / math.log1p(-k / n))))
