"""Rounding of the sent values to formats of fewer bits, in blocks of values with one scale or a few levels each.

In "int8", in "int4" and in the three floating-point formats, a value is divided by the largest magnitude of its block
(the scale) and rounded to nearest. "int2" stores the sign of each value and one of two levels: the magnitudes of a
block are split at their mean, and a level is the mean of the magnitudes in a part. "int4" and "int2" send scales and
levels in 16 bits, relative to the largest scale or level in the vector.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from packsaddle.compressors.parts import Expected, check_magnitudes, check_padding, floats, octets
from packsaddle.compressors.wire import pack, unpack
from packsaddle.errors import MessageError
from packsaddle.numerics.devices import widened
from packsaddle.numerics.kernels import kernel

ValueFormat = Literal["float32", "bfloat16", "float16", "int8", "int4", "int2"]
FORMATS = get_args(ValueFormat)
VALUE_BLOCK = 256  # number of consecutive values that are encoded with the same scale or levels
_LARGEST = {"int8": 127, "int4": 7}
_PACKED = {"int4": 4, "int2": 2}  # bits per value; a last byte is the number of values mod 8
_DTYPES = {name: getattr(torch, name) for name in FORMATS if name not in _PACKED}
_SCALE_SHIFT = 15  # a scale is a float32 without its sign and its last 15 bits: 8 bits of exponent, 8 of mantissa
_SCALE_UNIT = 2.0**126  # the largest scale is normalized to this, to use the full range of exponents
# Largest valid 16-bit code of a scale. It stands for a scale of almost 2 times the unit, i.e. the largest scale, which
# is sent as the part "unit" of a message. Codes for scales above the unit are valid, since a subnormal unit may have
# been rounded to less than the largest scale.
_MOST_SCALE = ((127 + 127) << (23 - _SCALE_SHIFT)) - 1


def check_format(owner: str, how: object) -> None:
    """Raise ValueError unless `how` is one of the value formats, such as "int8". The error names `owner`, the class
    with the argument `values`."""
    if how not in FORMATS:
        raise ValueError(f"values of {owner} must be one of {', '.join(FORMATS)}, got {how!r}")


def encode_values(values: Tensor, how: ValueFormat | None) -> dict[str, Tensor]:
    """Encode `values`, float[k], in the format `how`. Returns the parts of a message by name.

    The part "values" contains the coded values, and "scales" one scale, or two levels, for each block. In "int4" and
    "int2", "scales" are in 16 bits and relative to the third part, "unit", float[1]. If `how` is None, the only part is
    "values", with the values unchanged.
    """
    if how is None:
        return {"values": values}
    if not len(values):
        coded = values.to(torch.uint8 if how in _PACKED else _DTYPES[how])
        return {"values": coded, **(_scales_to_16_bits(values, values.dtype) if how in _PACKED else {"scales": values})}
    if how == "int2":
        packed, levels = _split_at_means(values)
        return {"values": _counted(packed, len(values)), **_scales_to_16_bits(levels.view(-1), values.dtype)}
    blocks = _in_blocks(values)
    # Divide by the largest magnitude of the block, so that values of any scale fit the format.
    scales = blocks.abs().amax(1)
    parts = {"scales": scales}
    # Divide by the scale after its rounding to 16 bits, since the receiver multiplies by the rounded scale.
    if how in _PACKED:
        parts = _scales_to_16_bits(scales, values.dtype)
        scales = _scales_of(parts, values.dtype)
    if how == "int4" and (loop := kernel("pack_four_bits", values, scales)):
        return {"values": _counted(loop(values, scales, VALUE_BLOCK), len(values)), **parts}
    unit = torch.where(scales[:, None] > 0, blocks / scales[:, None], blocks).view(-1)[: len(values)]
    if how not in _LARGEST:
        return {"values": unit.to(_DTYPES[how]), **parts}
    rounded = (unit * _LARGEST[how]).round().clamp_(-_LARGEST[how], _LARGEST[how])
    if how == "int8":
        return {"values": rounded.to(torch.int8), **parts}
    return {"values": _counted(pack((rounded + 8).to(torch.int64), 4), len(values)), **parts}


def _in_blocks(values: Tensor) -> Tensor:
    """Return `values`, a tensor [k], reshaped to rows of one block of 256 values each. The last row is padded with
    zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % VALUE_BLOCK)).view(-1, VALUE_BLOCK)


