"""Streams are pure functions of (seed, step), independent of each other, and leave torch's global state alone."""

import pytest
import torch

from packsaddle.numerics.seeds import Stream, generator, mix, sample_without_replacement


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
    assert sample_without_replacement(1_000_000, 5, seed=7, step=11).tolist() == [
        663561,
        953903,
        538015,
        106095,
        202590,
    ]
