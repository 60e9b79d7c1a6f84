"""Compressors whose messages tests corrupt, vectors to send, and the outcome of decoding a message."""

from collections.abc import Mapping

import mutations
import torch
from families import COMPRESSORS
from torch import Tensor

from packsaddle import QSGD, AdaptiveTopK, Compressor, RandomK, TopK

SHAPES = [torch.Size([20, 30]), torch.Size([700])]
D = 1300
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "int2")
SETTINGS: list[Compressor] = [
    *(c.for_tensors(SHAPES) if c.needs_tensors else c for c in COMPRESSORS),
    *(TopK(0.2, values=how) for how in FORMATS),
    *(TopK(0.02, chunk=200, values=how) for how in FORMATS),
    *(AdaptiveTopK(0.7, values=how) for how in FORMATS),
    RandomK(0.2),
    *(
        QSGD(levels, bucket, coded=coded)
        for levels, bucket in ((1, 512), (31, 64), (1000, 512))
        for coded in (True, False)
    ),
    TopK(k=40),
    TopK(k=40, values="int2"),
]
# A vector of Gaussian coordinates; one with few nonzero coordinates, so that messages have few indices and QSGD has
# empty buckets; and a vector of zeros.
VECTORS = {
    "gaussian": torch.randn(D, generator=torch.Generator().manual_seed(0)),
    "sparse": torch.where(torch.arange(D) % 641 == 5, 1.0, 0.0),
    "zeros": torch.zeros(D),
}


def replaced(parts: Mapping[str, Tensor], name: str, content: Tensor) -> dict[str, Tensor]:
    """Return a message's parts, in which the part `name` has the given content."""
    return {**parts, name: content}


def outcome(compressor: Compressor, parts: Mapping[str, Tensor], d: int) -> str:
    """Return "refused" if decoding the message `parts` raises MessageError, and "valid" if it succeeds."""
    found = mutations.outcome(compressor, parts, d)
    return "valid" if found in ("finite", "not finite") else found
