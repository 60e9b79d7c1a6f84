"""Validation of received messages: names, dtypes and lengths of their parts are checked before decoding.

The decoders, in `Compressor.context_of`, detect invalid contents (indices out of order, truncated codes). Compiled
loops never index out of bounds, and return None for an invalid message; their callers then raise MessageError.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packsaddle.errors import MessageError
from packsaddle.messages import shown

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Checks = list[tuple[Tensor, MessageError]]  # pairs: a bool[] on a GPU, and the error to raise if the bool is False
# The list to which `require` appends its checks on a GPU; None: `require` raises errors immediately.
deferred: ContextVar[Checks | None] = ContextVar("packsaddle_checks", default=None)


class Expected(NamedTuple):
    """The allowed dtypes of one part of a message, and the range of its allowed lengths: `least` to `most` elements."""

    dtypes: tuple[torch.dtype, ...]
    least: int
    most: int
    last: int | None = None  # required value of the last element; None: any value is valid

    def __str__(self) -> str:
        kind = str(self.dtypes[0]).removeprefix("torch.") if len(self.dtypes) == 1 else "float"
        length = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"{kind}[{length}]" + ("" if self.last is None else f" that ends with {self.last}")

    def nbytes(self, itemsize: int) -> int:
        sizes = [dtype.itemsize for dtype in self.dtypes]
        return self.most * min(max(itemsize, min(sizes)), max(sizes))

    def describes(self, part: Tensor) -> bool:
        fits = part.dtype in self.dtypes and self.least <= part.numel() <= self.most
        is_read = self.last is not None and part.device.type == "cpu"  # on a GPU, reading the element would synchronize
        return fits and (not is_read or int(part[-1]) == self.last)


def floats(n: int, *dtypes: torch.dtype) -> Expected:
    """Return the expected dtypes and length of a part of a message that contains n numbers. Their dtype must be one of
    `dtypes`, or any floating-point dtype if `dtypes` is empty."""
    return Expected(dtypes or _FLOATING, n, n)


def octets(least: int, most: int | None = None, last: int | None = None) -> Expected:
    """Return the expected dtype, uint8, and length, `least` to `most` bytes, of a part of a message. If `most` is None,
    the length must be exactly `least`. If `last` is not None, it is the required value of the last byte."""
    return Expected((torch.uint8,), least, least if most is None else most, last)


def check_expected(parts: Mapping[str, Tensor], expected: Mapping[str, Expected], d: int) -> None:
    """Raise MessageError unless the `parts` of a message are flat and have the `expected` dtypes and lengths. The error
    names d, the length of the compressed vector."""
    if parts.keys() != expected.keys():
        raise MessageError("parts", ", ".join(sorted(expected)), ", ".join(sorted(parts)) or "none")
    for name, part in parts.items():
        if part.ndim != 1:
            raise MessageError(name, "flat", f"shape {tuple(part.shape)}")
        if not expected[name].describes(part):
            end = "" if expected[name].last is None or not len(part) else f" that ends with {part[-1]}"
            found = f"{str(part.dtype).removeprefix('torch.')}[{len(part)}]{end}"
            raise MessageError(name, f"{expected[name]} for {d} coordinates", found)


def check_padding(part: str, packed: Tensor, bits: int) -> None:
    """Raise MessageError if the bits after the first `bits` are not 0 in the last byte of `packed`, uint8[...]. The
    error names `part`, the part of the message that contains `packed`. No-op on a GPU: the check would synchronize."""
    unused = -bits % 8
    if unused and packed.device.type == "cpu" and len(packed) and (end := int(packed[-1])) & ((1 << unused) - 1):
        raise MessageError(part, f"packed in {bits} bits, and zeros in the rest of the last byte", f"{end:08b} in it")


def check_magnitudes(part: str, numbers: Tensor, most: float) -> None:
    """Raise MessageError if a magnitude in `numbers`, float[n], exceeds `most`. The error names `part`, the part of the
    message that contains the numbers. NaNs are not an error. No-op on a GPU: the check would synchronize."""
    if numbers.device.type == "cpu" and len(numbers):
        low, high = map(float, torch.aminmax(numbers))
        if high > most or low < -most:
            raise MessageError(part, f"at most {most:g} in magnitude", f"{low:g} to {high:g}")


def require(is_valid: Tensor, part: str, expected: str, found: object) -> None:
    """Raise MessageError unless `is_valid`, a bool[], is True. The error's text names the `part` of the message, the
    `expected` contents, and the contents that were `found`.

    If `is_valid` is on a GPU, reading it would make the host wait. So the pair of `is_valid` and the error is appended
    to the list in `deferred` instead. If `deferred` has no list, `is_valid` is read immediately.
    """
    error = MessageError(part, expected, found)
    if is_valid.device.type != "cpu" and (checks := deferred.get()) is not None:
        checks.append((is_valid, error))
    elif not is_valid:
        raise error


class decoding:  # noqa: N801 -- a context manager, five times as fast as one by contextlib
    """A context manager that completes each MessageError that is raised or deferred in its block. The error then names
    the `compressor`."""

    def __init__(self, compressor: Any) -> None:
        self._compressor = compressor

    def __enter__(self) -> None:
        self._first = len(deferred.get() or [])

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for each in (error, *(later for _, later in (deferred.get() or [])[self._first :])):
            if isinstance(each, MessageError):
                each.compressor = shown(self._compressor)
