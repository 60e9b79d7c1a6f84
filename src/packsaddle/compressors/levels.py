"""Levels of a quantizer in about as many bits as their entropy.

Where there are few, most are 0, and the larger the fewer. So they are coded in layers: which coordinates are not 0,
which of these are above 1 in magnitude, which of those above 2, and so on; each layer is a set among the members of the
one before, coded by the gaps between those that go on, or that do not, whichever are fewer. Signs of what is not 0
follow, a bit each. Where levels are large, Rice codes of them, folded into 0, 1, -1, 2, -2, ... -> 0, 1, 2, 3, 4, ...,
take as few bits and are much faster. Or else codes of a fixed width are sent. The first byte says which.
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
_FOR_SPEED = 1.04  # layers of large levels may be so much shorter than Rice codes, which are ten times as fast
_LARGE = 2.0  # mean magnitude of those that are not 0
MOST_BITS = 8  # of a code of fixed width that can be coded in layers


@dataclass(frozen=True)
class Layer:
    """`going_on` of `members` go on to the next layer."""

    members: int
    going_on: int

    @property
    def inverted(self) -> bool:
        """True if those are coded that are not in the next layer."""
        return 2 * self.going_on > self.members

    @property
    def coded(self) -> int:
        """The number of coded ones."""
        return self.members - self.going_on if self.inverted else self.going_on

    @cached_property
    def rice(self) -> int:
        """The parameter of the gaps' Rice codes."""
        return wire.shortest_rice(self.members, self.coded) if self.coded else 0

    @property
    def gaps(self) -> Expected:
        """The description of the coded gaps."""
        return wire.gap_bytes(self.coded, 1 if self.coded else 0, self.members, self.rice)

    @property
    def bits(self) -> float:
        """The expected bits of the gaps."""
        if not self.coded:
            return 0.0
        return self.coded * (self.rice + 1 / (1 - (1 - self.coded / self.members) ** (1 << self.rice)))


@dataclass(frozen=True)
class Rice:
    """Rice codes of `members` levels: `unary` bits of quotients by 2^b, and remainders of b bits."""

    members: int
    unary: int
    b: int

    @property
    def bits(self) -> int:
        """The bits of all."""
        return self.unary + self.members * self.b


def encode_levels(packed: Tensor, d: int, top: int, bits: int) -> Tensor:
    """Return the code of d levels from -top to top, uint8[...]; `packed` has level + top in `bits` bits each."""
    if not d:
        return packed
    # The sizes of all codes are predicted from how often each level occurs.
    levels: Tensor | None = None
    if loop := kernel("count_levels", device=packed.device):
        counts = loop(packed, d, top, bits)
    else:
        codes = wire.unpack(packed, bits, d)
        levels, counts = codes - top, torch.bincount(codes, minlength=2 * top + 1).tolist()
    layers, rice = _layers(_of_magnitudes(counts, top)), _shortest_rice(counts, top)
    # Layers: the gaps, two numbers of each layer in the header, and a sign for each level that is not 0.
    in_layers = sum(layer.bits + 2 * _width(d) for layer in layers) + (layers[0].going_on if layers else 0)
    are_large = len(layers) > 1 and sum(layer.going_on for layer in layers) > _LARGE * layers[0].going_on
    # Rice codes decode ten times as fast: where levels are large they may be 4% longer than layers.
    coded = None
    if rice.bits < min((_FOR_SPEED if are_large else 1.0) * in_layers, 8 * len(packed)):
        coded = _in_rice(packed, levels, d, top, bits, rice)
    elif in_layers < 8 * len(packed):
        coded = _in_layers(packed, levels, d, top, bits, layers)
    if coded is None or len(coded) > len(packed):
        return torch.cat([packed.new_tensor([_FIXED]), packed])
    return coded


def level_bytes(d: int, bits: int) -> Expected:
    """Return the description of what `encode_levels` codes at most d levels in."""
    return octets(0, bool(d) + math.ceil(d * bits / 8))


def decode_levels(coded: Tensor, d: int, top: int, bits: int) -> Tensor:
    """Return the levels that `encode_levels` coded, packed as they were given to it.

    Raises MessageError unless they are the code of d levels; a level in a fixed width may be above top.
    """
    code = _code_of(coded, d)
    if code == _FIXED:
        if len(coded) != bool(d) + math.ceil(d * bits / 8):
            raise MessageError("levels", f"{bool(d) + math.ceil(d * bits / 8)} bytes", len(coded))
        return coded[1:]
    levels = _from_rice(coded, d, top) if code == _RICE else _from_layers(coded, d, top)
    if int(levels.abs().amax()) > top:
        raise MessageError("levels", f"from {-top} to {top}", f"magnitude {int(levels.abs().amax())}")
    return wire.pack(levels + top, bits)


