"""A flush with a compressor: all workers get one model, and what it leaves out is sent in later rounds.

Whole runs with flushes are compared with the twin in tests/feedback/engine/test_random_local_updates.py.
"""

from contextlib import suppress
from typing import Any

import pytest
import torch
from elastic_fakes import Worker
from specs import local_options
from torch import Tensor, nn

from packsaddle import (
    QSGD,
    Compressor,
    Identity,
    LocalUpdates,
    LowRank,
    Rounded,
    SharedTopK,
    Sign,
    TopK,
    simulate,
)


def test_a_block_flushes_unless_an_exception_ends_it() -> None:
    def body(worker: int) -> tuple[bool, bool, bool]:
        p = nn.Parameter(torch.zeros(8, 8))
        optimizer, ends = torch.optim.SGD([p], lr=0.1), list[bool]()
        local = LocalUpdates(optimizer, Identity(), every=4, mean_momentum=0.0)
        for error in (None, KeyError):
            with suppress(KeyError), local as found:
                p.grad = torch.full_like(p, 1.0 + worker)
                optimizer.step()
                if error is not None:
                    raise error
            ends.append(bool(local.pending().any()))
        return found is local, *ends  # type: ignore[return-value]

    assert simulate(body, 2) == [(True, False, True)] * 2


class Run:
    """Two matrices and a vector, which is sent uncompressed, trained by SGD with random gradients."""

    def __init__(self, worker: int, **options: Any) -> None:
        self.worker, rng = worker, torch.Generator().manual_seed(3)
        self.parameters = [nn.Parameter(torch.randn(s, generator=rng)) for s in ((24, 16), (16, 40), (16,))]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1)
        options = {"compressor": TopK(0.2), "every": 4, "dense_below": 20} | options
        self.local = LocalUpdates(self.optimizer, **local_options(**options))

    def x(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            rng = torch.Generator().manual_seed(1000 * self.worker + self.local.steps)
            for p in self.parameters:
                p.grad = torch.randn(p.shape, generator=rng)
            self.optimizer.step()
        return self


def test_bits_of_a_flush_and_the_default() -> None:
    """Four bits are sent by default, and the rest is kept; with all bits nothing is left."""

    def work(worker: int) -> dict[str, tuple[int, Tensor, Tensor]]:
        ways: dict[str, list[Compressor]] = {
            "all": [Identity()],
            "8": [Rounded("int8")],
            "4": [Rounded("int4")],
            "": [],
        }
        found = {}
        for name, given in ways.items():
            run = Run(worker, compressor=Sign(per_tensor=True)).train(14)
            before = run.local.ledger.total.sent
            assert run.local.flush(*given)
            found[name] = run.local.ledger.total.sent - before, run.x(), run.local.pending()
        return found

    for found in simulate(work, 2):
        sent, x, rest = ({name: values[i] for name, values in found.items()} for i in range(3))
        assert sent[""] < sent["4"] < sent["all"] / 5  # a given compressor is compared first
        assert 0.25 < sent["8"] / sent["all"] < 0.3  # a small model: headers and scales count
        assert 0 < 10 * (x["8"] - x["all"]).norm() < (x["4"] - x["all"]).norm()
        assert torch.equal(x[""], x["4"])
        assert torch.equal(rest[""], rest["4"])
        assert rest[""].any()
        assert not rest["all"].any()


@pytest.mark.parametrize(
    ("dtype", "resumes"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True), (torch.float32, True)],
)
def test_nothing_is_lost_with_sixteen_bits(dtype: torch.dtype, resumes: bool) -> None:
    """anchor - error() moves as x does. Owners keep residuals, which each flush, with another compressor, adds to the
    error memory: by less than the distance of two numbers of 16 bits."""

    def made() -> tuple[nn.Parameter, torch.optim.SGD, LocalUpdates]:
        rng = torch.Generator().manual_seed(0)
        x = nn.Parameter((1 + torch.rand(64, 64, generator=rng)).to(dtype))
        optimizer = torch.optim.SGD([x], lr=2**-7)
        return x, optimizer, LocalUpdates(optimizer, every=1)

    def work(worker: int) -> tuple[Tensor, Tensor, Tensor]:
        (x, optimizer, local), rng = made(), torch.Generator().manual_seed(worker)
        start, moved = x.detach().float().clone(), torch.zeros(64, 64)
        for n in range(16):
            x.grad = (torch.rand(64, 64, generator=rng) < 0.3).to(dtype) * (worker - 1 or 2)
            moved += x.detach().float() - (x.detach() - 2**-7 * x.grad).float()
            optimizer.step()
            if n % 4 == 3:
                local.flush()
            if n == 7 and resumes:
                state, old = local.state_dict(), x.detach()
                x, optimizer, local = made()
                x.data.copy_(old)
                local.load_state_dict(state)
        return start - (local.anchor()["parameter 0"].float() - local.error().view(64, 64)), moved, x.detach()

    found = simulate(work, 3)
    path = torch.stack([moved for _, moved, _ in found]).mean(0)
    for y, _, x in found:
        assert (y - path).norm() < 1e-4 * path.norm()
        assert torch.equal(x, found[0][2])


@pytest.mark.parametrize("wrong", [LowRank(2), SharedTopK(0.1)])
def test_a_failed_flush_changes_nothing(wrong: Compressor) -> None:
    def work(worker: int) -> list[Tensor]:
        ends = []
        for fails in (False, True):
            run = Run(worker, exchange="two-way").train(14)
            if fails:
                with pytest.raises(ValueError, match="cannot be 'two-way'"):
                    run.local.flush(wrong)
            run.train(8)
            assert run.local.flush(Identity())
            ends.append(run.x())
        return ends

    for as_if, failed in simulate(work, 2):
        assert torch.equal(as_if, failed)


CALLS = r"worker 0 calls flush\(compressor\) after step 5, and worker 1 calls flush\(\) after step 5"


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        ((QSGD(127), Rounded()), {}, r"worker 0 has compressor of flush='QSGD\(levels=127\)' and worker 1 has"),
        ((QSGD(127), None), {}, CALLS),
        ((Rounded(), None), {"clip": 2.0}, CALLS),  # with room for norms in the check of each call
    ],
)
def test_workers_must_agree(pair: tuple[Compressor | None, ...], options: dict[str, Any], message: str) -> None:
    def work(worker: int) -> None:
        run = Run(worker, **options).train(5)
        with pytest.raises((ValueError, RuntimeError), match=message):
            run.local.flush(pair[worker])

    simulate(work, 2)


def test_unsuitable_compressors() -> None:
    run = Run(0)
    with pytest.raises(TypeError, match=r"compressor must be a packsaddle Compressor, such as Rounded\(\), or None"):
        run.local.flush("sign")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k"):
        run.local.flush(TopK(10**6))

    with pytest.raises(RuntimeError, match="with a manager, pass none"):
        Worker().local.flush(QSGD(127))
