"""Levels of a quantizer in about as many bits as their entropy.

Most of them are 0, and the larger the fewer. So they are coded in layers: which coordinates are not 0, which of these
are above 1 in magnitude, which of those above 2, and so on; each layer is a set among the members of the one before,
coded by the gaps between those that go on, or that do not, whichever are fewer. Signs of what is not 0 follow, a bit
each. Where codes of a fixed width take fewer bytes, they are sent. The first byte says which.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.compressors import wire
from packsaddle.numerics.kernels import kernel

_FIXED, _LAYERS = 0, 1
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

    @property
    def rice(self) -> int:
        """The parameter of the gaps' Rice codes."""
        return wire.shortest_rice(self.members, self.coded) if self.coded else 0

    @property
    def bits(self) -> float:
        """The expected bits of the gaps."""
        if not self.coded:
            return 0.0
        return self.coded * (self.rice + 1 / (1 - (1 - self.coded / self.members) ** (1 << self.rice)))


def encode_levels(packed: Tensor, d: int, top: int, bits: int) -> Tensor:
    """Code d levels from -top to top, which are `packed` as numbers level + top of `bits` bits, uint8[...]."""
    if not d:
        return packed
    loop = kernel("code_levels", device=packed.device)
    codes = None if loop else wire.unpack(packed, bits, d) - top
    layers = _layers(_counts(packed, d, top, bits) if codes is None else torch.bincount(codes.abs()).tolist())
    going_on = layers[0].going_on if layers else 0
    if sum(layer.bits for layer in layers) + going_on >= 8 * len(packed):
        return torch.cat([packed.new_tensor([_FIXED]), packed])
    bodies, signs = loop(packed, d, top, bits, _table(layers)) if loop else _bodies(codes, layers)
    sizes = [number for layer, body in zip(layers, bodies, strict=True) for number in (layer.going_on, len(body))]
    head = wire.pack(torch.tensor(sizes, dtype=torch.int64, device=packed.device), _width(d))
    coded = torch.cat([packed.new_tensor([_LAYERS, len(layers)]), head, *bodies, signs])
    return coded if len(coded) <= len(packed) else torch.cat([packed.new_tensor([_FIXED]), packed])


def decode_levels(coded: Tensor, d: int, top: int, bits: int) -> Tensor:
    """Return the levels that `encode_levels` coded, packed as they were given to it."""
    if not d or int(coded[0]) == _FIXED:
        return coded[1:]
    layers, bodies, signs = _taken_apart(coded, d)
    levels = torch.zeros(d, dtype=torch.int64, device=coded.device)
    members = None
    for layer, body in zip(layers, bodies, strict=True):
        index = wire.unpack_gaps(body, layer.coded, max(1, layer.coded), layer.members, layer.rice)
        if layer.inverted:
            goes_on = torch.ones(layer.members, dtype=torch.bool, device=coded.device)
            goes_on[index] = False
            index = goes_on.nonzero().squeeze(1)
        members = index if members is None else members[index]
        levels[members] += 1
    if layers:
        negative = wire.unpack_bits(signs, layers[0].going_on)
        levels[levels > 0] *= torch.where(negative, -1, 1)
    return wire.pack(levels + top, bits)


def add_coded_levels(coded: Tensor, top: int, bucket: int, norms: Tensor, out: Tensor, alpha: float) -> bool:
    """Add alpha level norm to out, float[d], by a compiled loop; return False where there is no loop or no layer."""
    loop = kernel("add_coded_levels", out, norms)
    if loop is None or not len(out) or int(coded[0]) != _LAYERS or not int(coded[1]):
        return False
    layers, bodies, signs = _taken_apart(coded, len(out))
    loop(_table(layers), bodies, signs, top, bucket, norms, out, alpha)
    return True


def _layers(counts: Sequence[int]) -> list[Layer]:
    """The layers of levels, from the counts of the magnitudes 0, 1, ...."""
    members, layers = sum(counts), []
    for count in counts:
        if members == count:
            break
        layers.append(Layer(members, members - count))
        members -= count
    return layers


def _counts(packed: Tensor, d: int, top: int, bits: int) -> list[int]:
    loop = kernel("count_levels", device=packed.device)
    assert loop is not None
    counts: list[int] = loop(packed, d, top, bits)
    return counts


def _table(layers: Sequence[Layer]) -> list[tuple[int, int, int, bool]]:
    """Return the arguments of compiled loops: members, number of coded ones, Rice parameter, inverted or not."""
    return [(layer.members, layer.coded, layer.rice, layer.inverted) for layer in layers]


def _bodies(levels: Tensor | None, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor]:
    """The gaps of each layer and the signs, of int64[d] levels."""
    assert levels is not None
    bodies, magnitudes = [], levels.abs()
    for j, layer in enumerate(layers):
        goes_on = magnitudes > j
        index = (goes_on != layer.inverted).nonzero().squeeze(1)
        bodies.append(wire.pack_gaps(index, max(1, layer.coded), layer.members, layer.rice))
        magnitudes = magnitudes[goes_on]
    return bodies, wire.pack_bits(levels[levels != 0] < 0)


def _taken_apart(coded: Tensor, d: int) -> tuple[list[Layer], list[Tensor], Tensor]:
    """The layers, their gaps, and the signs."""
    count, width = int(coded[1]), _width(d)
    start = 2 + math.ceil(2 * count * width / 8)
    sizes = wire.unpack(coded[2:start], width, 2 * count).tolist()
    going_on, lengths = sizes[::2], sizes[1::2]
    layers = [Layer(members, k) for members, k in zip([d, *going_on], going_on, strict=False)]
    *bodies, signs = torch.split(coded[start:], [*lengths, len(coded) - start - sum(lengths)])
    return layers, bodies, signs


def _width(d: int) -> int:
    """Bits of a number of coordinates, or of bytes of a layer."""
    return (d + 16).bit_length()
