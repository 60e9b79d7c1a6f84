"""Escape from an exact saddle: f(x) = x1^2/2 - x2^2/2 + x2^4/4 from (1, 0), whose gradient flow ends at the origin."""

from typing import Any

import problems
import pytest
import torch
from torch import nn

from packsaddle import CompressedSGD, Compression, Compressor, Escape, Identity, RandomK, Reset, TopK, simulate


def f(x: torch.Tensor) -> torch.Tensor:
    return x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4


def descend(
    compressor: Compressor,
    noise: float,
    interval: int,
    radius: float,
    steps: int,
    lr: float = 0.1,
    seed: int = 0,
) -> tuple[torch.Tensor, list[Reset]]:
    x = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    escape = Escape(interval, radius, lambda: f(x))
    opt = CompressedSGD([x], lr, Compression(compressor, dense_below=0), noise=noise, escape=escape, seed=seed)
    for _ in range(steps):
        opt.zero_grad()
        f(x).backward()
        opt.step()
    return x.detach(), opt.resets


@pytest.mark.slow
@pytest.mark.parametrize("compressor", [Identity(), TopK(k=1)], ids=repr)
def test_without_noise_it_ends_at_the_saddle(compressor: Compressor) -> None:
    x, resets = descend(compressor, noise=0.0, interval=40, radius=0.5, steps=150)
    assert x[1] == 0
    assert abs(x[0]) < 1e-6
    # One move of 0.5 towards the saddle by the radius, kept because f fell, the others by the interval.
    assert resets[0].reason == "radius"
    assert resets[0].committed
    assert {r.reason for r in resets[1:]} == {"interval"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compressor", "seed"), [(Identity(), 0), (RandomK(k=1), 1), (TopK(k=1), 0), (TopK(k=1), 1)], ids=repr
)  # to either side, and so to either minimum
def test_with_noise_it_ends_at_a_minimum(compressor: Compressor, seed: int) -> None:
    x, resets = descend(compressor, noise=0.03, interval=80, radius=0.5, steps=250, seed=seed)
    # Stationary spread of the noise: lr r^2 / (2 curvature) has a root of 0.005; compression delays it a few times.
    assert float(f(x)) == pytest.approx(-0.25, abs=0.01)
    assert abs(abs(x[1]) - 1) < 0.1
    escapes = [r for r in resets if r.reason == "radius"]
    assert len(escapes) >= 2  # along x1 to the saddle, then along x2 away from it
    assert escapes[1].committed
    assert escapes[1].candidate < escapes[1].start_loss


def test_commit_takes_y_and_rollback_takes_the_anchor() -> None:
    """One segment of four steps of TopK, in which f falls, and one in which a bad step makes it rise."""
    for sign, committed in ((1.0, True), (-1.0, False)):
        x = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))
        opt = CompressedSGD([x], 0.1, Compression(TopK(k=1), dense_below=0), escape=Escape(3, 1e9, lambda: f(x)))  # noqa: B023
        y = x.detach().clone()
        for t in range(4):
            x.grad = sign * torch.tensor([1.0, 0.9 + 0.3 * t], dtype=torch.float64)
            y -= 0.1 * x.grad
            opt.step()
        (reset,) = opt.resets
        assert (reset.step, reset.reason, reset.committed) == (4, "interval", committed)
        assert torch.allclose(x.detach(), y if committed else torch.tensor([1.0, 0.5], dtype=torch.float64))
        assert not opt.error().any()


def test_distance_is_that_of_y() -> None:
    """The radius test sees ||x_t' - (x_t - eta e_t)||, not ||x_t' - x_t||."""
    x = nn.Parameter(torch.zeros(4, 1, dtype=torch.float64))
    opt = CompressedSGD([x], 1.0, Compression(TopK(k=1), dense_below=0), escape=Escape(10, 1.9, lambda: -x.sum()))
    x.grad = -torch.ones_like(x)  # x moves by one coordinate, y by (1, 1, 1, 1), of norm 2
    opt.step()
    assert opt.resets[0].distance == pytest.approx(2.0)


