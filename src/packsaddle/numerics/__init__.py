"""Numerics: random numbers, finiteness checks, sketches of vectors, compiled inner loops.

These modules are stateless, and independent of communication and training. Start with `seeds`.
"""

from packsaddle.numerics.finite import is_in_range
from packsaddle.numerics.seeds import Stream, generator, mix
from packsaddle.numerics.sketches import NormSketch

__all__ = ["NormSketch", "Stream", "generator", "is_in_range", "mix"]
