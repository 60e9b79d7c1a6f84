"""A flush with a compressor: all workers get one model, and what it leaves out is sent in later rounds."""

from collections.abc import Callable
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
    Workers,
    simulate,
)
from packsaddle.comm import resolve

Gloo = Callable[..., list[Any]]
W, LR = 3, 0.1


class Run:
    """Two matrices and a vector, which is sent uncompressed, trained by SGD with random gradients."""

    def __init__(self, worker: int, *, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.worker, rng = worker, torch.Generator().manual_seed(3)
        shapes = (24, 16), (16, 40), (16,)
        self.parameters = [nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)) for s in shapes]
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR)
        options = {"compressor": TopK(0.2), "every": 4, "dense_below": 20} | options
        self.local = LocalUpdates(self.optimizer, **local_options(**options))
        self.end = self.x().double()  # where SGD alone would be, without exchanges

    def x(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def anchor(self) -> Tensor:
        return torch.cat([a.reshape(-1) for a in self.local.anchor().values()])

    def train(self, steps: int) -> None:
        for _ in range(steps):
            rng = torch.Generator().manual_seed(1000 * self.worker + self.local.steps)
            for p in self.parameters:
                p.grad = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype)
            self.end -= LR * torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
            self.optimizer.step()


def test_by_default_four_bits_are_sent_and_the_rest_is_kept() -> None:
    def work(worker: int) -> dict[str, tuple[int, Tensor, Tensor]]:
        found = {}
        for name, given in (("whole", [Identity()]), ("four bits", [Rounded("int4")]), ("default", [])):
            run = Run(worker, dtype=torch.float32, compressor=Sign(per_tensor=True))
            run.train(14)
            before = run.local.ledger.total.sent
            assert run.local.flush(*given)
            found[name] = run.local.ledger.total.sent - before, run.x(), run.local.pending()
        return found

    for found in simulate(work, 2):
        sent, x, rest = zip(*(found[name] for name in ("whole", "four bits", "default")), strict=True)
        assert sent[2] < sent[1] < sent[0] / 5  # a given compressor is compared first
        assert torch.equal(x[2], x[1])
        assert torch.equal(rest[2], rest[1])
        assert rest[2].any()
        assert not rest[0].any()


def test_one_worker_keeps_its_parameters() -> None:
    run = Run(0, compressor=Sign())
    run.train(14)
    before = run.x().clone()
    assert run.local.flush()
    torch.testing.assert_close(run.x(), before, rtol=0, atol=1e-12)


def test_eight_bits_take_a_quarter_of_the_bytes_and_are_close() -> None:
    def work(worker: int) -> dict[str, tuple[int, Tensor]]:
        found = {}
        for name, compressor in (("whole", Identity()), ("8 bits", Rounded("int8"))):
            run = Run(worker, dtype=torch.float32)
            run.train(14)
            before = run.local.ledger.total.sent
            run.local.flush(compressor)
            found[name] = run.local.ledger.total.sent - before, run.x()
        return found

    for found in simulate(work, 2):
        (whole, x), (few, nearly) = found["whole"], found["8 bits"]
        assert 0.25 < few / whole < 0.3  # a small model: headers and scales count
        assert 0 < (nearly - x).norm() < 0.002 * x.norm()


def test_sixteen_bit_parameters_are_equal() -> None:
    def work(worker: int) -> Tensor:
        run = Run(worker, dtype=torch.bfloat16)
        run.train(14)
        assert run.local.flush(QSGD(127))
        return run.x()

    found = simulate(work, W)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_lost_with_sixteen_bits(dtype: torch.dtype, resumes: bool) -> None:
    """anchor - error() moves as x does. Owners keep residuals, which each flush, with another compressor, adds to the
    error memory: by less than the distance of two numbers of 16 bits."""

    def made() -> tuple[nn.Parameter, torch.optim.SGD, LocalUpdates]:
        rng = torch.Generator().manual_seed(0)
        x = nn.Parameter((1 + torch.rand(64, 64, generator=rng)).to(dtype))
        optimizer = torch.optim.SGD([x], lr=2**-7)
        return x, optimizer, LocalUpdates(optimizer, every=1)

    def work(worker: int) -> tuple[Tensor, Tensor]:
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
        return start - (local.anchor()["parameter 0"].float() - local.error().view(64, 64)), moved

    found = simulate(work, W)
    path = torch.stack([moved for _, moved in found]).mean(0)
    for y, _ in found:
        assert (y - path).norm() < 1e-4 * path.norm()


@pytest.mark.parametrize("wrong", [LowRank(2), SharedTopK(0.1)])
def test_a_failed_flush_changes_nothing(wrong: Compressor) -> None:
    def work(worker: int) -> list[Tensor]:
        ends = []
        for fails in (False, True):
            run = Run(worker, exchange="two-way")
            run.train(14)
            if fails:
                with pytest.raises(ValueError, match="cannot be 'two-way'"):
                    run.local.flush(wrong)
            run.train(8)
            assert run.local.flush(Identity())
            ends.append(run.x())
        return ends

    for as_if, failed in simulate(work, W):
        assert torch.equal(as_if, failed)


def mismatched(pair: tuple[Compressor | None, ...]) -> str:
    """What a real process is told if its flush differs from the other's, where norms are exchanged as well."""
    worker = resolve(None).rank
    run = Run(worker, workers=Workers(clip=2.0))
    run.train(5)
    try:
        run.local.flush(pair[worker])
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_clipped_workers_must_agree(gloo: Gloo) -> None:
    for said in gloo(mismatched, 2, (Rounded(), None)):
        assert "worker 0 calls flush(compressor) after step 5, and worker 1 calls flush() after step 5" in said


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((QSGD(127), Rounded()), r"worker 0 has compressor of flush='QSGD\(levels=127\)' and worker 1 has"),
        ((QSGD(127), None), r"worker 0 calls flush\(compressor\) after step 5, and worker 1 calls flush\(\)"),
    ],
)
def test_workers_must_agree(pair: tuple[Compressor | None, ...], said: str) -> None:
    def work(worker: int) -> None:
        run = Run(worker)
        run.train(5)
        with pytest.raises((ValueError, RuntimeError), match=said):
            run.local.flush(pair[worker])

    simulate(work, 2)


def test_unsuitable_compressors() -> None:
    run = Run(0)
    with pytest.raises(TypeError, match=r"compressor must be a packsaddle Compressor, such as Rounded\(\), or None"):
        run.local.flush("sign")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k"):
        run.local.flush(TopK(10**6))

    def work(worker: int) -> None:
        sampled = Run(worker, workers=Workers(sample=0.5))
        with pytest.raises(ValueError, match="must average messages directly"):
            sampled.local.flush(LowRank(2))

    simulate(work, 2)
    with pytest.raises(RuntimeError, match="with a manager, pass none"):
        Worker(0).local.flush(QSGD(127))
