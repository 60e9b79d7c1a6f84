"""The parts that a message must have: names, dtypes and lengths, compared before anything is decoded.

What only decoding can find (indices out of order, codes that end too early) the decoders find: compiled loops stay
within their arrays whatever these contain, and return whether the message was complete. Both raise MessageError.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packsaddle.errors import MessageError
from packsaddle.messages import shown

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Expected(NamedTuple):
    """The dtypes that a part may have, and its number of elements, from `least` to `most`."""

    dtypes: tuple[torch.dtype, ...]
    least: int
    most: int
    last: int | None = None  # the value of the last element. None: any

    def __str__(self) -> str:
        kind = str(self.dtypes[0]).removeprefix("torch.") if len(self.dtypes) == 1 else "float"
        length = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"{kind}[{length}]" + ("" if self.last is None else f" that ends with {self.last}")

    def nbytes(self, itemsize: int) -> int:
        """Return the most bytes of the part, in a message of a vector with elements of `itemsize` bytes."""
        sizes = [dtype.itemsize for dtype in self.dtypes]
        return self.most * min(max(itemsize, min(sizes)), max(sizes))

    def describes(self, part: Tensor) -> bool:
        """Return True if a flat part has such a dtype, length and end."""
        fits = part.dtype in self.dtypes and self.least <= part.numel() <= self.most
        return fits and (self.last is None or int(part[-1]) == self.last)


def floats(n: int, *dtypes: torch.dtype) -> Expected:
    """Return the description of n floating-point numbers, of any such dtype by default."""
    return Expected(dtypes or _FLOATING, n, n)


def octets(least: int, most: int | None = None, last: int | None = None) -> Expected:
    """Return the description of `least` bytes, or of `least` to `most`."""
    return Expected((torch.uint8,), least, least if most is None else most, last)


def check_expected(parts: Mapping[str, Tensor], expected: Mapping[str, Expected], d: int) -> None:
    """Raise MessageError unless parts are flat, and the expected ones of a vector of d coordinates."""
    if parts.keys() != expected.keys():
        raise MessageError("parts", ", ".join(sorted(expected)), ", ".join(sorted(parts)) or "none")
    for name, part in parts.items():
        if part.ndim != 1:
            raise MessageError(name, "flat", f"shape {tuple(part.shape)}")
        if not expected[name].describes(part):
            end = "" if expected[name].last is None or not len(part) else f" that ends with {part[-1]}"
            found = f"{str(part.dtype).removeprefix('torch.')}[{len(part)}]{end}"
            raise MessageError(name, f"{expected[name]} for {d} coordinates", found)


def check_magnitudes(part: str, numbers: Tensor, most: float) -> None:
    """Raise MessageError if one of float[n] numbers is above `most` in magnitude; a NaN is not, and reaches the guard.

    No-op elsewhere than on the CPU: the device would have to be waited for.
    """
    if numbers.device.type == "cpu" and len(numbers):
        low, high = map(float, torch.aminmax(numbers))
        if high > most or low < -most:
            raise MessageError(part, f"at most {most:g} in magnitude", f"{low:g} to {high:g}")


class decoding:  # noqa: N801 -- a context manager, which costs a fifth of one by contextlib
    """Name the compressor in a MessageError that is raised inside, and put `prefix` before the name of the part."""

    def __init__(self, compressor: Any, prefix: str = "") -> None:
        self._compressor, self._prefix = compressor, prefix

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, MessageError):
            part = self._prefix + error.part
            raise MessageError(part, error.expected, error.found, shown(self._compressor)) from None
