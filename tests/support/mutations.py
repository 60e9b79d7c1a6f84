"""Structured mutations of messages for fuzzing. Parts are byte strings until they are decoded, which is fast."""

import math
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from packsaddle import Compressor, Message
from packsaddle.errors import MessageError

HUGE = 1e30  # finite numbers in a message above this magnitude may decode to non-finite numbers
_NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, -1.0, 0.0, 1.0)
_FORMATS = {torch.float32: "f", torch.float64: "d", torch.float16: "e"}


class Part(NamedTuple):
    """A part of a message as bytes."""

    dtype: torch.dtype
    content: bytes

    @classmethod
    def of(cls, part: Tensor) -> "Part":
        """Return the bytes of a flat tensor."""
        return cls(part.dtype, part.contiguous().view(torch.uint8).numpy().tobytes())

    def tensor(self) -> Tensor:
        """Return the part as a tensor; bytes beyond the last whole element are dropped."""
        whole = len(self.content) // self.dtype.itemsize * self.dtype.itemsize
        if not whole:
            return torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(bytearray(self.content[:whole]), dtype=self.dtype)


Parts = Mapping[str, Part]


def as_bytes(message: Message) -> Parts:
    """Return the parts of a message as bytes."""
    return {name: Part.of(part) for name, part in message.parts.items()}


def _flip_bits(part: Part, rng: random.Random) -> bytes:
    content = bytearray(part.content)
    for _ in range(rng.randrange(1, 5)):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _change_lengths(part: Part, rng: random.Random) -> bytes:
    """Change the first bytes, which contain the coding and the length of the rest, or the last bytes, a count."""
    content = bytearray(part.content)
    if content:
        at = rng.randrange(min(len(content), 10)) if rng.randrange(4) else len(content) - 1
        content[at] = rng.choice((0, 1, 2, 3, 127, 128, 255, rng.randrange(256)))
    return bytes(content)


def _replace_codes(part: Part, rng: random.Random) -> bytes:
    """Replace a run of bytes by zeros, ones or random bytes, so that codes do not end or end immediately."""
    content = bytearray(part.content)
    start = rng.randrange(len(content) + 1)
    stop = min(len(content), start + rng.choice((1, 4, 16, 1 << 20)))
    fill = rng.randrange(3)
    content[start:stop] = rng.randbytes(stop - start) if fill == 2 else bytes([255 * fill]) * (stop - start)
    return bytes(content)


def _truncate(part: Part, rng: random.Random) -> bytes:
    """Remove the end of a part, or a run of bytes inside it."""
    n, size = len(part.content), part.dtype.itemsize
    if rng.randrange(2):
        return part.content[: rng.choice((n // 2, max(0, n - size), rng.randrange(n + 1)))]
    start = rng.randrange(n + 1)
    return part.content[:start] + part.content[start + rng.randrange(17) :]


def _extend(part: Part, rng: random.Random) -> bytes:
    """Append, insert or repeat bytes in a part."""
    at = rng.choice((len(part.content), rng.randrange(len(part.content) + 1)))
    more = rng.choice((part.content, part.content[at : at + 16], rng.randbytes(part.dtype.itemsize), bytes(8)))
    return part.content[:at] + more + part.content[at:]


def _replace_numbers(part: Part, rng: random.Random) -> bytes:
    """Replace some numbers by NaN, Inf, the largest, the smallest or negative numbers.

    If the part's dtype has no such numbers, bits are flipped.
    """
    content, size = bytearray(part.content), part.dtype.itemsize
    n = len(content) // size
    for _ in range(rng.randrange(1, 4)):
        if n:
            at, x = rng.randrange(n) * size, rng.choice(_NUMBERS)
            if part.dtype == torch.bfloat16:
                content[at : at + 2] = struct.pack("f", x)[2:]
            elif part.dtype in _FORMATS:
                x = math.copysign(min(abs(x), 65504.0), x) if size == 2 and math.isfinite(x) else x
                content[at : at + size] = struct.pack(_FORMATS[part.dtype], x)
            else:
                content[at] ^= 255
    return bytes(content)


OF_A_PART: dict[str, Callable[[Part, random.Random], bytes]] = {
    "bits": _flip_bits,
    "lengths": _change_lengths,
    "codes": _replace_codes,
    "truncated": _truncate,
    "extended": _extend,
    "numbers": _replace_numbers,
}
KINDS = (*OF_A_PART, "random", "another vector", "another d", "another compressor")


def mutate(parts: Parts, kind: str, others: Mapping[str, Sequence[Parts]], rng: random.Random) -> Parts:
    """Return a mutated message. `others` has messages for the kinds that begin with "another"."""
    if kind == "another vector":  # replace one part by that of another vector's message, whose length may fit
        other, name = rng.choice(others[kind]), rng.choice(list(parts))
        return {**parts, name: other[name]}
    if kind in others:
        other = rng.choice(others[kind])
        if rng.randrange(2):
            return other
        # Use the bytes of the other message with the names and dtypes of this message's parts.
        contents = [part.content for part in other.values()]
        return {name: Part(part.dtype, rng.choice(contents)) for name, part in parts.items()}
    name = rng.choice(list(parts))
    part = parts[name]
    if kind == "random":
        return {**parts, name: Part(part.dtype, rng.randbytes(len(part.content)))}
    return {**parts, name: Part(part.dtype, OF_A_PART[kind](part, rng))}


def tensors(parts: Parts) -> dict[str, Tensor]:
    return {name: part.tensor() for name, part in parts.items()}


def outcome(compressor: Compressor, parts: Mapping[str, Tensor], d: int) -> str:
    """Decode a message of a vector float[d], and return the outcome.

    It is "refused" if `receive` raises MessageError, so that nothing is added; otherwise "finite" or "not finite", as
    the decoded vector is. Raises AssertionError if finite numbers decode to non-finite ones, if the support has invalid
    or repeated indices, or if a second decoding differs. All remaining exceptions are raised.
    """
    try:
        messages = [compressor.receive(parts, d, seed=1, step=2) for _ in range(2)]
    except MessageError as error:
        return "refused" if type(compressor).__name__ in error.compressor else f"without the compressor: {error}"
    found, again = (_decoded(compressor, message, d) for message in messages)
    assert torch.equal(found.nan_to_num(7.0), again.nan_to_num(7.0)), "the same message decodes differently"
    if bool(found.isfinite().all()):
        return "finite"
    numbers = torch.cat([part.double() for part in parts.values() if part.is_floating_point()])
    assert not bool((numbers.abs() < HUGE).all()), "finite numbers decode to others"
    return "not finite"


def _decoded(compressor: Compressor, message: Message, d: int) -> Tensor:
    out = torch.zeros(d)
    compressor.add_decoded(message, out)
    support = compressor.support_of(message, d)
    if support is not None and len(support):
        assert len(support.unique()) == len(support), "coordinates of a support must be distinct"
        assert int(support.min()) >= 0, "an index is negative"
        assert int(support.max()) < d, "an index is beyond the end"
    return out
