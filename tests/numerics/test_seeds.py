"""Streams are pure functions of (seed, step), and leave torch's global state alone; counter-based numbers do too.

Uniform words and normal numbers are independent of how they are asked for, and of each other.
"""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, norm
from torch_loops import both, torch_only, two_threads

from packsaddle.numerics.kernels import compiler
from packsaddle.numerics.seeds import (
    Keys,
    Stream,
    add_cell_gaussians,
    add_gaussians,
    generator,
    keys,
    mix,
    sample_without_replacement,
    words,
)

LIKE = torch.zeros(1, dtype=torch.float64)


def gaussians(n: int, key: Keys, like: torch.Tensor) -> torch.Tensor:
    """The first n numbers of a key."""
    out = torch.zeros(n, dtype=like.dtype)
    add_gaussians(out, 1.0, key)
    return out


def naive_word(counter: int, key: Keys) -> int:
    """The definition, on Python integers."""
    return naive_mixed((naive_mixed((counter * 0x9E3779B1 + key.first) % 2**32) + key.second) % 2**32)


def naive_gaussian(place: int, key: Keys) -> float:
    """Box and Muller in double precision, a number at a time."""
    chunk, i = divmod(place, 2048)
    counter = 1024 * chunk + i % 1024
    h = naive_mixed((counter * 0x9E3779B1 + key.first) % 2**32)
    radial, angular = naive_mixed((h + key.second) % 2**32), naive_mixed((h + key.third) % 2**32)
    radius = math.sqrt(-2 * math.log(float(np.float32((radial >> 1) + 0.5) * np.float32(2**-31))))
    angle = ((angular & 0x3FFFFFFF) - 2**29) * math.pi * 2**-31
    cosine, sine = math.cos(angle) * (-1) ** (angular >> 31), math.sin(angle)
    return radius * (cosine if (i < 1024) != bool(angular >> 30 & 1) else sine)


