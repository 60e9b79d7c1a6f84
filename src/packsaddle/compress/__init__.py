"""Gradient compressors."""

from packsaddle.compress.base import Compressor, Message
from packsaddle.compress.sparse import Identity, RandomK, TopK

__all__ = ["Compressor", "Identity", "Message", "RandomK", "TopK"]