def _split_at_means(values: Tensor) -> tuple[Tensor, Tensor]:
    """Encode each value as its sign and the index of one of two levels of its block. Returns the packed codes of all
    values, uint8[...], and the levels of each block, float64[blocks, 2]."""
    # Only float32 values use the compiled loop. The loop adds them in float64, in an arbitrary order, which is correct
    # for float32 values, since their sums in float64 are almost exact.
    if values.dtype == torch.float32 and (loop := kernel("pack_two_levels", values)):
        coded: tuple[Tensor, Tensor] = loop(values, VALUE_BLOCK)
        return coded
    # Padding is excluded from the means.
    blocks = _in_blocks(values)
    there = (torch.arange(blocks.numel(), device=values.device) < len(values)).view_as(blocks)
    magnitudes = widened(blocks.abs())
    above = magnitudes > _means(magnitudes, there)
    levels = torch.cat([_means(magnitudes, there & ~above), _means(magnitudes, there & above)], 1)
    codes = 2 * (blocks < 0).to(torch.int64) + above
    return pack(codes.view(-1)[: len(values)], 2), levels


def _means(magnitudes: Tensor, members: Tensor) -> Tensor:
    """Return the mean of the magnitudes in each row of a matrix, float[n, 1], over the elements for which `members`,
    bool[n, b], is True. It is 0 for a row without such elements."""
    return torch.where(members, magnitudes, 0.0).sum(1, keepdim=True) / members.sum(1, keepdim=True).clamp_min(1)