def add_coded_levels(coded: Tensor, top: int, bucket: int, norms: Tensor, out: Tensor, alpha: float) -> bool:
    """Add alpha level norm to out, float[d], by a compiled loop; return False where there is none, or nothing coded.

    Raises MessageError unless they are the code of d levels; out is then partly changed.
    """
    code, d = _code_of(coded, len(out)), len(out)
    if code == _RICE and (loop := kernel("add_rice_levels", out, norms)):
        complete = loop(coded[2:], top, _rice_parameter(coded), bucket, norms, out, alpha)
    elif code == _LAYERS and int(coded[1]) and (loop := kernel("add_coded_levels", out, norms)):
        layers, bodies, signs = _taken_apart(coded, d, top)
        complete = loop(_table(layers), bodies, signs, top, bucket, norms, out, alpha)
    else:
        return False
    if not complete:
        raise MessageError("levels", f"the code of {d} levels from {-top} to {top}", f"{len(coded)} bytes that are not")
    return True


def _code_of(coded: Tensor, d: int) -> int:
    """The code of d levels, of which all but that of a fixed width have a second byte."""
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
    """Return the counts of magnitudes 0 to top, of the counts of levels from -top on."""
    return [counts[top]] + [counts[top - m] + counts[top + m] for m in range(1, top + 1)]


def _shortest_rice(counts: Sequence[int], top: int) -> Rice:
    """The Rice codes of fewest bits, of levels of which there are counts[level + top]."""
    members = np.array(counts)
    folded = _folded(torch.arange(-top, top + 1)).numpy()
    d = int(members.sum())
    codes = [Rice(d, int((members * ((folded >> b) + 1)).sum()), b) for b in range(MOST_BITS)]
    return min(codes, key=lambda code: code.bits)


def _folded(levels: Tensor) -> Tensor:
    """Return 0, 1, 2, 3, 4, ... for levels 0, 1, -1, 2, -2, ..., int64[n]."""
    return torch.where(levels > 0, 2 * levels - 1, -2 * levels)


def _in_rice(packed: Tensor, levels: Tensor | None, d: int, top: int, bits: int, rice: Rice) -> Tensor:
    if loop := kernel("rice_levels", device=packed.device):
        body = loop(packed, d, top, bits, rice.b, rice.unary)
    else:
        assert levels is not None
        ends = torch.cumsum(_folded(levels) + 1, 0)  # as if they were gaps between these places
        body = wire.pack_gaps(ends - 1, d, int(ends[-1]), rice.b)
    return torch.cat([packed.new_tensor([_RICE, rice.b]), body])


def _from_rice(coded: Tensor, d: int, top: int) -> Tensor:
    """The levels, int64[d]."""
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
    """Return the levels that `_in_layers` coded, int64[d]."""
    layers, bodies, signs = _taken_apart(coded, d, top)
    levels = torch.zeros(d, dtype=torch.int64, device=coded.device)
    members = None
    # Each layer adds 1 to the magnitudes in it; its indices count the members of the layer before.
    for layer, body in zip(layers, bodies, strict=True):
        kept = max(1, layer.coded)
        index = wire.unpack_gaps(body, layer.coded, kept, layer.members, layer.rice, layer.members, "levels")
        if layer.inverted:
            goes_on = torch.ones(layer.members, dtype=torch.bool, device=coded.device)
            goes_on[index] = False
            index = goes_on.nonzero().squeeze(1)
        members = index if members is None else members[index]
        levels[members] += 1
    # A sign for each level that is not 0, in the order of coordinates.
    if layers:
        negative = wire.unpack_bits(signs, layers[0].going_on)
        levels[levels > 0] *= torch.where(negative, -1, 1)
    return levels


def _layers(counts: Sequence[int]) -> list[Layer]:
    """The layers of levels, from the counts of the magnitudes 0, 1, ...."""
    members, layers = sum(counts), []
    for count in counts:
        if members == count:
            break
        layers.append(Layer(members, members - count))
        members -= count
    return layers


def _table(layers: Sequence[Layer]) -> list[tuple[int, int, int, bool]]:
    """Return the arguments of compiled loops: members, number of coded ones, Rice parameter, inverted or not."""
    return [(layer.members, layer.coded, layer.rice, layer.inverted) for layer in layers]


def _taken_apart(coded: Tensor, d: int, top: int) -> tuple[list[Layer], list[Tensor], Tensor]:
    """The layers, their gaps, and the signs, of the lengths that they must have."""
    count, width = int(coded[1]), _width(d)
    start = 2 + math.ceil(2 * count * width / 8)
    if count > top or start > len(coded):
        raise MessageError("levels", f"of at most {top} layers, and their sizes", f"{count} in {len(coded)} bytes")
    # Each layer has members of the one before, a body for them, and the signs of the first are the rest.
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
    """Bits of a number of coordinates, or of bytes of a layer."""
    return (d + 16).bit_length()
