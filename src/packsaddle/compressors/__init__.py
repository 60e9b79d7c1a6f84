"""Compressors of vectors: the interface, all implementations, and functions that parse and describe them."""

from packsaddle.compressors.base import Compressor, Message, RatioRamp
from packsaddle.compressors.kinds import *  # noqa: F403 -- all compressors
from packsaddle.compressors.registry import CLASSES, compressors, describe, identify, parse_compressor

__all__ = [
    *CLASSES,
    "Compressor",
    "Message",
    "RatioRamp",
    "compressors",
    "describe",
    "identify",
    "parse_compressor",
]
