"""Every compressor in several settings, for tests that hold for all of them."""

import torch

from packsaddle import QSGD, AdaptiveTopK, Compressor, Identity, LinearSketch, LowRank, RandomK, Sign, SketchTopK, TopK

COMPRESSORS: list[Compressor] = [
    Identity(),
    RandomK(0.01),
    RandomK(0.3),
    RandomK(0.3, block_size=4),
    RandomK(k=1),
    RandomK(1.0),
    RandomK(0.3, values="bfloat16"),
    RandomK(0.3, values="int8"),
    TopK(0.01),
    TopK(0.3),
    TopK(1.0),
    TopK(0.3, per_tensor=True).for_tensors([torch.Size((3,)), torch.Size((2, 5))]),
    RandomK(0.3, per_tensor=True).for_tensors([torch.Size((3,)), torch.Size((2, 5))]),
    TopK(0.3, values="float16"),
    TopK(0.3, values="int8"),
    TopK(0.3, values="float32"),
    AdaptiveTopK(0.5),
    AdaptiveTopK(1.0),
    AdaptiveTopK(0.9, values="bfloat16"),
    SketchTopK(0.1),
    SketchTopK(k=1, rows=1, columns=3),
    SketchTopK(0.3, rows=5),
    SketchTopK(0.2, rows=2),
    Sign(),
    Sign(per_tensor=True),
    QSGD(),
    QSGD(levels=1, bucket=16),
    QSGD(levels=127),
    QSGD(levels=2, bucket=7),
    LinearSketch(0.2),
    LinearSketch(columns=7),
    LinearSketch(0.3, sketch="gaussian"),
    LowRank(),
    LowRank(2),
]
