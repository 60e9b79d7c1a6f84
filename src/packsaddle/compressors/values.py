"""Values in fewer bits: formats to which what is sent of a vector is rounded, in blocks that share a scale.

In units of its block's largest magnitude no value overflows a format or sinks below it, whatever its scale. Rounding is
to nearest, but for "int2": a sign, and a bit that says whether the magnitude is above its block's mean; it stands for
the mean of the magnitudes on its side, as in the first step of Lloyd's algorithm.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from packsaddle.compressors.wire import pack, unpack

ValueFormat = Literal["float32", "bfloat16", "float16", "int8", "int4", "int2"]
FORMATS = get_args(ValueFormat)
VALUE_BLOCK = 256  # values that share a scale
_LARGEST = {"int8": 127, "int4": 7}
_PACKED = {"int4": 4, "int2": 2}  # bits of what is packed in bytes; a last byte has the number of values modulo 4


def encode_values(values: Tensor, how: ValueFormat | None) -> dict[str, Tensor]:
    """Round float[k] values to a format (None: as they are): "values", and "scales" shared by blocks."""
    if how is None:
        return {"values": values}
    if not len(values):
        return {"values": values.to(torch.uint8 if how in _PACKED else _dtype(how)), "scales": values}
    blocks = torch.nn.functional.pad(values, (0, -len(values) % VALUE_BLOCK)).view(-1, VALUE_BLOCK)
    if how == "int2":
        return _two_levels(values, blocks)
    scales = blocks.abs().amax(1)
    unit = torch.where(scales[:, None] > 0, blocks / scales[:, None], blocks).view(-1)[: len(values)]
    if how not in _LARGEST:
        return {"values": unit.to(_dtype(how)), "scales": scales}
    rounded = (unit * _LARGEST[how]).round()
    if how == "int8":
        return {"values": rounded.to(torch.int8), "scales": scales}
    return {"values": _packed((rounded + 8).to(torch.int64), 4), "scales": scales}


def _two_levels(values: Tensor, blocks: Tensor) -> dict[str, Tensor]:
    """A sign and a level each, and two levels a block. The padding of the last block is in neither level."""
    magnitudes = blocks.abs().double()
    there = torch.ones_like(values, dtype=torch.bool)
    there = torch.nn.functional.pad(there, (0, blocks.numel() - len(values))).view_as(blocks)
    mean = magnitudes.sum(1, keepdim=True) / there.sum(1, keepdim=True)
    above = magnitudes > mean
    levels = []
    for side in (there & ~above, above):
        levels.append((magnitudes * side).sum(1) / side.sum(1).clamp_min(1))
    codes = 2 * (blocks < 0).to(torch.int64) + above
    scales = torch.stack(levels, 1).view(-1).to(values.dtype)
    return {"values": _packed(codes.view(-1)[: len(values)], 2), "scales": scales}


def decode_values(parts: Mapping[str, Tensor], how: ValueFormat | None, dtype: torch.dtype) -> Tensor:
    """Return the float[k] values of `encode_values`."""
    if how is None:
        return parts["values"].to(dtype)
    k, scales = value_count(parts, how), parts["scales"].to(dtype)
    if how == "int2":
        return _of_two_levels(unpack(parts["values"][:-1], 2, k).to(torch.uint8), scales)
    whole = unpack(parts["values"][:-1], 4, k) - 8 if how == "int4" else parts["values"]
    values = whole.to(dtype)
    if how in _LARGEST:
        values = values / _LARGEST[how]
    return values * scales.repeat_interleave(VALUE_BLOCK)[:k]


def _of_two_levels(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of uint8[k] codes."""
    blocks = torch.nn.functional.pad(codes, (0, -len(codes) % VALUE_BLOCK)).view(-1, VALUE_BLOCK)
    low, high = scales.view(-1, 2).unbind(1)
    found = torch.where((blocks & 1).bool(), high[:, None], low[:, None])
    return torch.where(blocks >= 2, -found, found).view(-1)[: len(codes)]


def value_count(parts: Mapping[str, Tensor], how: ValueFormat | None) -> int:
    """Return k, the number of values in a message."""
    coded = parts["values"]
    if how not in _PACKED or not len(coded):
        return len(coded)
    whole = (len(coded) - 1) * (8 // _PACKED[how])
    return whole - (whole - int(coded[-1])) % 4


def _packed(numbers: Tensor, width: int) -> Tensor:
    """Pack numbers, and how many there are modulo 4."""
    return torch.cat([pack(numbers, width), numbers.new_tensor([len(numbers) % 4]).to(torch.uint8)])


def _dtype(how: ValueFormat) -> torch.dtype:
    found: torch.dtype = getattr(torch, how)
    return found


def value_retention(how: ValueFormat | None) -> float:
    """A lower bound on 1 - ||v - round(v)||^2 / ||v||^2.

    int8 and int4: in a block with largest magnitude m, errors are at most m / (2 l) for l levels and never above the
    value, so the share lost is at most (b - 1) / (4 l^2 + b - 1) for b values. bfloat16 has a unit roundoff of 2^-8,
    float16 of 2^-11 and float32 of 2^-24; the room left is for subnormals and the rounding of the scaling itself. int2:
    above the mean a, magnitudes of mean m_a keep S_a m_a of at most S_a M; those below have at most b a^2, which a mean
    of all would keep. The worst found is 8 / b, one magnitude of b / 2 means among as many at the mean; half of it is
    stated. (Gaussian tails keep 0.97.)
    """
    if how is None:
        return 1.0
    if how == "int2":
        return 4 / VALUE_BLOCK
    if how in _LARGEST:
        twice = (2 * _LARGEST[how]) ** 2
        return twice / (twice + VALUE_BLOCK - 1)
    return 1 - (2.0**-16 if how == "bfloat16" else 2.0**-20)


def value_bytes(k: int, how: ValueFormat | None, itemsize: int) -> int:
    """Bytes of k values of a vector whose own dtype takes `itemsize` bytes."""
    if how is None:
        return itemsize * k
    blocks = math.ceil(k / VALUE_BLOCK)
    if how in _PACKED:
        return (math.ceil(k * _PACKED[how] / 8) + 1 if k else 0) + blocks * itemsize * (2 if how == "int2" else 1)
    return {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[how] * k + blocks * itemsize
