"""Stateless numerics: seeds, counter-based random numbers, finiteness, sketches of vectors, compiled inner loops.

Everything here is a pure function of its arguments; nothing knows of workers or of training. Read `seeds` first (how
(seed, step, purpose) becomes a generator), then `counter_rng` (noise that needs no memory). `kernels` chooses between
numba, Triton and torch for the inner loops.
"""
