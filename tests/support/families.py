"""Every compressor in several settings, for tests of properties that all compressors have."""

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    LowRank,
    RandomK,
    Rounded,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
)
from packsaddle.compressors import compressors

COMPRESSORS: list[Compressor] = [
    *compressors(0.3),
    RandomK(0.3, block_size=4),
    RandomK(k=1),
    RandomK(1.0),
    TopK(1.0),
    TopK(0.3, values="float16"),
    TopK(0.3, values="int2"),
    TopK(0.3, chunk=16),
    TopK(0.1, chunk=8, values="int2"),
    AdaptiveTopK(1.0),
    AdaptiveTopK(0.9, values="bfloat16"),
    SharedTopK(0.3, block_size=4),
    SharedTopK(k=1, projections=1),
    SharedTopK(0.5, block_size=3, projections=1, half=False),
    SketchTopK(k=1, rows=1, columns=3, oversample=1),
    SketchTopK(k=2, rows=3, columns=3, half=False),
    SketchTopK(0.1, rows=2, columns=5, oversample=2),
    Sign(per_tensor=True),
    Rounded("int4"),
    Rounded("float16"),
    QSGD(coded=False),
    QSGD(levels=2, bucket=7),
    LowRank(2),
]