def _scales_to_16_bits(scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Encode nonnegative scales, float[m], in 16 bits. Returns two parts of a message: "scales", int16[m], and "unit",
    the largest scale in `dtype`.

    The relative error of a scale is at most 2^-9, but larger for scales below 2^-252 times the largest scale. The unit
    is non-finite if any scale is non-finite.
    """
    unit = (scales.amax(0, keepdim=True) if len(scales) else scales).to(dtype)
    ratio = torch.where(unit > 0, widened(scales) / widened(unit), 0.0)
    bits = (ratio * _SCALE_UNIT).to(torch.float32).view(torch.int32)
    return {"scales": ((bits + (1 << (_SCALE_SHIFT - 1))) >> _SCALE_SHIFT).to(torch.int16), "unit": unit}


def _scales_of(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    if "unit" not in parts:
        return parts["scales"].to(dtype)
    bits = (parts["scales"].to(torch.int32) & 0xFFFF) << _SCALE_SHIFT
    return (widened(bits.view(torch.float32)) / _SCALE_UNIT * widened(parts["unit"])).to(dtype)


def check_values(parts: Mapping[str, Tensor], how: ValueFormat | None) -> None:
    """Raise MessageError if `parts`, the parts of a message, contain a value or a scale that `encode_values` never
    writes in the format `how`. The dtypes and lengths of `parts` must match `value_parts`. No-op on a GPU: the check
    would synchronize."""
    coded = parts["values"]
    if how is None or coded.device.type != "cpu" or not len(coded):
        return
    if how not in _LARGEST and how not in _PACKED:
        check_magnitudes("values", coded, 1.0)
        return
    # Codes of values that are not finite are arbitrary.
    if not bool(parts["unit" if how in _PACKED else "scales"].isfinite().all()):
        return
    if how == "int8":
        if int(coded.min()) < -_LARGEST[how]:
            raise MessageError("values", f"codes of at least {-_LARGEST[how]}", int(coded.min()))
        return
    most = int((parts["scales"].to(torch.int32) & 0xFFFF).max())
    if most > _MOST_SCALE:
        raise MessageError("scales", f"codes of at most {_MOST_SCALE}", most)
    *packed, used = torch.split(coded, [len(coded) - 1, 1])
    check_padding("values", packed[0], _PACKED[how] * int(used))
    if how == "int4" and _has_zero_code(packed[0], is_odd=bool(used & 1)):
        raise MessageError("values", "codes of at least 1 in four bits", 0)


def _has_zero_code(packed: Tensor, *, is_odd: bool) -> bool:
    """Return True if one of the four-bit codes in `packed`, uint8[n], is 0. If `is_odd` is True, the last four bits are
    no code."""
    whole = packed[: len(packed) - is_odd]
    if is_odd and int(packed[-1]) < 16:
        return True
    if loop := kernel("has_zero_code", device=packed.device):
        found: bool = loop(whole)
        return found
    return bool(len(whole)) and (int(whole.min()) < 16 or int((whole & 15).min()) == 0)


def decode_values(parts: Mapping[str, Tensor], how: ValueFormat | None, dtype: torch.dtype, k: int) -> Tensor:
    """Invert `encode_values`: return the k values that `parts` encodes in the format `how`, as a tensor in `dtype`.
    `parts` must have passed `check_values`."""
    if how is None:
        return parts["values"].to(dtype)
    scales = _scales_of(parts, dtype)
    if how == "int2" and (loop := kernel("add_two_levels", scales)):
        values = scales.new_zeros(k)
        loop(parts["values"][:-1], VALUE_BLOCK, scales, values)
        return values
    whole = unpack(parts["values"][:-1], _PACKED[how], k) if how in _PACKED else parts["values"]
    if how == "int2":
        levels = scales.view(-1, 2)
        return torch.cat([levels, -levels], 1).gather(1, _in_blocks(whole)).view(-1)[:k]
    values = (whole - 8 if how == "int4" else whole).to(dtype)
    if how in _LARGEST:
        values = values / _LARGEST[how]
    return values * scales.repeat_interleave(VALUE_BLOCK)[:k]


def add_values(parts: Mapping[str, Tensor], how: ValueFormat, out: Tensor, alpha: float) -> None:
    """Decode the values in `parts`, the output of `encode_values` in the format `how`, and add alpha times the values
    to out, float[k], in place."""
    if how == "int2" and (loop := kernel("add_two_levels", out)):
        loop(parts["values"][:-1], VALUE_BLOCK, _scales_of(parts, out.dtype).mul_(alpha), out)
    elif how == "int4" and (loop := kernel("add_four_bits", out)):
        loop(parts["values"][:-1], VALUE_BLOCK, _scales_of(parts, out.dtype), out, alpha)
    else:
        out.add_(decode_values(parts, how, out.dtype, len(out)), alpha=alpha)


def value_parts(k: int, how: ValueFormat | None) -> dict[str, Expected]:
    """Return the expected dtype and length of each part of a message in which `encode_values` encodes k values in the
    format `how`."""
    if how is None:
        return {"values": floats(k)}
    blocks = math.ceil(k / VALUE_BLOCK)
    if how not in _PACKED:
        return {"values": Expected((_DTYPES[how],), k, k), "scales": floats(blocks)}
    values = octets(math.ceil(k * _PACKED[how] / 8) + 1, last=k % 8) if k else octets(0)
    scales = 2 * blocks if how == "int2" else blocks
    return {"values": values, "scales": Expected((torch.int16,), scales, scales), "unit": floats(min(k, 1))}


def value_count(parts: Mapping[str, Tensor], how: ValueFormat | None) -> int:
    coded = parts["values"].flatten()
    if how not in _PACKED or not coded.numel():
        return coded.numel()
    most = (len(coded) - 1) * 8 // _PACKED[how]
    return max(0, most - (most - int(coded[-1].to(torch.uint8))) % 8)


def _counted(packed: Tensor, k: int) -> Tensor:
    """Append a byte with k modulo 8 to the bytes `packed`, which encode k values, so that a receiver can compute k."""
    return torch.cat([packed, packed.new_full((1,), k % 8)])


def value_retention(how: ValueFormat | None) -> float:
    """Return a lower bound on the fraction of the energy that a format retains, 1 - ||v - round(v)||^2 / ||v||^2. If
    `how` is None, values are not rounded, and the bound is 1.

    int8 and int4: let m be the largest magnitude in a block of b values, and l the number of positive levels. The error
    of a value is at most m / (2 l), and at most the magnitude of the value. So the fraction of the energy that is lost
    is at most (b - 1) / (4 l^2 + b - 1). Rounding the scale of int4 to 16 bits changes the scale by at most 2^-9 of m,
    which reduces the retained energy by less than 2^-7 of it. bfloat16 has a unit roundoff of 2^-8, float16 of 2^-11
    and float32 of 2^-24; the bounds leave room for subnormals and the rounding of the scaling.

    int2: the magnitudes of the block are split at their mean a. The magnitudes above a have a sum S, a mean m and a
    maximum M. Their energy is at most S M, of which S m is retained. The energy of the other magnitudes is at most
    b a^2. The retained energy is at least b a^2, the energy of b values with the magnitude a. The smallest fraction
    found is 6.7 / b, for one large magnitude among b / 3 magnitudes at the mean, so this function returns 4 / b.
    """
    if how is None:
        return 1.0
    if how == "int2":
        return 4 / VALUE_BLOCK
    if how in _LARGEST:
        twice = (2 * _LARGEST[how]) ** 2
        return twice / (twice + VALUE_BLOCK - 1) * (1 if how == "int8" else 1 - 2.0**-7)
    return 1 - (2.0**-16 if how == "bfloat16" else 2.0**-20)