def naive_mixed(h: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h = (h ^ (h >> shift)) * factor % 2**32
    return h


def test_words_against_the_definition() -> None:
    key = keys(3, 4, Stream.ROUNDING)
    found = words(torch.tensor([0, 1, 77, 2**30, 2**31 - 1], dtype=torch.int32), key)
    assert [int(w) % 2**32 for w in found] == [naive_word(i, key) for i in (0, 1, 77, 2**30, 2**31 - 1)]


def test_gaussians_against_the_definition() -> None:
    key = keys(1, 2, Stream.NOISE)
    places = [0, 1, 1023, 1024, 2047, 2048, 5000, 9999]
    expected = torch.tensor([naive_gaussian(p, key) for p in places], dtype=torch.float64)
    for found in both(lambda: gaussians(10_000, key, LIKE)[places]):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_known_numbers() -> None:
    """They are part of a run's meaning, so they are pinned."""
    known = [0.733484149, -0.128763065, -0.525955141]
    assert gaussians(3, keys(7, 11, Stream.NOISE), LIKE).tolist() == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_stretch_is_the_same_numbers(dtype: torch.dtype) -> None:
    key = keys(0, 0, Stream.NOISE)
    whole = gaussians(300_000, key, torch.zeros(1, dtype=dtype))
    for start, n in ((0, 1), (1, 2048), (2047, 2), (5000, 200_000), (299_999, 1), (17, 0)):
        part = torch.zeros(n, dtype=dtype)
        add_gaussians(part, 1.0, key, start)
        assert torch.equal(part, whole[start : start + n])


@pytest.mark.parametrize("size", [1, 2, 7, 64, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_are_stretches_of_the_same_numbers(size: int, dtype: torch.dtype) -> None:
    key, cells = keys(2, 3, Stream.OUTSTANDING), 7000 // size + 1
    scales = torch.linspace(-1, 2, cells, dtype=dtype)
    expected = 0.5 + gaussians(cells * size, key, scales) * scales.repeat_interleave(size)
    for torch_alone in (False, True):
        out = torch.full((cells * size,), 0.5, dtype=dtype)
        with torch_only() if torch_alone else nullcontext():
            add_cell_gaussians(out, scales, key)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    nothing = torch.zeros(0, dtype=dtype)
    add_cell_gaussians(nothing, nothing, key)


def test_threads_change_nothing() -> None:
    if compiler("cpu") == "torch":
        pytest.skip("numba is not installed")
    key = keys(5, 6, Stream.NOISE)
    one = gaussians(700_001, key, LIKE)
    with two_threads():
        two = gaussians(700_001, key, LIKE)
    assert torch.equal(one, two)


def test_law() -> None:
    x = gaussians(1_000_000, keys(1, 2, Stream.NOISE), LIKE).numpy()
    assert kstest(x, "norm").pvalue > 1e-3
    edges = norm.ppf(np.linspace(0, 1, 1001))  # a thousand bins of equal probability, the tails among them
    assert chisquare(np.histogram(x, edges)[0]).pvalue > 1e-3
    assert 4.5 < np.abs(x).max() < 6.5


def test_neighbours_steps_and_streams_are_uncorrelated() -> None:
    n = 200_000
    drawn = {k: gaussians(n, keys(*k), LIKE) for k in itertools.product((0, 1), (0, 1, 2), (Stream.NOISE, Stream.INIT))}
    limit = 5 / math.sqrt(n)
    for a, b in itertools.combinations(drawn.values(), 2):
        assert abs(float((a * b).mean())) < limit
        assert abs(float((a.square() * b.square()).mean()) - 1) < 10 * limit
    x = drawn[0, 0, Stream.NOISE]
    for lag in (1, 2, 1023, 1024, 1025, 2048):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < limit
        assert abs(float((x[lag:].square() * x[:-lag].square()).mean()) - 1) < 10 * limit


def test_words_are_uniform_and_their_bits_independent() -> None:
    w = words(torch.arange(1 << 18, dtype=torch.int32), keys(9, 9, Stream.ROUNDING))
    assert chisquare(torch.bincount((w >> 20) & 0xFFF, minlength=4096).numpy()).pvalue > 1e-3
    assert chisquare(torch.bincount(w & 0xFFF, minlength=4096).numpy()).pvalue > 1e-3
    bits = ((w[:, None] >> torch.arange(32)) & 1).double() * 2 - 1
    correlation = bits.T @ bits / len(w)
    assert float((correlation - torch.eye(32)).abs().max()) < 5.5 / math.sqrt(len(w))


def test_generators_are_pure_and_distinct() -> None:
    def draw(seed: int, step: int, stream: Stream, worker: int | None = None) -> tuple[float, ...]:
        return tuple(torch.randn(4, generator=generator(seed, step, stream, worker=worker)).tolist())

    keys = [(s, t, k, w) for s in (0, 1) for t in (0, 1) for k in (Stream.NOISE, Stream.BATCH) for w in (None, 0, 1)]
    draws = {key: draw(*key) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert all(draws[key] == draw(*key) for key in keys)


def test_mix_takes_any_integers() -> None:
    assert 0 <= mix(-1, 2**80, 0) < 2**64
    assert mix(1, 2) != mix(2, 1)


def test_global_random_state_is_untouched() -> None:
    state = torch.random.get_rng_state()
    generator(3, 4, Stream.NOISE)
    sample_without_replacement(10_000, 100, seed=0, step=0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("n", [1, 2, 3, 4095, 4096, 4097, 5000, 8192, 8193])
def test_the_whole_sample_is_a_permutation(n: int) -> None:
    """k = n - 1 leaves out one integer; every integer is left out for some seed when n is small."""
    left_out = set()
    for seed in range(20):
        sample = sample_without_replacement(n, n - 1, seed=seed, step=1)
        assert len(set(sample.tolist())) == n - 1
        left_out |= set(range(n)) - set(sample.tolist())
    assert len(left_out) > 1 or n == 1
    assert sample_without_replacement(n, n, seed=0, step=0).tolist() == list(range(n))
    assert sample_without_replacement(n, 0, seed=0, step=0).tolist() == []


def test_known_sample() -> None:
    """The sample is part of a run's meaning: changing it changes every trajectory, so it is pinned."""
    known = [663561, 953903, 538015, 106095, 202590]
    assert sample_without_replacement(1_000_000, 5, seed=7, step=11).tolist() == known
