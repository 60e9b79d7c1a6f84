"""LocalUpdates: equal to a naive twin; its invariants; bad rounds; state; what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_in_processes
from local_updates import Case, Twin, gradient, train, twin
from torch import Tensor

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    Identity,
    LinearSketch,
    LocalUpdates,
    LowRank,
    RandomK,
    Sign,
    SketchTopK,
    TopK,
    simulate,
)
from packsaddle.optim.compression import Compression

FAMILIES: list[Compressor] = [
    Identity(),
    RandomK(0.2),
    RandomK(0.3, values="int8"),
    TopK(0.1),
    TopK(0.2, values="int8"),
    AdaptiveTopK(0.5),
    Sign(),
    QSGD(),
    LinearSketch(0.4),
]
CASES = [
    *[Case(every=3, compressor=c) for c in FAMILIES],
    *[Case(every=3, compressor=c, fragments=3, delay=2) for c in FAMILIES],
    *[Case(every=h, compressor=TopK(0.1), inner=i) for h in (1, 8) for i in ("sgd", "momentum", "adamw")],
    Case(every=8, compressor=TopK(0.2), fragments=3, delay=2, outer="nesterov", decay=0.9, noise=0.01),
    Case(every=8, compressor=TopK(0.2), fragments=2, delay=7, outer="adam"),
    Case(every=1, compressor=RandomK(0.2), outer="nesterov", noise=0.02),
    Case(every=3, compressor=TopK(0.2), decay=0.5, noise=0.01),
]


def named(case: Case) -> str:
    rest = f"P{case.fragments}-delay{case.delay}-{case.inner}-{case.outer}-{case.decay}-{case.noise}"
    return f"{case.compressor}-H{case.every}-{rest}"


def check(case: Case, workers: int, found: list[tuple[list[Tensor], dict[str, Tensor]]]) -> Twin:
    expected = twin(case, workers)
    for worker, (xs, anchor) in enumerate(found):
        for n, (x, y) in enumerate(zip(xs, expected.x[worker], strict=True)):
            torch.testing.assert_close(
                x, y, rtol=1e-9, atol=1e-11, equal_nan=True, msg=f"worker {worker} after step {n + 1}"
            )
        for name, a in anchor.items():
            torch.testing.assert_close(a, expected.a[name], rtol=1e-9, atol=1e-11)
    return expected


def run(case: Case, worker: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    xs, local = train(case, worker)
    return xs, local.anchor()


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_equal_to_the_twin(case: Case, workers: int) -> None:
    check(case, workers, simulate(lambda worker: run(case, worker), workers))


GLOO = [
    Case(every=3, compressor=TopK(0.1), fragments=3, delay=2),
    Case(every=4, compressor=RandomK(0.2), delay=3, outer="nesterov", noise=0.01),
    Case(every=1, compressor=QSGD()),
    Case(every=3, compressor=TopK(0.2, values="int8"), decay=0.9, bad={5: 1}, steps=20),
    Case(every=4, compressor=TopK(0.2), fragments=2, delay=3, bad={5: 1}, steps=20),
]


def run_all(cases: list[Case], rank: int = -1) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    worker = torch.distributed.get_rank()
    return [run(case, worker) for case in cases]


@pytest.mark.process
@pytest.mark.parametrize("workers", [2, 3])
def test_equal_to_the_twin_in_processes(workers: int, tmp_path: Path) -> None:
    """Where exchanges with a delay go on in a thread beside the steps."""
    found = run_in_processes(run_all, workers, tmp_path, GLOO)
    for i, case in enumerate(GLOO):
        check(case, workers, [results[i] for results in found])


@pytest.mark.parametrize(
    "case", [GLOO[3], GLOO[4], Case(every=3, compressor=RandomK(0.3), bad={1: 0, 2: 1, 9: 1})], ids=named
)
def test_a_bad_round_is_left_out_by_all(case: Case) -> None:
    def body(worker: int) -> tuple[list[Tensor], dict[str, Tensor], Any]:
        xs, local = train(case, worker)
        return xs, local.anchor(), local

    found = simulate(body, 2)
    check(case, 2, [(xs, anchor) for xs, anchor, _ in found])
    for _, _, local in found:
        assert [skip.workers for skip in local.skips]
        assert all("of u" in str(skip) or "of w" in str(skip) for skip in local.skips)
        assert local.skipped == len(local.skips)
    assert [skip.workers for skip in found[0][2].skips] == [skip.workers for skip in found[1][2].skips]


def one_vector(worker: int, compressor: Compressor, exchange: str, every: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Local SGD on one matrix; what was applied, what this worker has moved in all, the mean error."""
    x = torch.nn.Parameter(torch.linspace(-1, 1, 90, dtype=torch.float64).view(9, 10))
    inner, applied = torch.optim.SGD([x], lr=0.1), torch.zeros(90, dtype=torch.float64)

    class Summing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            applied.add_(self.param_groups[0]["params"][0].grad.reshape(-1))
            super().step(closure)

    compression = Compression(compressor, dense_below=0, exchange=exchange)  # type: ignore[arg-type]
    outer = lambda ps: Summing(ps, lr=0.7, momentum=0.9, nesterov=True)  # noqa: E731
    local = LocalUpdates(inner, every=every, compressor=compression, outer=outer)
    moved = torch.zeros(90, dtype=torch.float64)
    for n in range(1, 6 * every + 1):
        x.grad = gradient("x", x.detach(), worker, n)
        moved += 0.1 * x.grad.reshape(-1)
        inner.step()
    return applied, moved, local.error(), float(local.anchor()["parameter 0"].sum())


PAIRS = [
    *[(c, "direct") for c in (*FAMILIES, SketchTopK(0.2), LowRank(1))],
    *[(c, "two-way") for c in (TopK(0.2), Sign(), QSGD())],
    (TopK(0.2), "coordinator"),
]


@pytest.mark.parametrize(("compressor", "exchange"), PAIRS, ids=str)
@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_is_lost(compressor: Compressor, exchange: str, workers: int) -> None:
    """Invariant (ii): the applied means add up to the mean of all that workers have moved, less the mean error."""
    found = simulate(lambda worker: one_vector(worker, compressor, exchange, 3), workers)
    applied, moved = found[0][0], sum(f[1] for f in found) / workers
    for other in found:
        torch.testing.assert_close(other[0], applied, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other[2], found[0][2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(applied, moved - found[0][2], rtol=1e-10, atol=1e-12)
    if compressor != Identity():
        assert found[0][2].norm() > 1e-3  # there is something that could have been lost
