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
    Escape,
    Identity,
    LocalUpdates,
    LowRank,
    OuterSGD,
    Overlap,
    RandomK,
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
COMPRESSORS = [QSGD(127), Rounded(), Sign(per_tensor=True), TopK(0.1), RandomK(0.2), LowRank(2), Identity()]


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


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("exchange", ["direct", "two-way"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_one_model_and_nothing_lost(compressor: Compressor, exchange: str, keep: bool) -> None:
    """After the flush x is the anchor, on all workers. Training goes on, and a whole flush ends where the mean is."""
    if isinstance(compressor, LowRank) and exchange == "two-way":
        pytest.skip("its exchange is its own")

    def work(worker: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        run = Run(worker, exchange=exchange, keep_unsent=keep)
        run.train(14)
        assert run.local.flush(compressor)
        assert torch.equal(run.x(), run.anchor())
        one, held = run.x().clone(), run.anchor() - run.local.error()
        middle = run.end.clone()
        run.train(7)
        assert run.local.flush(Identity())
        return one, held - middle, run.x(), run.end

    found = simulate(work, W)
    assert all(torch.equal(one, found[0][0]) for one, *_ in found)
    held = sum(rest for _, rest, _, _ in found)
    assert isinstance(held, Tensor)
    torch.testing.assert_close(held, torch.zeros_like(held), rtol=0, atol=1e-12)
    mean = torch.stack([end for *_, end in found]).mean(0)
    for _, _, x, _ in found:
        torch.testing.assert_close(x, mean, rtol=1e-12, atol=1e-12)


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


SENT_WHOLE: dict[str, dict[str, Any]] = {
    "uncompressed rounds": {"compressor": Identity()},
    "a schedule that ends with the rounds": {"compressor": {i: Sign() if i < 3 else Identity() for i in range(4)}.get},
    "eight bits": {"compressor": Rounded("int8")},
    "direct": {"exchange": "direct"},
    "all-reduce": {"compressor": RandomK(0.2), "exchange": "all-reduce"},
    "coordinator": {"exchange": "coordinator"},
    "senders": {"exchange": "senders"},
    "another compressor back": {"exchange": "two-way", "back": TopK(0.1)},
    "samples": {"workers": Workers(sample=0.5)},
}
IN_FOUR_BITS: dict[str, dict[str, Any]] = {
    "default": {},
    "two-way": {"exchange": "two-way"},
    "delay": {"overlap": Overlap(3, 2)},
    "schedule": {"compressor": {i: Sign() if i < 3 else Rounded() for i in range(4)}.get},
    "clip": {"workers": Workers(clip=1.0)},
    "outer": {"outer": OuterSGD()},
    "four bits": {"compressor": Rounded("int4")},
}


@pytest.mark.parametrize("what", [*SENT_WHOLE, *IN_FOUR_BITS])
def test_what_a_flush_without_a_compressor_sends(what: str) -> None:
    """All workers have the anchor, bit for bit as by the compressor that is named; whole, nothing is left for later."""
    is_whole = what in SENT_WHOLE
    options = {"compressor": Sign(per_tensor=True)} | (SENT_WHOLE | IN_FOUR_BITS)[what]

    def work(worker: int) -> tuple[list[Tensor], Tensor]:
        ends = []
        for given in ([], [Identity() if is_whole else Rounded("int4")]):
            run = Run(worker, **options)
            run.train(16)
            assert run.local.flush(*given)
            ends.append(run.x())
        assert torch.equal(ends[0], run.anchor())
        return ends, run.local.pending()

    found = simulate(work, W)
    rest = torch.stack([pending for _, pending in found])
    assert bool(rest.any()) != is_whole
    for ends, _ in found:
        assert torch.equal(ends[0], ends[1])
        assert torch.equal(ends[0], found[0][0][0])


def test_one_worker_keeps_its_parameters() -> None:
    run = Run(0, compressor=Sign())
    run.train(14)
    before = run.x().clone()
    assert run.local.flush()
    torch.testing.assert_close(run.x(), before, rtol=0, atol=1e-12)


def test_what_a_flush_has_left_out_is_sent_later_also_after_a_resume() -> None:
    """The mean over workers is where SGD alone would be, of the run and of one that loads its state and parameters."""

    def work(worker: int) -> list[tuple[Tensor, Tensor]]:
        run, other = Run(worker, compressor=Sign()), Run(worker, compressor=Sign())
        run.train(14)
        assert run.local.flush()
        assert run.local.pending().any()
        for p, q in zip(other.parameters, run.parameters, strict=True):
            p.data.copy_(q)
        other.local.load_state_dict(run.local.state_dict())
        other.end = run.end.clone()
        for each in (run, other):
            each.train(6)
            assert each.local.flush(Identity())
        return [(each.x(), each.end) for each in (run, other)]

    found = simulate(work, W)
    for i in (0, 1):
        mean = torch.stack([ends[i][1] for ends in found]).mean(0)
        for ends in found:
            torch.testing.assert_close(ends[i][0], mean, rtol=1e-12, atol=1e-12)
            assert torch.equal(ends[i][0], found[0][0][0])


@pytest.mark.parametrize("before", [Identity(), Rounded("int8"), TopK(0.01)], ids=repr)
def test_an_earlier_flush_does_not_change_what_the_next_one_sends(before: Compressor) -> None:
    """Four bits a value, since the rounds send one, also after a flush with a larger or smaller compressor."""

    def work(worker: int) -> list[Tensor]:
        ends = []
        for last in ([], [Rounded("int4")], [Identity()]):
            run = Run(worker, compressor=Sign(per_tensor=True))
            run.train(6)
            run.local.flush(before)
            run.train(1)
            run.local.flush(*last)
            ends.append(run.x())
        return ends

    for found, four_bits, whole in simulate(work, 2):
        assert torch.equal(found, four_bits)
        assert not torch.equal(found, whole)


def test_with_an_outer_optimizer_it_is_the_mean_of_the_workers_models() -> None:
    """Two steps after a round, the outer momentum would move the anchor by that of whole rounds."""

    def work(worker: int) -> tuple[Tensor, Tensor, Tensor]:
        run = Run(worker, compressor=Identity(), keep_unsent=False, outer=OuterSGD())
        run.train(14)
        before = run.x()
        assert run.local.flush()
        once = run.x()
        assert run.local.flush()
        return before, once, run.x()

    found = simulate(work, W)
    mean = torch.stack([before for before, *_ in found]).mean(0)
    for _, once, twice in found:
        torch.testing.assert_close(once, mean, rtol=1e-12, atol=1e-12)
        assert torch.equal(once, twice)


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


def test_a_running_exchange_is_applied_first() -> None:
    def work(worker: int) -> tuple[Tensor, Tensor, Tensor]:
        run = Run(worker, overlap=Overlap(3, 2))
        run.train(14)
        assert any(part.current is not None for part in run.local._fragments)
        assert run.local.flush(Rounded())
        assert torch.equal(run.x(), run.anchor())
        return run.x(), run.anchor() - run.local.error(), run.end

    found = simulate(work, W)
    mean = torch.stack([end for *_, end in found]).mean(0)
    for x, y, _ in found:
        assert torch.equal(x, found[0][0])
        torch.testing.assert_close(y, mean, rtol=1e-12, atol=1e-12)


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


def test_after_an_escape_check_all_workers_have_one_model() -> None:
    """The check puts x back to its start point, and must put it to the anchor after a flush that leaves a rest."""

    def work(worker: int) -> tuple[Tensor, Tensor, Tensor]:
        run = Run(worker, escape=Escape(10**6, 1e9, lambda: 0.0))
        run.train(14)
        assert run.local.flush(Rounded())
        return run.x(), run.anchor(), run.anchor() - run.local.error() - run.end

    found = simulate(work, W)
    for x, anchor, _ in found:
        assert torch.equal(x, found[0][0])
        assert torch.equal(x, anchor)
    rest = torch.stack([rest for *_, rest in found]).mean(0)
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-12)


def test_what_a_parameter_moved_before_it_was_frozen_is_kept() -> None:
    """It stays in the error memory, and is exchanged once the parameter is trained again."""

    def work(worker: int) -> tuple[Tensor, Tensor]:
        run = Run(worker, exchange="direct")
        run.train(14)
        run.parameters[0].requires_grad_(False)
        assert run.local.flush(Rounded())
        run.parameters[0].requires_grad_(True)
        run.train(4)
        assert run.local.flush(Identity())
        return run.x(), run.end

    found = simulate(work, W)
    mean = torch.stack([end for _, end in found]).mean(0)
    for x, _ in found:
        torch.testing.assert_close(x, mean, rtol=1e-12, atol=1e-12)


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
