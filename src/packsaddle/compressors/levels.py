"""Entropy coding of a quantizer's integer levels. The first byte of a message selects one of three codes.

*Layers* are for mostly small levels. Layer j is the set of coordinates whose level has a magnitude above j, so it is a
subset of layer j - 1. It is coded by the gaps between its elements. If fewer elements of layer j - 1 are outside of
layer j than in it, the gaps between the elements outside of layer j are coded instead. One sign bit per nonzero level
follows.

*Rice codes* are for large levels. The levels 0, 1, -1, 2, -2, ... are numbered 0, 1, 2, 3, 4, ..., and the number of
each level is sent as a Rice code. This is nearly as short as layers, and much faster.

*Fixed width* is used if neither of the two other codes is shorter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from packsaddle.compressors import wire
from packsaddle.compressors.parts import Expected, check_padding, octets, require
from packsaddle.errors import MessageError
from packsaddle.numerics.devices import indices_where, read, to_device
from packsaddle.numerics.kernels import kernel

_FIXED, _LAYERS, _RICE = 0, 1, 2
# For large levels, Rice codes are chosen if their length is below this multiple of the length of the code in layers,
# since they are ten times as fast as layers.
_FOR_SPEED = 1.04
_LARGE = 2.0  # levels are called large if the nonzero levels have a mean magnitude above this
_SLAB = 1 << 22  # levels counted at a time on a GPU
MOST_BITS = 8  # largest fixed width, in bits, of levels that can be entropy-coded


@dataclass(frozen=True)
class Layer:
    """Sizes of layer j of a vector that is quantized to integer levels. The members are the coordinates whose level has
    a magnitude of at least j, and the layer is the subset of the members whose level has a magnitude above j."""

    members: int  # number of coordinates whose level has a magnitude of at least j
    going_on: int  # number of coordinates with a magnitude above j, i.e. `members` of layer j + 1

    @property
    def inverted(self) -> bool:
        """True if the code of layer j lists the coordinates whose level has a magnitude of exactly j, because they are
        fewer than those with a larger magnitude."""
        return 2 * self.going_on > self.members

    @property
    def coded(self) -> int:
        return self.members - self.going_on if self.inverted else self.going_on

    @cached_property
    def rice(self) -> int:
        """The parameter of the Rice code of this layer's gaps, i.e. the number of bits of each remainder. A gap is the
        number of members between two coordinates that the code lists."""
        return wire.shortest_rice(self.members, self.coded) if self.coded else 0

    @property
    def gaps(self) -> Expected:
        most = wire.gap_bits(self.members, self.coded, self.rice)
        return octets(*(wire.rice_bytes(self.coded, self.rice, unary) for unary in (self.coded, most)))

    @property
    def bits(self) -> float:
        if not self.coded:
            return 0.0
        return self.coded * (self.rice + 1 / (1 - (1 - self.coded / self.members) ** (1 << self.rice)))


def histogram(codes: Tensor) -> Tensor:
    """Count the occurrences of each value in `codes`, uint8[d]. Returns the counts of the values 0 to 255, int64[256].
    If `codes` is on a GPU, the host does not wait for the result."""
    if loop := kernel("count_codes", device=codes.device):
        counts: Tensor = loop(codes)
        return counts
    if codes.device.type == "cpu":
        return torch.bincount(codes, minlength=256)
    # Count in 64 histograms, so that fewer additions wait for the same counter, and in pieces, to bound memory.
    counts = torch.zeros(64 * 256, dtype=torch.int64, device=codes.device)
    for slab in torch.split(codes, _SLAB):
        places = torch.arange(len(slab), device=codes.device).remainder_(64).mul_(256).add_(slab)
        counts.scatter_add_(0, places, torch.ones_like(places))
    return counts.view(64, 256).sum(0)


def encode_levels(codes: Tensor, top: int, bits: int, counts: Tensor | None = None) -> Tensor:
    """Entropy-code d integer levels, which are from -top to top. Returns the code as uint8[...].

    Args:
        codes: The sums level + top, uint8[d].
        top: The largest level.
        bits: The number of bits of each level in the fixed-width code, the third code that this module describes.
        counts: The `histogram` of `codes`, int64[256] on the CPU. If it is None, it is computed here, and the host
            waits for it if `codes` is on a GPU.
    """
    d = len(codes)
    if not d:
        return codes
    # Predict the size of each code from the histogram of the levels. The code in layers consists of a header (two
    # numbers for each layer), the coded gaps, and one sign bit for each nonzero level.
    fixed = math.ceil(d * bits / 8)
    counts = (histogram(codes).cpu() if counts is None else counts)[: 2 * top + 1]
    numbers, members, layers = counts.tolist(), d, list[Layer]()
    for m in range(top + 1):
        going_on = members - numbers[top + m] - (numbers[top - m] if m else 0)
        if not going_on:
            break
        layers.append(Layer(members, going_on))
        members = going_on
    folded = _folded(torch.arange(2 * top + 1, dtype=torch.uint8), top).long()
    in_layers = sum(layer.bits + 2 * _width(d) for layer in layers) + (layers[0].going_on if layers else 0)
    in_rice = [int((counts * ((folded >> b) + 1 + b)).sum()) for b in range(MOST_BITS)]
    b = min(range(MOST_BITS), key=in_rice.__getitem__)
    # For large levels prefer Rice codes, which are faster than layers.
    are_large = len(layers) > 1 and sum(layer.going_on for layer in layers) > _LARGE * layers[0].going_on
    coded = None
    if in_rice[b] < min((_FOR_SPEED if are_large else 1.0) * in_layers, 8 * fixed):
        coded = _headed((_RICE, b), wire.pack_rice(_folded(codes, top), b, in_rice[b] - d * b))
    elif in_layers < 8 * fixed:
        coded = _in_layers(codes, top, layers)
    if coded is None or len(coded) > fixed:
        return _headed((_FIXED,), wire.pack(codes, bits))
    return coded


def _headed(head: Sequence[int], *bodies: Tensor) -> Tensor:
    """Concatenate bytes in front of tensors. `head` contains the bytes as integers, and `bodies` the tensors,
    uint8[...] each. The host does not wait for a GPU."""
    return torch.cat([*(bodies[0].new_full((1,), number) for number in head), *bodies])


def level_bytes(d: int, bits: int) -> Expected:
    return octets(0, bool(d) + math.ceil(d * bits / 8))


def decode_levels(coded: Tensor, d: int, top: int, bits: int, head: Sequence[int]) -> Tensor:
    """Invert `encode_levels`: decode d integer levels, which are from -top to top. Returns the sums level + top,
    uint8[d]. Raises MessageError if `coded` is invalid.

    Args:
        coded: The output of `encode_levels`, uint8[...].
        d: The number of levels.
        top: The largest level.
        bits: The number of bits of each level in the fixed-width code, the third code that this module describes.
        head: The first two bytes of `coded`, or all bytes if `coded` is shorter.
    """
    code = head[0] if d and head else _FIXED
    if code not in (_FIXED, _LAYERS, _RICE) or (code != _FIXED and len(coded) < 2):
        raise MessageError("levels", f"in code {_FIXED}, {_LAYERS} or {_RICE}", f"code {code} in {len(coded)} bytes")
    if code == _FIXED:
        if len(coded) != bool(d) + math.ceil(d * bits / 8):
            raise MessageError("levels", f"{bool(d) + math.ceil(d * bits / 8)} bytes", len(coded))
        return unpack_levels(coded[1:], d, top, bits)
    if code == _LAYERS:
        return _from_layers(coded, d, top, head[1])
    if (b := head[1]) >= MOST_BITS:
        raise MessageError("levels", f"Rice codes with a parameter below {MOST_BITS}", b)
    folded, is_valid = wire.unpack_rice(coded[2:], d, b, 2 * top, torch.uint8)
    require(is_valid, "levels", f"the code of {d} levels from {-top} to {top}", f"{len(coded)} bytes that are not")
    # Invert `_folded`, modulo 256: an odd number n stands for the positive level (n + 1) / 2, and an even n for the
    # level -n / 2.
    return (folded + 1 >> 1).mul_((folded & 1).mul_(2).sub_(1)).add_(top)


def unpack_levels(packed: Tensor, d: int, top: int, bits: int) -> Tensor:
    """Unpack d codes of `bits` bits each. Returns uint8[d], or int32[d] if `bits` is above 8.

    A code is the sum level + top of an integer level, which is from -top to top. On the CPU, raises MessageError if a
    code is above 2 * top. On a GPU the codes are not checked, since the check would synchronize.
    """
    check_padding("levels", packed, d * bits)
    codes = wire.unpack(packed, bits, d, torch.uint8 if bits <= MOST_BITS else torch.int32)
    if d and codes.device.type == "cpu" and (largest := int(codes.max())) > 2 * top:
        raise MessageError("levels", f"codes of at most {2 * top}", largest)
    return codes


def _folded(codes: Tensor, top: int) -> Tensor:
    """Number the levels from -top to top: the levels 0, 1, -1, 2, -2, ... get the numbers 0, 1, 2, 3, 4, .... `codes`,
    uint8[d], contains the sums level + top. Returns the number of each level, uint8[d]."""
    return torch.maximum(codes, 2 * top - codes).sub_(top).mul_(2).sub_((codes > top).view(torch.uint8))


def _in_layers(codes: Tensor, top: int, layers: Sequence[Layer]) -> Tensor:
    d, signs, bodies, gaps = len(codes), codes[:0], list[Tensor](), list[Tensor]()
    for j, layer in enumerate(layers):
        if loop := kernel("pack_layer", device=codes.device):
            body, codes = loop(codes, top - j, top + j, layer.inverted, layer.rice, layer.coded, layer.going_on)
            bodies.append(body)
        else:
            goes_on = (codes < top - j) | (codes > top + j)
            members = indices_where(goes_on, layer.going_on)
            listed = indices_where(~goes_on, layer.coded) if layer.inverted else members
            gaps.append(wire.gaps_of(listed, max(1, layer.coded), layer.members))
            codes = codes.index_select(0, members)
        signs = wire.pack_bits(codes < top) if j == 0 else signs
    # On a GPU the host waits only once, for the sizes of all layers together.
    rice = [layer.rice for layer in layers[: len(gaps)]]
    unary = read(*(wire.unary_bits(listed, b) for listed, b in zip(gaps, rice, strict=True)))
    bodies += [wire.pack_rice(listed, b, n) for listed, b, n in zip(gaps, rice, unary, strict=True)]
    sizes = [number for layer, body in zip(layers, bodies, strict=True) for number in (layer.going_on, len(body))]
    head = wire.pack(to_device(torch.tensor(sizes, dtype=torch.int64), codes.device), _width(d))
    return _headed((_LAYERS, len(layers)), head, *bodies, signs)


def _from_layers(coded: Tensor, d: int, top: int, count: int) -> Tensor:
    """Decode `coded`, the output of `_in_layers` for `count` layers, to d integer levels, which are from -top to top.
    Returns the sums level + top, uint8[d]. Raises MessageError if the sizes in the header of `coded` contradict each
    other or the length of `coded`."""
    # The header has two numbers per layer: the number of coordinates in the layer, and the number of bytes of its coded
    # gaps.
    width = _width(d)
    start = 2 + math.ceil(2 * count * width / 8)
    if count > top or start > len(coded):
        raise MessageError("levels", f"of at most {top} layers, and their sizes", f"{count} in {len(coded)} bytes")
    check_padding("levels", coded[2:start], 2 * count * width)
    sizes = wire.unpack(coded[2:start], width, 2 * count).tolist()
    going_on, lengths = sizes[::2], sizes[1::2]
    layers = [Layer(members, k) for members, k in zip([d, *going_on], going_on, strict=False)]
    # After the header come the coded gaps of each layer, and one sign per nonzero level.
    nonzero = math.ceil((going_on or [0])[0] / 8)
    fit = all(0 < layer.going_on <= layer.members for layer in layers) and all(
        layer.gaps.least <= n <= layer.gaps.most for layer, n in zip(layers, lengths, strict=True)
    )
    if not fit or start + sum(lengths) + nonzero != len(coded):
        raise MessageError("levels", f"of layers that fit in {len(coded)} bytes", f"layers of {going_on} in {lengths}")
    *bodies, signs = torch.split(coded[start:], [*lengths, nonzero])
    check_padding("levels", signs, (going_on or [0])[0])
    codes = coded.new_full((d,), top)
    if not layers:
        return codes
    # The indices in a layer are positions among the coordinates of the previous layer. In the first layer, which is the
    # set of all nonzero levels, they are positions in the vector.
    places, magnitudes, members = coded[:0], coded[:0], None
    for layer, body in zip(layers, bodies, strict=True):
        kept = max(1, layer.coded)
        n = layer.members
        index = wire.unpack_gaps(body, layer.coded, kept, n, layer.rice, n, part="levels", padded=False)
        if layer.inverted:
            goes_on = torch.ones(layer.members, dtype=torch.bool, device=coded.device)
            goes_on.index_fill_(0, index, False)
            index = indices_where(goes_on, layer.going_on)
        if layer is layers[0]:
            places, magnitudes = index, coded.new_ones(len(index))
        else:
            members = index if members is None else members[index]
            magnitudes[members] += 1
    # There is one sign per nonzero level, in the order of coordinates. The arithmetic is modulo 256, so -1 is 255.
    negative = wire.unpack_bits(signs, len(places)).view(torch.uint8)
    return codes.scatter_(0, places, magnitudes * (1 - 2 * negative) + top)


def _width(d: int) -> int:
    return (d + 16).bit_length()