def test_compare_y_evaluates_the_point_it_accepts() -> None:
    """With f(x) falling but f(y) rising the literal rule commits, and the other does not."""
    outcome = {}
    for compare in ("x", "y"):
        x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        rule = Escape(1, 1e9, lambda: -x[0] + 10 * x[1] ** 2, compare=compare)  # type: ignore[arg-type]  # noqa: B023
        opt = CompressedSGD([x], 1.0, Compression(TopK(k=1), dense_below=0), escape=rule)
        for _ in range(2):
            x.grad = torch.tensor([-2.0, -0.9], dtype=torch.float64)
            opt.step()
        outcome[compare] = (opt.resets[0].committed, x.tolist())
    assert outcome == {"x": (True, [4.0, 1.8]), "y": (False, [0.0, 0.0])}


def test_nan_rolls_back() -> None:
    x = nn.Parameter(torch.ones(2))
    opt = CompressedSGD(
        [x], 0.1, Compression(Identity(), max_skipped=None), escape=Escape(1, 1e9, lambda: (x / x).log().sum())
    )
    for _ in range(2):
        x.grad = torch.tensor([float("inf"), 0.0])
        opt.step()
    assert x.tolist() == [1.0, 1.0]
    assert not opt.resets[0].committed


def test_a_nan_in_the_error_is_not_committed() -> None:
    """RandomK has not sent the NaN yet, so f(x_t) is finite and lower; y_t = x_t - eta e_t is not to be accepted."""
    x = nn.Parameter(torch.ones(4, 1))
    compressor = RandomK(k=1)
    rule = Escape(1, 1e9, lambda: x.sum())
    opt = CompressedSGD([x], 0.1, Compression(compressor, dense_below=0, max_skipped=None), escape=rule)
    sent = int(compressor.support(4, seed=0, step=0))
    x.grad = torch.ones(4, 1)
    x.grad[(sent + 1) % 4] = float("nan")
    opt.step()
    assert not opt.resets[0].committed
    assert opt.resets[0].candidate < opt.resets[0].start_loss
    assert torch.equal(x, torch.ones(4, 1))
    assert not opt.error().any()


@pytest.mark.parametrize("compare", ["x", "y"])
def test_an_objective_that_raises_leaves_x_where_it_was(compare: str) -> None:
    calls = []

    def objective() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return 0.0

    x = nn.Parameter(torch.ones(2))
    rule = Escape(1, 1e9, objective, compare=compare)  # type: ignore[arg-type]
    opt = CompressedSGD([x], 0.1, compressor=Identity(), escape=rule)
    x.grad = torch.ones(2)
    opt.step()
    with pytest.raises(MemoryError):
        opt.step()
    assert torch.allclose(x, torch.full((2,), 0.8))


@pytest.mark.parametrize("compare", ["x", "y"])
def test_bytes_of_a_check(compare: str) -> None:
    """A commit costs d floats, and so does every comparison at y; a rollback at x only the objectives."""
    runs = simulate(lambda rank: problems.run(TopK(k=3), steps=100, noise=1.0, interval=9, compare=compare), 2)
    resets, moved = runs[0]["resets"], runs[0]["bytes"]
    commits = sum(c for _, c in resets)
    assert 0 < commits < len(resets)
    assert moved["objective"][0] == 2 * 8 * len(resets)
    assert moved["reset"][0] == 8 * problems.D * (commits if compare == "x" else len(resets))
    # A vector shorter than the sketch is averaged itself, once a step.
    assert moved["escape norm"][0] == 8 * problems.D * 100


def test_every_spaces_the_norm_test() -> None:
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = CompressedSGD([x], 1.0, compressor=Identity(), escape=Escape(100, 1.5, lambda: -x.sum(), every=5))
    for _ in range(5):
        x.grad = -torch.ones_like(x)
        opt.step()
    assert [(r.step, r.reason) for r in opt.resets] == [(5, "radius")]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"interval": 0}, "interval of Escape must be .*, got 0"),
    ({"radius": 0.0}, "radius of Escape must be .*, got 0.0"),
    ({"radius": float("nan")}, "radius of Escape must be .*, got nan"),
    ({"every": 0}, "every of Escape must be .*, got 0"),
    ({"objective": 3.0}, "objective of Escape must be callable"),
    ({"compare": "z"}, 'compare of Escape must be "x" or "y"'),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Escape(**{"interval": 5, "radius": 1.0, "objective": lambda: 0.0} | given)


def test_an_objective_returns_one_number() -> None:
    x = nn.Parameter(torch.ones(2))
    opt = CompressedSGD([x], 0.1, compressor=Identity(), escape=Escape(1, 1.0, lambda: x))
    x.grad = torch.ones(2)
    opt.step()
    with pytest.raises(ValueError, match=r"objective of Escape must return one number, got shape \(2,\)"):
        opt.step()
