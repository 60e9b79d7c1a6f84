"""Entropy coding of a quantizer's integer levels. The first byte selects one of three codes.

*Layers*, for mostly small levels: layer j is the set of coordinates with magnitude above j, a subset of layer j - 1. It
is coded by the gaps between its elements, or between those of its complement in layer j - 1, whichever are fewer. One
sign bit per nonzero level follows. *Rice codes*, for large levels: the levels 0, 1, -1, 2, -2, ... are mapped to
0, 1, 2, 3, 4, ...; the codes are nearly as short as layers, and much faster. *Fixed width*, if neither is shorter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from packsaddle.compressors import wire
from packsaddle.compressors.parts import Expected, octets
from packsaddle.errors import MessageError
from packsaddle.numerics.kernels import kernel

_FIXED, _LAYERS, _RICE = 0, 1, 2
_FOR_SPEED = 1.04  # for large levels Rice codes, ten times as fast, are chosen if at most 4% longer than layers
_LARGE = 2.0  # levels are large if the nonzero ones have a mean magnitude above this
MOST_BITS = 8  # largest fixed width of a level that can be entropy-coded


@dataclass(frozen=True)
class Layer:
    """Sizes of layer j, the set of coordinates with |level| above j, a subset of those with |level| at least j."""

    members: int  # number of coordinates with magnitude at least j
    going_on: int  # number with magnitude above j, the `members` of layer j + 1

    @property
    def inverted(self) -> bool:
        """True if the code lists the members with magnitude j, because they are fewer than those above j."""
        return 2 * self.going_on > self.members

    @property
    def coded(self) -> int:
        """The number of members that the code lists."""
        return self.members - self.going_on if self.inverted else self.going_on

    @cached_property
    def rice(self) -> int:
        """The Rice parameter of the coded gaps between members: the number of bits of a remainder."""
        return wire.shortest_rice(self.members, self.coded) if self.coded else 0

    @property
    def gaps(self) -> Expected:
        """The allowed dtype and lengths of the Rice code of the gaps between the members that the code lists."""
        return wire.gap_bytes(self.coded, 1 if self.coded else 0, self.members, self.rice)

    @property
    def bits(self) -> float:
        """The expected number of bits of the coded gaps."""
        if not self.coded:
            return 0.0
        return self.coded * (self.rice + 1 / (1 - (1 - self.coded / self.members) ** (1 << self.rice)))


@dataclass(frozen=True)
class Rice:
    """The parameter and the size of the Rice codes of a vector of levels."""

    members: int  # number of levels
    unary: int  # total bits of the quotients of the levels by 2^b, in unary
    b: int  # Rice parameter, bits of a remainder

    @property
    def bits(self) -> int:
        """The total size of the codes in bits."""
        return self.unary + self.members * self.b


def encode_levels(packed: Tensor, d: int, top: int, bits: int) -> Tensor:
    """Entropy-code d levels from -top to top as uint8[...]; `packed` has level + top in `bits` bits for each."""
    if not d:
        return packed
    # Predict the size of each code from the histogram of the levels.
    levels: Tensor | None = None
    if loop := kernel("count_levels", device=packed.device):
        counts = loop(packed, d, top, bits)
    else:
        codes = wire.unpack(packed, bits, d)
        levels, counts = codes - top, torch.bincount(codes, minlength=2 * top + 1).tolist()
    layers, rice = _layers(_of_magnitudes(counts, top)), _shortest_rice(counts, top)
    # Layers: the gaps, two numbers per layer in the header, and a sign bit per nonzero level.
    in_layers = sum(layer.bits + 2 * _width(d) for layer in layers) + (layers[0].going_on if layers else 0)
    are_large = len(layers) > 1 and sum(layer.going_on for layer in layers) > _LARGE * layers[0].going_on
    # Prefer Rice codes for large levels even if 4% longer: they decode ten times as fast.
    coded = None
    if rice.bits < min((_FOR_SPEED if are_large else 1.0) * in_layers, 8 * len(packed)):
        coded = _in_rice(packed, levels, d, top, bits, rice)
    elif in_layers < 8 * len(packed):
        coded = _in_layers(packed, levels, d, top, bits, layers)
    if coded is None or len(coded) > len(packed):
        return torch.cat([packed.new_tensor([_FIXED]), packed])
    return coded


def level_bytes(d: int, bits: int) -> Expected:
    """Return the expected dtype and length of the output of `encode_levels` for at most d levels."""
    return octets(0, bool(d) + math.ceil(d * bits / 8))


def decode_levels(coded: Tensor, d: int, top: int, bits: int) -> Tensor:
    """Invert `encode_levels`: return level + top for d levels, uint8[d]. Raises MessageError if `coded` is invalid."""
    code = _code_of(coded, d)
    if code == _FIXED:
        if len(coded) != bool(d) + math.ceil(d * bits / 8):
            raise MessageError("levels", f"{bool(d) + math.ceil(d * bits / 8)} bytes", len(coded))
        return unpack_levels(coded[1:], d, top, bits)
    # Compiled loops return None for an invalid code.
    found: Tensor | None
    if code == _RICE and (loop := kernel("decode_rice_levels", device=coded.device)):
        found = loop(coded[2:], d, top, _rice_parameter(coded))
    elif code == _LAYERS and int(coded[1]) and (loop := kernel("decode_layers", device=coded.device)):
        layers, bodies, signs = _taken_apart(coded, d, top)
        found = loop(_table(layers), bodies, signs, top, d)
    else:
        levels = _from_rice(coded, d, top) if code == _RICE else _from_layers(coded, d, top)
        found = (levels + top).to(torch.uint8) if int(levels.abs().amax()) <= top else None
    if found is None:
        raise MessageError("levels", f"the code of {d} levels from {-top} to {top}", f"{len(coded)} bytes that are not")
    return found


def unpack_levels(packed: Tensor, d: int, top: int, bits: int) -> Tensor:
    """Unpack level + top for d levels, of `bits` bits each, to uint8[d] if bits is at most 8, else to int32[d].

    Raises MessageError if a level is above `top`.
    """
    if bits <= MOST_BITS and (loop := kernel("unpack_levels", device=packed.device)):
        codes: Tensor | None = loop(packed, d, top, bits)
        found = "a larger one"
    else:
        codes = wire.unpack(packed, bits, d).to(torch.uint8 if bits <= MOST_BITS else torch.int32)
        largest = int(codes.max()) if d else 0
        codes, found = (codes, "") if largest <= 2 * top else (None, str(largest))
    if codes is None:
        raise MessageError("levels", f"codes of at most {2 * top}", found)
    return codes


def _code_of(coded: Tensor, d: int) -> int:
    """Return the code that the first byte of `coded` selects. Raises MessageError if it is unknown or incomplete."""
    code = int(coded[0]) if d and len(coded) else _FIXED
    if code not in (_FIXED, _LAYERS, _RICE) or (code != _FIXED and len(coded) < 2):
        raise MessageError("levels", f"in code {_FIXED}, {_LAYERS} or {_RICE}", f"code {code} in {len(coded)} bytes")
    return code


def _rice_parameter(coded: Tensor) -> int:
    b = int(coded[1])
    if b >= MOST_BITS:
        raise MessageError("levels", f"Rice codes with a parameter below {MOST_BITS}", b)
    return b


def _of_magnitudes(counts: Sequence[int], top: int) -> list[int]:
    """Return the number of levels of each magnitude 0 to top, given the number of each level -top to top."""
    return [counts[top]] + [counts[top - m] + counts[top + m] for m in range(1, top + 1)]


def _shortest_rice(counts: Sequence[int], top: int) -> Rice:
    """Return the parameter and size of the shortest Rice codes for levels with frequencies counts[level + top]."""
    members = np.array(counts)
    folded = _folded(torch.arange(-top, top + 1)).numpy()
    d = int(members.sum())
    codes = [Rice(d, int((members * ((folded >> b) + 1)).sum()), b) for b in range(MOST_BITS)]
    return min(codes, key=lambda code: code.bits)


def _folded(levels: Tensor) -> Tensor:
    """Map levels 0, 1, -1, 2, -2, ... to the nonnegative integers 0, 1, 2, 3, 4, ..., int64[n]."""
    return torch.where(levels > 0, 2 * levels - 1, -2 * levels)


def _in_rice(packed: Tensor, levels: Tensor | None, d: int, top: int, bits: int, rice: Rice) -> Tensor:
    if loop := kernel("rice_levels", device=packed.device):
        body = loop(packed, d, top, bits, rice.b, rice.unary)
    else:
        assert levels is not None
        ends = torch.cumsum(_folded(levels) + 1, 0)  # the gaps between these are the folded levels
        body = wire.pack_gaps(ends - 1, d, int(ends[-1]), rice.b)
    return torch.cat([packed.new_tensor([_RICE, rice.b]), body])


def _from_rice(coded: Tensor, d: int, top: int) -> Tensor:
    """Decode Rice codes into levels, int64[d]."""
    places = wire.unpack_gaps(coded[2:], d, d, 0, _rice_parameter(coded), (2 * top + 1) * d, "levels")
    folded = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    return torch.where(folded % 2 == 1, (folded + 1) // 2, -(folded // 2))


def _in_layers(packed: Tensor, levels: Tensor | None, d: int, top: int, bits: int, layers: Sequence[Layer]) -> Tensor:
    if loop := kernel("code_levels", device=packed.device):
        bodies, signs = loop(packed, d, top, bits, _table(layers))
    else:
        assert levels is not None
        magnitudes, bodies, signs = levels.abs(), [], wire.pack_bits(levels[levels != 0] < 0)
        for j, layer in enumerate(layers):
            goes_on = magnitudes > j
            index = (goes_on != layer.inverted).nonzero().squeeze(1)
            bodies.append(wire.pack_gaps(index, max(1, layer.coded), layer.members, layer.rice))
            magnitudes = magnitudes[goes_on]
    sizes = [number for layer, body in zip(layers, bodies, strict=True) for number in (layer.going_on, len(body))]
    head = wire.pack(torch.tensor(sizes, dtype=torch.int64, device=packed.device), _width(d))
    return torch.cat([packed.new_tensor([_LAYERS, len(layers)]), head, *bodies, signs])


def _from_layers(coded: Tensor, d: int, top: int) -> Tensor:
    """Decode the output of `_in_layers` to levels, int64[d]."""
    layers, bodies, signs = _taken_apart(coded, d, top)
    levels = torch.zeros(d, dtype=torch.int64, device=coded.device)
    members = None
    # Each layer adds 1 to the magnitudes of its coordinates; its indices refer to the members of the previous layer.
    for layer, body in zip(layers, bodies, strict=True):
        kept = max(1, layer.coded)
        index = wire.unpack_gaps(body, layer.coded, kept, layer.members, layer.rice, layer.members, "levels")
        if layer.inverted:
            goes_on = torch.ones(layer.members, dtype=torch.bool, device=coded.device)
            goes_on[index] = False
            index = goes_on.nonzero().squeeze(1)
        members = index if members is None else members[index]
        levels[members] += 1
    # One sign per nonzero level, in the order of coordinates.
    if layers:
        negative = wire.unpack_bits(signs, layers[0].going_on)
        levels[levels > 0] *= torch.where(negative, -1, 1)
    return levels


def _layers(counts: Sequence[int]) -> list[Layer]:
    """Return the sizes of all layers, given the number of levels of each magnitude 0, 1, ...."""
    members, layers = sum(counts), []
    for count in counts:
        if members == count:
            break
        layers.append(Layer(members, members - count))
        members -= count
    return layers


def _table(layers: Sequence[Layer]) -> list[tuple[int, int, int, bool]]:
    """Return (members, coded, Rice parameter, inverted) of each layer, the arguments of the compiled loops."""
    return [(layer.members, layer.coded, layer.rice, layer.inverted) for layer in layers]


def _taken_apart(coded: Tensor, d: int, top: int) -> tuple[list[Layer], list[Tensor], Tensor]:
    """Split a code into layer sizes, coded gaps per layer, and sign bits. Raises MessageError if lengths disagree."""
    count, width = int(coded[1]), _width(d)
    start = 2 + math.ceil(2 * count * width / 8)
    if count > top or start > len(coded):
        raise MessageError("levels", f"of at most {top} layers, and their sizes", f"{count} in {len(coded)} bytes")
    # The header has two numbers per layer: the coordinates in it, and the bytes of its coded gaps.
    sizes = wire.unpack(coded[2:start], width, 2 * count).tolist()
    going_on, lengths = sizes[::2], sizes[1::2]
    layers = [Layer(members, k) for members, k in zip([d, *going_on], going_on, strict=False)]
    signs = math.ceil((going_on or [0])[0] / 8)
    fit = all(0 < layer.going_on <= layer.members for layer in layers) and all(
        layer.gaps.least <= n <= layer.gaps.most for layer, n in zip(layers, lengths, strict=True)
    )
    if not fit or start + sum(lengths) + signs != len(coded):
        raise MessageError("levels", f"of layers that fit in {len(coded)} bytes", f"layers of {going_on} in {lengths}")
    *bodies, rest = torch.split(coded[start:], [*lengths, signs])
    return layers, bodies, rest


def _width(d: int) -> int:
    """Return the number of bits of each number in the header of the layer code of d levels."""
    return (d + 16).bit_length()
