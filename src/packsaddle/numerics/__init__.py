"""Stateless numerics: seeds and random numbers, finiteness, sketches of vectors, compiled inner loops.

Everything here is a pure function of its arguments; nothing knows of workers or of training. Read `seeds` first (how
(seed, step, purpose) becomes a generator, and noise that needs no memory). `kernels` chooses between
numba, Triton and torch for the inner loops.
"""

from packsaddle.numerics.finite import is_usable
from packsaddle.numerics.seeds import Stream, generator, mix
from packsaddle.numerics.sketches import NormSketch

__all__ = [
    "NormSketch",
    "Stream",
    "generator",
    "is_usable",
    "mix",
]
