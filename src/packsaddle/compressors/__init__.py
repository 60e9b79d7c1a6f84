"""Gradient compressors."""

from packsaddle.compressors.base import Compressor, Message, RatioRamp
from packsaddle.compressors.linear_sketch import LinearSketch
from packsaddle.compressors.low_rank import LowRank
from packsaddle.compressors.quantized import QSGD, Rounded, Sign
from packsaddle.compressors.registry import compressors, describe, identify, parse_compressor
from packsaddle.compressors.shared import SharedTopK, SketchTopK
from packsaddle.compressors.sparse import AdaptiveTopK, Identity, RandomK, TopK
from packsaddle.compressors.stages import Stages

__all__ = [
    "QSGD",
    "AdaptiveTopK",
    "Compressor",
    "Identity",
    "LinearSketch",
    "LowRank",
    "Message",
    "RandomK",
    "RatioRamp",
    "Rounded",
    "SharedTopK",
    "Sign",
    "SketchTopK",
    "Stages",
    "TopK",
    "compressors",
    "describe",
    "identify",
    "parse_compressor",
]
