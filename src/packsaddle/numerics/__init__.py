"""Stateless numerics: seeds and random numbers, finiteness, sketches of vectors, compiled inner loops.

Pure functions, which know nothing of workers or of training. Read `seeds` first.
"""

from packsaddle.numerics.finite import is_in_range
from packsaddle.numerics.seeds import Stream, generator, mix
from packsaddle.numerics.sketches import NormSketch

__all__ = ["NormSketch", "Stream", "generator", "is_in_range", "mix"]
