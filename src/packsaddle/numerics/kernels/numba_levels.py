"""Compiled entropy coding of levels, in layers and in Rice codes; `compressors.levels` has the PyTorch version."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_codes import pack_codes, unpack_codes
from packsaddle.numerics.kernels.numba_common import Array, compiled_loop

Table = list[tuple[int, int, int, bool]]  # per `compressors.levels.Layer`: members, coded, rice, inverted
_GROUP = 4096  # coordinates processed at a time, a multiple of 8
_NEVER = 1 << 62  # returned as the next gap after the last coded member of a layer


def count_levels(packed: Tensor, d: int, top: int, bits: int) -> list[int]:
    """Count each level from -top to top among d levels, packed as level + top in `bits` bits each."""
    counts = np.zeros(256, np.int64)
    if 8 % bits == 0:  # codes do not cross byte boundaries
        of_bytes = np.zeros((4, 256), np.int64)
        _count_bytes(packed.numpy(), of_bytes)
        for shift in range(0, 8, bits):
            np.add.at(counts, (np.arange(256) >> shift) & ((1 << bits) - 1), of_bytes.sum(0))
        counts[0] -= len(packed) * 8 // bits - d  # padding of the last byte
    else:
        _count_codes(packed.numpy(), d, bits, counts)
    return [int(count) for count in counts[: 2 * top + 1]]


@compiled_loop
def _count_bytes(values: Array, table: Array) -> None:
    for i in range(0, len(values) // 4 * 4, 4):  # four tables, so that increments for equal values are independent
        for j in range(4):
            table[j, values[i + j]] += 1
    for i in range(len(values) // 4 * 4, len(values)):
        table[0, values[i]] += 1


@compiled_loop
def _count_codes(packed: Array, d: int, bits: int, counts: Array) -> None:
    codes, table = np.empty(_GROUP, np.uint8), np.zeros((4, 256), np.int64)
    for group in range(0, d, _GROUP):
        held = codes[: min(_GROUP, d - group)]
        unpack_codes(packed[group * bits // 8 :], bits, codes[: -(-len(held) // 8) * 8])
        _count_bytes(held, table)
    for j in range(4):
        for code in range(256):
            counts[code] += table[j, code]


def code_levels(packed: Tensor, d: int, top: int, bits: int, layers: Table) -> tuple[list[Tensor], Tensor]:
    """Encode d levels in layers: return the coded gaps of each layer, uint8[...], and the sign bits, uint8[...]."""
    table = np.array(layers, np.int64).reshape(-1, 4)
    unary_bytes = [(coded + (members >> b)) // 8 + 1 for members, coded, b, _ in layers]
    rest_bytes = [-(-coded * b // 8) for _, coded, b, _ in layers]
    unary, rest = torch.zeros(sum(unary_bytes), dtype=torch.uint8), torch.empty(sum(rest_bytes), dtype=torch.uint8)
    going_on = layers[0][0] - layers[0][1] if layers and layers[0][3] else layers[0][1] if layers else 0
    signs = torch.zeros(-(-going_on // 8), dtype=torch.uint8)
    starts, empty = _starts(unary_bytes) * 8, np.zeros(len(layers), np.int64)
    writer = _Writer(unary.numpy(), starts.copy(), rest.numpy(), _starts(rest_bytes), empty.astype(np.uint64), empty)
    if layers:
        _code_levels(packed.numpy(), d, top, bits, table, tuple(writer), signs.numpy())
    lengths = -(-(writer.used - starts) // 8)
    cut = zip(torch.split(unary, unary_bytes), lengths.tolist(), torch.split(rest, rest_bytes), strict=True)
    return [torch.cat([u[:length], r]) for u, length, r in cut], signs


def _starts(lengths: list[int]) -> Array:
    return np.cumsum([0, *lengths])[:-1].astype(np.int64)


class _Writer(NamedTuple):
    """State of writing the coded gaps of all layers; the fields except `unary` and `rest` have one entry per layer.

    Passed to loops as a plain tuple: a call with a NamedTuple takes 20 microseconds more.
    """

    unary: Array  # quotients in unary, packed bits
    used: Array  # position of the next bit in `unary`
    rest: Array  # remainders, packed bits
    place: Array  # position of the next byte in `rest`
    waiting: Array  # remainder bits that do not fill a byte yet
    held: Array  # number of bits in `waiting`


@compiled_loop
def _code_levels(packed: Array, d: int, top: int, bits: int, table: Array, writer: Any, signs: Array) -> None:
    _, _, rest, place, waiting, held_bits = writer
    layers = len(table)
    gaps = np.zeros(layers, np.int64)  # per layer: coordinates of the layer since the last one that its code lists
    codes, coded, others = np.empty(_GROUP, np.uint8), np.empty(_GROUP + 1, np.int32), np.empty(_GROUP + 1, np.int32)
    last: Any = np.int64(-1)
    sign = 0
    for group in range(0, d, _GROUP):
        held = codes[: min(_GROUP, d - group)]
        unpack_codes(packed[group * bits // 8 :], bits, codes[: -(-len(held) // 8) * 8])
        m: Any = 0
        for i in range(len(held)):  # branch-free: positions of zeros are overwritten
            coded[m] = i
            m += np.int64(held[i] != top)
        members = coded[:m]
        # The first layer: gaps between nonzero levels or, inverted, between zeros.
        if table[0, 3]:
            zeros: Any = 0
            for i in range(len(held)):
                others[zeros] = i
                zeros += np.int64(held[i] == top)
            last = _append_gaps(others[:zeros], group, last, table[0, 2], writer)
        else:
            last = _append_gaps(members, group, last, table[0, 2], writer)
        # The other layers, and one sign bit per nonzero level.
        for i in range(len(members)):
            level: Any = np.int64(held[members[i]]) - top
            signs[sign >> 3] |= np.uint8(np.uint8(level < 0) << (7 - (sign & 7)))
            sign += 1
            magnitude = abs(level)
            for j in range(1, min(magnitude + 1, layers)):
                if (magnitude > j) != (table[j, 3] != 0):
                    _append(j, gaps[j], table[j, 2], writer)
                    gaps[j] = 0
                else:
                    gaps[j] += 1
    # Pad the last byte of remainders with zeros.
    for j in range(layers):
        if held_bits[j]:
            rest[place[j]] = np.uint8((waiting[j] << np.uint64(8 - held_bits[j])) & np.uint64(255))


@compiled_loop
def _append_gaps(places: Array, group: int, last: int, b: int, writer: Any) -> Any:
    """Append the gaps between `places`, positions in a group, to layer 0; return the last place, as an index."""
    # Local variables, which stay in registers in the loop; array elements would not.
    unary, used, rest, place, waiting, held_bits = writer
    bit, at, accumulator, held = used[0], place[0], waiting[0], held_bits[0]
    mask = np.uint64((1 << b) - 1)
    before: Any = last - group
    for i in range(len(places)):
        gap = np.uint64(places[i] - before - 1)
        before = places[i]
        # Write the gap's quotient by 2^b in unary, as zeros and a one, and its remainder in b bits.
        bit += np.int64(gap >> np.uint64(b))
        unary[bit >> 3] |= np.uint8(128 >> (bit & 7))
        bit += 1
        accumulator = (accumulator << np.uint64(b)) | (gap & mask)
        held += b
        while held >= 8:
            held -= 8
            rest[at] = np.uint8((accumulator >> np.uint64(held)) & np.uint64(255))
            at += 1
    used[0], place[0], waiting[0], held_bits[0] = bit, at, accumulator, held
    return before + group


@compiled_loop
def _append(j: int, gap: int, b: int, writer: Any) -> None:
    """Append one gap to the code of layer j."""
    unary, used, rest, place, waiting, held = writer
    used[j] += gap >> b
    unary[used[j] >> 3] |= np.uint8(128 >> (used[j] & 7))
    used[j] += 1
    waiting[j] = (waiting[j] << np.uint64(b)) | np.uint64(gap & ((1 << b) - 1))
    held[j] += b
    while held[j] >= 8:
        held[j] -= 8
        rest[place[j]] = np.uint8((waiting[j] >> np.uint64(held[j])) & np.uint64(255))
        place[j] += 1


class _Reader(NamedTuple):
    """State of reading the coded gaps of all layers; the fields except `stream` have one entry per layer."""

    stream: Array  # coded gaps of all layers, concatenated
    left: Array  # number of unread gaps
    unary_at: Array  # position in `stream` of the next bit of the quotients
    rest_at: Array  # position in `stream` of the next bit of the remainders


def decode_layers(layers: Table, bodies: list[Tensor], signs: Tensor, top: int, d: int) -> Tensor | None:
    """Decode `bodies` and `signs` from `code_levels`: return level + top for d levels, uint8[d].

    Preconditions: at most `top` layers, each body at least as long as its remainders. Returns None if a body does not
    encode exactly the coded members of its layer.
    """
    table = np.array(layers, np.int64).reshape(-1, 4)
    rest_bytes = [-(-coded * b // 8) for _, coded, b, _ in layers]
    unary_bytes = [len(body) - n for body, n in zip(bodies, rest_bytes, strict=True)]
    # Padding with ones, as many as there are codes, stops searches for a one that run past the end of a body.
    ones = max(coded for _, coded, _, _ in layers)
    stream = torch.cat([*bodies, torch.full((ones // 8 + 2,), 255, dtype=torch.uint8)]).numpy()
    starts = _starts([len(body) for body in bodies])
    reader = _Reader(stream, table[:, 1].copy(), starts * 8, (starts + np.array(unary_bytes, np.int64)) * 8)
    codes = torch.empty(d, dtype=torch.uint8)
    return codes if _decode_layers(table, tuple(reader), signs.numpy(), top, codes.numpy()) else None


@compiled_loop
def _decode_layers(table: Array, reader: Any, signs: Array, top: int, out: Array) -> bool:
    d, layers = len(out), len(table)
    stream, left, unary_at, rest_at = reader
    hits, places = np.empty(_GROUP + 16, np.int64), np.empty(_GROUP + 1, np.int64)
    marks, ends = np.empty(_GROUP, np.uint8), np.empty(9, np.int64)
    waiting, unary_end = np.zeros(layers, np.int64), rest_at.copy()
    for j in range(1, layers):
        waiting[j] = _next_gap(j, table[j, 2], reader)
    unary, rest = stream[unary_at[0] >> 3 :], stream[rest_at[0] >> 3 :]
    b, mask, accumulator = table[0, 2], np.uint64((1 << table[0, 2]) - 1), np.uint64(0)
    longest = (np.int64(d) >> b) + 1  # maximum bits of a quotient; a longer one could overflow an index
    held, at, byte_at, before = 0, 0, 0, np.int64(-1)
    last, pending, sign = np.int64(-1), 0, 0
    for group in range(0, d, _GROUP):
        codes = out[group : group + _GROUP]
        n = len(codes)
        # Read the coded members of the first layer until one is beyond this group.
        while left[0] > 0 and (pending == 0 or hits[pending - 1] < group + n):
            if 8 * byte_at - before > longest:
                return False
            byte = unary[byte_at]
            ones: Any = 0
            for i in range(8):
                ends[ones] = 8 * byte_at + i
                ones += np.int64((byte >> (7 - i)) & 1)
            byte_at += 1
            ones = min(ones, left[0])
            for i in range(ones):
                while held < b:
                    accumulator = (accumulator << np.uint64(8)) | np.uint64(rest[at])
                    held += 8
                    at += 1
                held -= b
                quotient = np.uint64(ends[i] - before - 1)
                before = ends[i]
                last += np.int64((quotient << np.uint64(b)) | ((accumulator >> np.uint64(held)) & mask)) + 1
                hits[pending] = last
                pending += 1
            left[0] -= ones
        inside = pending
        while inside > 0 and hits[inside - 1] >= group + n:
            inside -= 1
        # Collect the positions of nonzero levels in this group.
        if table[0, 3]:
            marks[:n] = 1
            for i in range(inside):
                marks[hits[i] - group] = 0
            m: Any = 0
            for i in range(n):
                places[m] = i
                m += np.int64(marks[i])
        else:
            m = inside
            for i in range(inside):
                places[i] = hits[i] - group
        for i in range(inside, pending):
            hits[i - inside] = hits[i]
        pending -= inside
        # Decode the levels at these positions.
        if sign + m > 8 * len(signs):
            return False
        codes[:] = top
        for i in range(m):
            magnitude = 1
            for j in range(1, layers):
                if waiting[j] == 0:
                    waiting[j] = _next_gap(j, table[j, 2], reader)
                    goes_on = table[j, 3] == 0
                else:
                    waiting[j] -= 1
                    goes_on = table[j, 3] != 0
                if not goes_on:
                    break
                magnitude += 1
            negative = (signs[sign >> 3] >> (7 - (sign & 7))) & 1
            sign += 1
            codes[places[i]] = np.uint8(top - magnitude if negative else top + magnitude)
    # Valid only if all gaps were read and lead to members of their layer, and the quotients end in their last byte.
    unary_at[0] += before + 1
    complete = left[0] == 0 and pending == 0
    for j in range(layers):
        used = unary_at[j] & 7
        surplus = used and (stream[unary_at[j] >> 3] << used) & 255
        complete &= (unary_at[j] + 7) >> 3 == unary_end[j] >> 3 and not surplus and (j == 0 or waiting[j] > _NEVER // 2)
    return complete


@compiled_loop
def _next_gap(j: int, b: int, reader: Any) -> Any:
    """Read and return the next gap of layer j, bit by bit; _NEVER after the last gap."""
    stream, left, unary_at, rest_at = reader
    if left[j] == 0:
        return np.int64(_NEVER)
    left[j] -= 1
    quotient, bit = np.int64(0), unary_at[j]
    while not (stream[bit >> 3] >> (7 - (bit & 7))) & 1:
        quotient += 1
        bit += 1
    unary_at[j] = bit + 1
    remainder, bit = np.int64(0), rest_at[j]
    for _ in range(b):
        remainder = (remainder << 1) | np.int64((stream[bit >> 3] >> (7 - (bit & 7))) & 1)
        bit += 1
    rest_at[j] = bit
    return (quotient << b) | remainder


def rice_levels(packed: Tensor, d: int, top: int, bits: int, b: int, unary_bits: int) -> Tensor:
    """Encode d levels, packed by `pack_levels`, in Rice codes: quotients in unary, then remainders, uint8[...].

    `unary_bits` is the length of the unary part, the sum of all quotients plus d.
    """
    unary = torch.zeros(-(-unary_bits // 8), dtype=torch.uint8)
    rest = torch.empty(-(-d * b // 8), dtype=torch.uint8)
    _rice_levels(packed.numpy(), d, top, bits, b, unary.numpy(), rest.numpy())
    return torch.cat([unary, rest])


@compiled_loop
def _rice_levels(packed: Array, d: int, top: int, bits: int, b: int, unary: Array, rest: Array) -> None:
    codes, remainders = np.empty(_GROUP, np.uint8), np.empty(_GROUP, np.uint8)
    mask = np.int32((1 << b) - 1)
    bit: Any = 0
    for group in range(0, d, _GROUP):
        n = min(_GROUP, d - group)
        whole = -(-n // 8) * 8
        unpack_codes(packed[group * bits // 8 :], bits, codes[:whole])
        for i in range(n):
            level = np.int32(codes[i]) - np.int32(top)
            # 0, 1, -1, 2, -2, ... -> 0, 1, 2, 3, 4, ...; the quotient by 2^b in unary, as zeros and a one.
            folded = 2 * level - 1 if level > 0 else -2 * level
            remainders[i] = np.uint8(folded & mask)
            bit += np.int64(folded >> b)
            unary[bit >> 3] |= np.uint8(128 >> (bit & 7))
            bit += 1
        # Pack the remainders in b bits each. Groups end at byte boundaries; the last byte is padded with zeros.
        remainders[n:whole] = 0
        if b:
            pack_codes(remainders[:whole], b, rest[group * b // 8 :])


def decode_rice_levels(body: Tensor, d: int, top: int, b: int) -> Tensor | None:
    """Decode `body` from `rice_levels`: return level + top for d levels, uint8[d], or None if it is invalid.

    `b` is at most 8.
    """
    split = len(body) - -(-d * b // 8)
    stream, codes = body.numpy(), torch.empty(d, dtype=torch.uint8)
    if split < 0 or not _decode_rice_levels(stream[:split], stream[split:], top, b, codes.numpy()):
        return None
    return codes


@compiled_loop
def _decode_rice_levels(unary: Array, rest: Array, top: int, b: int, out: Array) -> bool:
    longest = np.int64((2 * top >> b) + 1)  # maximum bits of a quotient
    remainders, quotients = np.zeros(_GROUP, np.uint8), np.empty(_GROUP + 8, np.int32)
    levels, ends = np.empty(_GROUP, np.int32), np.empty(9, np.int64)
    pending, byte_at, before = 0, 0, np.int64(-1)
    for group in range(0, len(out), _GROUP):
        codes = out[group : group + _GROUP]
        n = len(codes)
        if b:
            unpack_codes(rest[group * b // 8 :], b, remainders[: -(-n // 8) * 8])
        # Read the quotients of this group, and up to seven of the next.
        while pending < n and byte_at < len(unary):
            if 8 * byte_at - before > longest:
                return False
            byte = unary[byte_at]
            ones: Any = 0
            for i in range(8):  # branch-free: positions of zeros are overwritten
                ends[ones] = 8 * byte_at + i
                ones += np.int64((byte >> (7 - i)) & 1)
            byte_at += 1
            for i in range(ones):
                quotients[pending + i] = np.int32(ends[i] - before - 1)
                before = ends[i]
            pending += ones
        if pending < n:
            return False
        for i in range(n):
            folded = (quotients[i] << b) | np.int32(remainders[i])
            levels[i] = (folded + 1) >> 1 if folded & 1 else -(folded >> 1)
        largest = np.int32(0)
        for i in range(n):
            largest = max(largest, abs(levels[i]))
        if largest > top:
            return False
        for i in range(n):
            codes[i] = np.uint8(levels[i] + np.int32(top))
        for i in range(n, pending):
            quotients[i - n] = quotients[i]
        pending -= n
    return pending == 0 and byte_at == len(unary)
