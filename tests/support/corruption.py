"""Corrupted messages: parts that were cut, doubled, replaced or changed, and what a receiver must make of them."""

from collections.abc import Iterator, Mapping

import torch
from families import COMPRESSORS
from torch import Tensor

from packsaddle import QSGD, AdaptiveTopK, Compressor, RandomK, Stages, TopK
from packsaddle.errors import MessageError

SHAPES = [torch.Size([20, 30]), torch.Size([700])]
D = 1300
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "int3", "int2", "int1")
SETTINGS: list[Compressor] = [
    *(c.for_tensors(SHAPES) if c.needs_tensors else c for c in COMPRESSORS),
    *(TopK(0.2, values=how) for how in FORMATS),
    *(TopK(0.02, chunk=200, values=how) for how in FORMATS),
    *(AdaptiveTopK(0.7, values=how) for how in FORMATS),
    *(RandomK(0.2, values=how) for how in FORMATS),
    *(
        QSGD(levels, bucket, coded=coded)
        for levels, bucket in ((1, 512), (31, 64), (1000, 512))
        for coded in (True, False)
    ),
    TopK(k=40),
    TopK(k=40, values="int3"),
    Stages(Stages(QSGD(3, 64)), 2),
    Stages(AdaptiveTopK(0.5, values="int4"), 2),
]
# Gaussian coordinates; few that are not 0, so that indices are few and buckets of QSGD empty; and nothing.
VECTORS = {
    "gaussian": torch.randn(D, generator=torch.Generator().manual_seed(0)),
    "sparse": torch.where(torch.arange(D) % 641 == 5, 1.0, 0.0),
    "zeros": torch.zeros(D),
}


def replaced(parts: Mapping[str, Tensor], name: str, content: Tensor) -> dict[str, Tensor]:
    """Return the parts with another content for one of them."""
    return {**parts, name: content}


def random_bytes(part: Tensor, rng: torch.Generator) -> Tensor:
    """Return a part of the same length and dtype with random content."""
    return torch.randint(256, (part.numel() * part.element_size(),), dtype=torch.uint8, generator=rng).view(part.dtype)


def corrupted(part: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """Yield a part cut, emptied, doubled, lengthened and shortened by one, replaced, and of another shape or dtype."""
    yield from (part[: len(part) // 2], part[:0], torch.cat([part, part]), part[:-1], torch.cat([part, part[-1:]]))
    yield from (random_bytes(part, rng), torch.zeros_like(part), random_bytes(part[: len(part) // 2], rng))
    yield (torch.zeros_like(part).view(torch.uint8) + 255).view(part.dtype)
    yield from (part.view(1, -1), part.to(torch.int64), part.to(torch.float64))


def mutated(part: Tensor, rng: torch.Generator) -> Tensor:
    """Return a part with one to four random changes: bits, bytes, and runs that are removed, repeated or inserted."""
    octets = part.contiguous().view(torch.uint8).clone()
    for _ in range(_below(4, rng) + 1):
        n, kind = len(octets), _below(6, rng)
        at = _below(n + 1, rng)
        end = at + _below(min(16, n - at) + 1, rng)
        if kind == 0 and at < n:
            octets[at] ^= 1 << _below(8, rng)
        elif kind == 1 and n:  # the first bytes say how the rest is coded
            octets[_below(min(n, 8), rng)] = _below(256, rng)
        elif kind == 2:
            octets = torch.cat([octets[:at], octets[end:]])
        elif kind == 3:
            octets = torch.cat([octets[:end], octets[at:]])
        elif kind == 4:
            octets = torch.cat([octets[:at], torch.randint(256, (4,), dtype=torch.uint8, generator=rng), octets[at:]])
        else:
            octets[at:end] = 255 * _below(2, rng)
    return octets[: len(octets) // part.element_size() * part.element_size()].view(part.dtype)


def _below(n: int, rng: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=rng))


def outcome(compressor: Compressor, parts: Mapping[str, Tensor], d: int) -> str:
    """Return "refused" if decoding raises MessageError, or "valid": two vectors from it are equal, and finite.

    Infinite and huge numbers on the wire may make others: the guard of a step finds them. Other exceptions pass.
    """
    try:
        found = [_decoded(compressor, parts, d) for _ in range(2)]
    except MessageError as error:
        return "refused" if type(compressor).__name__ in error.compressor else f"without the compressor: {error}"
    assert torch.equal(found[0].nan_to_num(7.0), found[1].nan_to_num(7.0)), "the same message decodes differently"
    numbers = torch.cat([part.double() for part in parts.values() if part.is_floating_point()])
    if bool((numbers.abs() < 1e30).all()):
        assert bool(found[0].isfinite().all()), "finite parts decode to numbers that are not"
    return "valid"


def _decoded(compressor: Compressor, parts: Mapping[str, Tensor], d: int) -> Tensor:
    message, out = compressor.receive(parts, d, seed=1, step=2), torch.zeros(d)
    compressor.add_decoded(message, out)
    support = compressor.support_of(message, d)
    assert out.shape == (d,)
    if support is not None:
        assert len(support.unique()) == len(support), "coordinates of a support must be distinct"
        assert not len(support) or (int(support.min()) >= 0 and int(support.max()) < d)
    return out
