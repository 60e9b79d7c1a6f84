"""The compiled Algorithm 1 is the one of `packsaddle.reference`, and RandomK selects uniformly."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lab.paper import compiled_runs
from lab.paper.compiled_runs import Selection, Setting, algorithm1, escapes
from lab.paper.problems import Cosine
from packsaddle import Compressor, Identity, TopK
from packsaddle.reference import Check, Trace
from packsaddle.reference import algorithm1 as reference

D, WIDTH, ETA, RADIUS = 6, 0.6, 0.3, 0.4


def start() -> Tensor:
    x = torch.linspace(0.1, 0.9, D, dtype=torch.float64)
    x[0] = math.pi * WIDTH + 0.05
    return x


def by_reference(compressor: Compressor, interval: int, steps: int) -> Trace:
    problem = Cosine(D, WIDTH)
    check = Check(lambda x: float(problem(x)), interval, RADIUS)
    return reference(start(), [lambda x, t: problem.gradient(x)], compressor, eta=ETA, steps=steps, check=check)


@pytest.mark.parametrize(("selection", "compressor"), [(0, Identity()), (2, TopK(k=2))])
@pytest.mark.parametrize("interval", [3, 1000])
def test_without_noise_it_is_the_reference(selection: int, compressor: Compressor, interval: int) -> None:
    expected = by_reference(compressor, interval, 40)
    x = start().numpy().copy()
    first, half, share, rolled_back = algorithm1(
        x, 0.3, WIDTH, 0.0, ETA, interval, RADIUS, selection, 2, 0, 40, 1, False
    )
    assert np.allclose(x, expected.x[-1].numpy(), atol=1e-12)
    assert rolled_back == sum(not decreased for _, decreased in expected.resets)
    assert len(expected.resets) > 0
    good = [stationary(x, 0.3) for x in by_reference(compressor, interval, 41).x[:41]]
    assert share == pytest.approx(np.mean(good))
    assert first == (good.index(True) if any(good) else -1)
    assert half == next((t for t in range(19, 41) if 2 * sum(good[: t + 1]) >= t + 1), -1)


def stationary(x: Tensor, epsilon: float) -> bool:
    problem = Cosine(D, WIDTH)
    return float(problem.gradient(x).norm()) <= epsilon and problem.lambda_min(x) >= -math.sqrt(epsilon)


def test_a_rise_of_f_is_rolled_back() -> None:
    """With a step size of 3.9 the first coordinate jumps over its minimum, and f rises."""
    x = np.array([0.0, 2.0])
    found = algorithm1(x, 1e-9, 0.5, 0.0, 3.9, 0, 100.0, 0, 2, 0, 4, 1, False)
    assert found[3] > 0


def test_random_k_sends_k_coordinates_each_equally_often() -> None:
    counts = np.zeros(D)
    for seed in range(600):
        x = start().numpy().copy()
        algorithm1(x, 1e-9, WIDTH, 0.0, ETA, 1000, 10.0, 1, 2, seed, 1, 1, False)
        moved = x != start().numpy()
        assert moved.sum() == 2
        counts += moved
    assert np.allclose(counts / 600, 2 / D, atol=5 * math.sqrt(2 / D * (1 - 2 / D) / 600))


def test_random_k_of_all_coordinates_is_uncompressed() -> None:
    ends = []
    for selection in (0, 1):
        x = start().numpy().copy()
        algorithm1(x, 0.3, WIDTH, 0.0, ETA, 7, RADIUS, selection, D, 0, 30, 1, False)
        ends.append(x)
    assert np.allclose(ends[0], ends[1], atol=1e-12)


@pytest.mark.parametrize("deviation", [0.1, 0.4])
def test_noise_has_its_deviation(deviation: float) -> None:
    """A step of size 1 from x = 0 leads to minus the noise."""
    x = np.zeros(4000)
    algorithm1(x, 1e-9, 1.0, deviation, 1.0, 1000, 1e9, 0, 4000, 0, 1, 1, False)
    assert np.std(x) == pytest.approx(deviation, rel=0.05)


def test_settings_are_run_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_runs, "compiled", lambda: algorithm1)  # the same code, without compiling it
    selections: tuple[Selection, ...] = ("none", "RandomK")
    for selection in selections:
        setting = Setting(4, 0.4, 0.79, 0.2, 0.1, 400, 1.3, selection, 2)
        found = escapes(setting, range(2), limit=1000, until_half=True)
        assert found == escapes(setting, range(2), limit=1000, until_half=True)
        assert [e.seed for e in found] == [0, 1]
        assert all(e.first is not None and e.half is not None and e.first < e.half for e in found)
        assert found[0].first != found[1].first
