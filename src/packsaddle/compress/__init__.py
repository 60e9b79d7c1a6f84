"""Gradient compressors."""

from packsaddle.compress.base import Compressor, Message
from packsaddle.compress.lowrank import LowRank
from packsaddle.compress.quantize import QSGD, Sign
from packsaddle.compress.sketching import LinearSketch, SketchTopK
from packsaddle.compress.sparse import AdaptiveTopK, Identity, RandomK, TopK

__all__ = [
    "QSGD",
    "AdaptiveTopK",
    "Compressor",
    "Identity",
    "LinearSketch",
    "LowRank",
    "Message",
    "RandomK",
    "Sign",
    "SketchTopK",
    "TopK",
]
