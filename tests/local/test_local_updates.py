"""LocalUpdates: equal to a naive twin; its invariants; bad rounds; state; what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_in_processes
from local_updates import Case, Trace, check_twin, train
from torch import Tensor

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    CompressedSGD,
    Compression,
    Compressor,
    Escape,
    Identity,
    LocalUpdates,
    OuterSGD,
    RandomK,
    Sign,
    TopK,
    Workers,
    simulate,
)

WHOLE = Compression(TopK(0.5), dense_below=0)
QUARTER = Compression(TopK(0.25), dense_below=0)
GLOO = [
    Case(every=3, compressor=TopK(0.1), fragments=3, delay=2),
    Case(every=4, compressor=RandomK(0.2), delay=3, outer="nesterov", noise=0.01),
    Case(every=1, compressor=QSGD()),
    Case(every=3, compressor=TopK(0.2, values="int8"), decay=0.9, bad={5: 1}, steps=20),
    Case(every=4, compressor=TopK(0.2), fragments=2, delay=3, bad={5: 1}, steps=20),
    Case(every=4, compressor=TopK(0.2), delay=1, clip=2.0, loud=10.0),
]


def run_all(cases: list[Case]) -> list[Trace]:
    return [train(case, torch.distributed.get_rank()) for case in cases]


@pytest.mark.process
def test_equal_to_the_twin_in_processes(tmp_path: Path) -> None:
    """Where exchanges with a delay go on in a thread beside the steps."""
    found = run_in_processes(run_all, 3, tmp_path, GLOO)
    for i, case in enumerate(GLOO):
        check_twin(case, [results[i] for results in found])


def made(
    compressor: Any = WHOLE, *, fill: float = 0.0, lr: float = 1.0, **options: Any
) -> tuple[torch.nn.Parameter, torch.optim.Optimizer, LocalUpdates]:
    x = torch.nn.Parameter(torch.full((4, 4), fill))
    optimizer = torch.optim.SGD([x], lr=lr)
    return x, optimizer, LocalUpdates(optimizer, compressor, **options)


def step(x: torch.nn.Parameter, optimizer: torch.optim.Optimizer, value: float) -> None:
    x.grad = torch.full_like(x, value)
    optimizer.step()


# ---- the anchor


def test_within_at_anchor_x_is_the_anchor_and_nothing_else_is_allowed() -> None:
    x, optimizer, local = made(every=8)
    step(x, optimizer, 1.0)
    state = local.state_dict()
    with local.at_anchor():
        with local.at_anchor():  # as a callback that saves while another evaluates
            assert not x.detach().any()
        calls: list[Callable[..., Any]] = [local.flush, local.error, local.pending, local.state_dict]
        for call, *given in (*((call,) for call in calls), (local.load_state_dict, state), (optimizer.step,)):
            with pytest.raises(RuntimeError, match=rf"{call.__name__}\(\) within at_anchor\(\)"):
                call(*given)
        assert not x.detach().any()
    assert bool((x.detach() == -1).all())
    assert local.steps == 1
    assert local.flush()


def test_a_step_at_the_anchor_is_refused_if_a_scaler_skips_it_too() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x, optimizer, local = made(every=1, scaler=scaler)
    scaler.scale(torch.ones(()))
    x.grad = torch.full_like(x, torch.inf)
    with local.at_anchor(), pytest.raises(RuntimeError, match=r"optimizer.step\(\) within at_anchor\(\)"):
        scaler.step(optimizer)
    assert local.steps == local.rounds == 0


def test_an_evaluation_at_the_anchor() -> None:
    """As a decorator, in each call."""
    x, optimizer, local = made(Compression(Identity(), dense_below=0), every=2, overlap=1)

    @local.at_anchor()
    def evaluate() -> float:
        return float(x.detach().mean())

    seen = []
    for _ in range(5):
        step(x, optimizer, 1.0)
        seen.append((evaluate(), float(x.detach().mean())))
    assert seen == [(0, -1), (0, -2), (-2, -3), (-2, -4), (-4, -5)]  # exchanges after 2 and 4 end a step later


# ---- the first step, and weights that are loaded before it


def stepped_once(gradient: Tensor, every: int = 8) -> LocalUpdates:
    """A first step by this gradient."""
    x = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = torch.optim.SGD([x], lr=1.0)
    local = LocalUpdates(optimizer, Compression(Identity(), dense_below=0), every=every)
    x.grad = gradient
    optimizer.step()
    return local


def test_gradients_that_were_exchanged_are_refused() -> None:
    """Equal ones, at the first step; of few values, or of one value, they may be chance, and zeros always are."""
    same = torch.linspace(-1, 1, 20)
    with pytest.raises(RuntimeError, match="gradients are equal bit for bit on all 2 workers at the first step"):
        simulate(lambda _: stepped_once(same.clone()), 2)
    simulate(lambda _: stepped_once(same.clone()), 1)
    for few in (torch.ones(1), torch.ones(40), torch.linspace(-1, 1, 15)):
        with pytest.warns(UserWarning, match="equal bit for bit on all 2 workers at the first step: .*may be chance"):
            simulate(lambda _, few=few: stepped_once(few.clone()), 2)
    simulate(lambda _: stepped_once(torch.zeros(40)), 2)


@pytest.mark.parametrize("every", [1, 3])
def test_nans_on_all_workers_at_the_first_step_are_a_skipped_round(every: int) -> None:
    def body(worker: int) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
        local = stepped_once(torch.full((40,), torch.nan), every)
        (optimizer,) = local.optimizers
        (x,) = optimizer.param_groups[0]["params"]
        for n in range(2, 2 * every + 1):
            step(x, optimizer, n + worker)
        return [skip.workers for skip in local.skips], local.anchor()["parameter 0"], x.detach()

    for workers, anchor, x in simulate(body, 2):
        assert workers == [(0, 1)]
        expected = -sum(n + 0.5 for n in range(every + 1, 2 * every + 1))
        assert anchor.tolist() == x.tolist() == [expected] * 40


def test_weights_loaded_after_construction() -> None:
    def body(worker: int, elsewhere: float) -> Tensor:
        x, optimizer, local = made(Compression(Identity(), dense_below=0), every=1)
        x.data.fill_(5.0 + elsewhere * worker)
        step(x, optimizer, 1.0 + worker)
        return local.anchor()["parameter 0"]

    for anchor in simulate(lambda worker: body(worker, 0.0), 2):
        assert bool((anchor == 3.5).all())
    with pytest.raises(RuntimeError, match="must begin at the same parameters, but worker 1 differs"):
        simulate(lambda worker: body(worker, 1.0), 2)


def test_weights_loaded_before_a_worker_reads_the_anchor() -> None:
    def body(worker: int) -> list[float]:
        x = torch.nn.Parameter(torch.zeros(4, 4))
        optimizer = torch.optim.SGD([x], lr=0.0)
        rule = Escape(10**6, 1.0, lambda: float(x.detach().square().sum()))
        local = LocalUpdates(optimizer, every=1, compressor=QUARTER, escape=rule)
        x.data.fill_(5.0)
        found = [float(local.anchor()["parameter 0"].mean()), float(local.error().norm())]
        with local.at_anchor():
            found.append(float(x.detach().mean()))
        step(x, optimizer, float(worker))
        assert local.resets == []  # x has not moved
        return [*found, float(x.detach().mean())]

    assert simulate(body, 2) == [[5.0, 0.0, 5.0, 5.0]] * 2


# ---- parameters


@pytest.mark.parametrize("added", [False, True])
def test_parameters_that_come_later_are_refused(added: bool) -> None:
    """They would be stepped by each worker alone; parameters that are frozen later stay as they are."""
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    if not added:
        first.requires_grad_(False)
    named = list(first.named_parameters()) if added else list(first.parameters())
    others = list(second.named_parameters("second")) if added else list(second.parameters())
    optimizer = torch.optim.SGD([*others, *([] if added else named)], lr=0.1)
    local = LocalUpdates(optimizer, every=2, compressor=WHOLE)
    for part, n in ((second, 0), (second.requires_grad_(False), 1)):
        for p in part.parameters():
            p.grad = torch.ones_like(p) if n == 0 else None
        optimizer.step()
    if added:
        optimizer.add_param_group({"params": named})
    before = [p.detach().clone() for p in first.requires_grad_(True).parameters()]
    for p in first.parameters():
        p.grad = torch.ones_like(p)
    which = r"\[4, 4\] \(weight\) in group 1 of SGD" if added else r"\[4, 4\] in group 0 of SGD"
    with pytest.raises(RuntimeError, match=rf"shape {which} was added or unfrozen after"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(first.parameters(), before, strict=True))
    assert local.steps == 2


def test_groups_may_have_names_in_common() -> None:
    parts = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    optimizer = torch.optim.SGD([{"params": list(part.named_parameters())} for part in parts], lr=0.1)
    local = LocalUpdates(optimizer, every=1, compressor=WHOLE)
    assert local.anchor().keys() == {f"parameter {i}" for i in range(4)}


# ---- rounds


def test_bytes_are_counted() -> None:
    """Of a ring all-reduce of values, and of the uncompressed part; and those that DDP would send."""

    def body(worker: int) -> LocalUpdates:
        x, b = torch.nn.Parameter(torch.ones(50, 40)), torch.nn.Parameter(torch.ones(7))
        optimizer = torch.optim.SGD([x, b], lr=0.1)
        local = LocalUpdates(optimizer, every=5, compressor=RandomK(0.1))
        for n in range(20):
            b.grad = torch.ones_like(b)
            step(x, optimizer, worker + n)
        return local

    for local in simulate(body, 2):
        sent = {name: moved.sent for name, moved in local.ledger.by_purpose.items() if name not in ("start", "guard")}
        assert sent == {"values": 4 * 4 * 200, "dense": 4 * 4 * 8}  # 4 rounds, 2 (W - 1) / W = 1
        assert local.uncompressed.sent == 20 * 4 * 2007
        assert [span.first for span in local.ledger.spans if "values" in span.by_purpose] == [4, 9, 14, 19]


@pytest.mark.parametrize(
    "case",
    [
        Case(every=3, compressor=Identity(), outer="nesterov", workers=1),
        Case(every=4, compressor=TopK(0.2), fragments=2, delay=1, clip=1.0, workers=1, flushes={6: None}),
        Case(every=2, compressor=Sign(), exchange="two-way", bad={5: 0}, workers=1, flushes={17: None}),
    ],
)
def test_one_worker_equals_the_twin(case: Case) -> None:
    check_twin(case, [train(case, 0)])


def exact(worker: int, n: int) -> Tensor:
    """A gradient of few binary digits, so that sums of some are exact in double precision."""
    rng = torch.Generator().manual_seed(50 * worker + n)
    return torch.randint(-64, 64, (9, 7), generator=rng).double() / 16


@pytest.mark.parametrize("compressor", [TopK(0.2), RandomK(0.2), Identity(), AdaptiveTopK(0.7)], ids=str)
def test_every_step_with_sgd_is_algorithm_1(compressor: Compressor) -> None:
    """H = 1 and plain SGD: CompressedSGD bit for bit. Gradients are short binary fractions: a - (a - u) is u then."""

    def body(worker: int) -> bool:
        kind = Compression(compressor, exchange="direct", dense_below=0)
        ours, theirs = (torch.nn.Parameter(torch.zeros(9, 7, dtype=torch.float64)) for _ in range(2))
        inner = torch.optim.SGD([ours], lr=0.25)
        local = LocalUpdates(inner, every=1, compressor=kind, seed=4, keep_unsent=False)
        algorithm1 = CompressedSGD([theirs], 0.25, kind, seed=4)
        for n in range(12):
            ours.grad = theirs.grad = exact(worker, n)
            inner.step()
            algorithm1.step()
            if not torch.equal(ours, theirs):
                return False
        e = 0.25 * algorithm1.error()
        return torch.equal(local.error(), e) and bool(e.any()) == (compressor != Identity())

    assert simulate(body, 2) == [True] * 2


@pytest.mark.parametrize(
    ("workers", "options", "messages"),
    [
        (2, {}, 1),
        (4, {}, 1.5),
        (8, {}, 1.75),
        (4, {"compressor": Compression(Sign(), exchange="direct")}, 3),
        (4, {"workers": Workers(weight=2.0)}, 1.5),
    ],
    ids=["two", "four", "eight", "asked for", "weights"],
)
def test_the_exchange_follows_the_number_of_workers(workers: int, options: dict[str, Any], messages: float) -> None:
    """Gathered messages grow with it, (W - 1) of them a worker; by owners they are 2 (W - 1) / W."""

    def body(worker: int) -> int:
        x = torch.nn.Parameter(torch.zeros(256, 256))
        optimizer = torch.optim.SGD([x], lr=1.0)
        local = LocalUpdates(optimizer, every=1, **{"compressor": Sign()} | options)
        x.grad = torch.randn(256, 256, generator=torch.Generator().manual_seed(worker))
        optimizer.step()
        return local.ledger.total.sent - local.ledger.by_purpose["start"].sent

    for sent in simulate(body, workers):
        assert sent / (256 * 256 / 8) == pytest.approx(messages, rel=0.06)


def test_a_flush_with_nothing_to_exchange_moves_nothing() -> None:
    """The outer momentum must not move the anchor: DiLoCo ends with its last round, and a second flush is a no-op."""

    def work(rank: int) -> tuple[float, float, float]:
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        outer = OuterSGD(0.7, 0.9, nesterov=True)
        local = LocalUpdates(optimizer, Identity(), every=2, outer=outer, keep_unsent=False)
        for n in range(4):
            weight.grad = torch.full_like(weight, 1.0 + rank + n)
            optimizer.step()
        norms = [float(weight.detach().norm())]
        for _ in range(2):
            assert local.flush()
            norms.append(float(weight.detach().norm()))
        return norms[0], norms[1], norms[2]

    for before, once, twice in simulate(work, 2):
        assert before == once == twice > 0
