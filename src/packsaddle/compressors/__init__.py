"""Compressors of vectors: the interface, all implementations, and functions that parse and describe them."""

from packsaddle.compressors.base import Compressor, Message
from packsaddle.compressors.kinds import *  # noqa: F403 -- all compressors
from packsaddle.compressors.registry import CLASSES, compressors, describe, identify, parse_compressor

__all__ = [
    *CLASSES,
    "Compressor",
    "Message",
    "compressors",
    "describe",
    "identify",
    "parse_compressor",
]
