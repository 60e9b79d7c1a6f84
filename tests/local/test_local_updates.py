"""LocalUpdates: equal to a naive twin; its invariants; bad rounds; state; what it refuses."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_in_processes
from local_updates import Case, Trace, begin, check_twin, gradient, train
from specs import local_options
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
    Overlap,
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
]


def run_all(cases: list[Case]) -> list[Trace]:
    return [train(case, torch.distributed.get_rank()) for case in cases]


@pytest.mark.process
@pytest.mark.parametrize("workers", [2, 3])
def test_equal_to_the_twin_in_processes(workers: int, tmp_path: Path) -> None:
    """Where exchanges with a delay go on in a thread beside the steps."""
    found = run_in_processes(run_all, workers, tmp_path, GLOO)
    for i, case in enumerate(GLOO):
        check_twin(case, [results[i] for results in found])


@pytest.mark.parametrize("case", [GLOO[3], GLOO[4], Case(every=3, compressor=RandomK(0.3), bad={1: 0, 2: 1, 9: 1})])
def test_a_bad_round_is_left_out_by_all(case: Case) -> None:
    found = simulate(lambda worker: train(case, worker), 2)
    check_twin(case, found)
    for trace in found:
        assert [skip.workers for skip in trace.skips]
        assert all("of u" in str(skip) or "of w" in str(skip) for skip in trace.skips)
        assert trace.skipped == len(trace.skips)
    assert [skip.workers for skip in found[0].skips] == [skip.workers for skip in found[1].skips]


def test_at_the_anchor_nothing_looks_at_this_workers_own_changes() -> None:
    x = torch.nn.Parameter(torch.zeros(4, 4))
    local = LocalUpdates(torch.optim.SGD([x], lr=1.0), every=8, compressor=WHOLE)
    with local.at_anchor():
        with local.at_anchor():  # as a callback that saves while another evaluates
            pass
        state = LocalUpdates(torch.optim.SGD([torch.nn.Parameter(torch.zeros(4, 4))]), compressor=WHOLE).state_dict()
        calls: list[Callable[..., Any]] = [local.flush, local.error, local.pending, local.sit_out, local.state_dict]
        for call, *given in (*((call,) for call in calls), (local.load_state_dict, state)):
            with pytest.raises(RuntimeError, match=rf"{call.__name__}\(\) within at_anchor\(\)"):
                call(*given)
    assert local.flush()


def exact(worker: int, n: int) -> Tensor:
    """A gradient of few binary digits, so that sums of some are exact in double precision."""
    rng = torch.Generator().manual_seed(50 * worker + n)
    return torch.randint(-64, 64, (9, 7), generator=rng).double() / 16


@pytest.mark.parametrize("compressor", [TopK(0.2), RandomK(0.2), Identity(), AdaptiveTopK(0.7)], ids=str)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_step_with_sgd_is_algorithm_1(compressor: Compressor, workers: int) -> None:
    """H = 1 and plain SGD: CompressedSGD bit for bit. Gradients are short binary fractions: a - (a - u) is u then."""

    def body(worker: int) -> bool:
        kind = Compression(compressor, dense_below=0)
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

    assert simulate(body, workers) == workers * [True]


def test_identity_is_the_mean_of_workers() -> None:
    """Invariant (i): C = Identity, no outer optimizer: every H steps, the mean of what workers have by themselves."""

    def body(worker: int) -> list[tuple[Tensor, Tensor]]:
        here, alone = (torch.nn.Parameter(begin()["w"]) for _ in range(2))
        inner, free = (torch.optim.AdamW([p], lr=0.05) for p in (here, alone))
        LocalUpdates(inner, every=4, compressor=Identity(), mean_momentum=0.0)
        seen = []
        for n in range(1, 13):
            for p, optimizer in ((here, inner), (alone, free)):
                p.grad = gradient("w", p.detach(), worker, n)
                optimizer.step()
            if n % 4 == 0:
                seen.append((here.detach().clone(), alone.detach().clone()))
                with torch.no_grad():
                    alone.copy_(here)
        return seen

    found = simulate(body, 3)
    for i in range(3):
        mean = torch.stack([alone for _, alone in (seen[i] for seen in found)]).mean(0)
        for here, _ in (seen[i] for seen in found):
            torch.testing.assert_close(here, mean, rtol=1e-13, atol=1e-13)


def test_what_is_sent_is_counted() -> None:
    """Bytes of a ring all-reduce of values, the dense part and a flag; and what DDP would send."""

    def body(worker: int) -> LocalUpdates:
        x, b = torch.nn.Parameter(torch.ones(50, 40)), torch.nn.Parameter(torch.ones(7))
        optimizer = torch.optim.SGD([x, b], lr=0.1)
        local = LocalUpdates(optimizer, every=5, compressor=RandomK(0.1))
        for n in range(20):
            x.grad, b.grad = torch.full_like(x, worker + n), torch.ones_like(b)
            optimizer.step()
        return local

    for local in simulate(body, 2):
        purposes = {
            name: moved.sent for name, moved in local.ledger.by_purpose.items() if name not in ("start", "guard")
        }
        assert purposes == {"values": 4 * 4 * 200, "dense": 4 * 4 * 8}  # 4 rounds, 2 (W - 1) / W = 1
        assert local.uncompressed.sent == 20 * 4 * 2007
        assert local.rounds == 4
        assert [span.first for span in local.ledger.spans if "values" in span.by_purpose] == [4, 9, 14, 19]


def test_senders() -> None:
    """A coordinate that one of two workers sends moves by all of it, one that both send by their mean."""

    def body(worker: int) -> Tensor:
        x = torch.nn.Parameter(torch.zeros(1, 4))
        optimizer = torch.optim.SGD([x], lr=1.0)
        kind = Compression(TopK(0.5), dense_below=0, exchange="senders")
        LocalUpdates(optimizer, kind, every=1, keep_unsent=False)
        x.grad = torch.tensor([[8.0, 4.0, 1.0, 0.5]]) if worker == 0 else torch.tensor([[6.0, 0.25, 1.0, 3.0]])
        optimizer.step()
        return x.detach()

    for x in simulate(body, 2):
        assert x.tolist() == [[-7.0, -4.0, 0.0, -3.0]]


def stepped_once(gradient: Tensor, every: int = 8) -> LocalUpdates:
    """A first step by this gradient."""
    x = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = torch.optim.SGD([x], lr=1.0)
    local = LocalUpdates(optimizer, every=every, compressor=Compression(Identity(), dense_below=0))
    x.grad = gradient
    optimizer.step()
    return local


def test_equal_gradients_are_refused() -> None:
    """At the first step: whoever has exchanged them."""
    same = torch.linspace(-1, 1, 20)
    with pytest.raises(RuntimeError, match="gradients are equal bit for bit on all 2 workers at the first step"):
        simulate(lambda _: stepped_once(same.clone()), 2)
    simulate(lambda _: stepped_once(same.clone()), 1)


def test_equal_gradients_of_few_values_may_be_chance() -> None:
    """As those of one coordinate, or of a sum."""
    for same in (torch.ones(1), torch.ones(40), torch.linspace(-1, 1, 15)):
        with pytest.warns(UserWarning, match="equal bit for bit on all 2 workers at the first step: .*may be chance"):
            simulate(lambda _: stepped_once(same.clone()), 2)  # noqa: B023 -- called in the loop
    simulate(lambda _: stepped_once(torch.zeros(40)), 2)


@pytest.mark.parametrize("every", [1, 3])
def test_nans_on_all_workers_at_the_first_step_are_a_skipped_round(every: int) -> None:
    def body(worker: int) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
        local = stepped_once(torch.full((40,), torch.nan), every)
        (optimizer,) = local.optimizers
        (x,) = optimizer.param_groups[0]["params"]
        for n in range(2, 2 * every + 1):
            x.grad = torch.full_like(x, n + worker)
            optimizer.step()
        return [skip.workers for skip in local.skips], local.anchor()["parameter 0"], x.detach()

    for workers, anchor, x in simulate(body, 2):
        assert workers == [(0, 1)]
        expected = -sum(n + 0.5 for n in range(every + 1, 2 * every + 1))
        assert anchor.tolist() == x.tolist() == [expected] * 40


def test_weights_loaded_after_construction() -> None:
    def body(worker: int, elsewhere: float) -> Tensor:
        x = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = torch.optim.SGD([x], lr=1.0)
        local = LocalUpdates(optimizer, every=1, compressor=Identity())
        with torch.no_grad():
            x.fill_(5.0 + elsewhere * worker)
        x.grad = torch.full_like(x, 1.0 + worker)
        optimizer.step()
        return local.anchor()["parameter 0"]

    for anchor in simulate(lambda worker: body(worker, 0.0), 2):
        assert anchor.tolist() == [[3.5, 3.5], [3.5, 3.5]]
    with pytest.raises(RuntimeError, match="must begin at the same parameters, but worker 1 differs"):
        simulate(lambda worker: body(worker, 1.0), 2)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("left_out", [(0, 1), (1,)], ids=["by all", "by one"])
def test_weights_loaded_before_a_first_step_that_is_left_out(keep: bool, left_out: tuple[int, ...]) -> None:
    """By a scaler, which finds an Inf; a worker may also sit out up to the first exchange."""

    def body(worker: int) -> tuple[float, float]:
        x = torch.nn.Parameter(torch.zeros(4, 4))
        optimizer = torch.optim.SGD([x], lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        local = LocalUpdates(optimizer, every=2, compressor=QUARTER, keep_unsent=keep, scaler=scaler)
        with torch.no_grad():
            x.fill_(5.0)
        for n in range(4):
            scale = float(scaler.scale(torch.ones(())))
            x.grad = torch.full_like(x, scale * (1.0 + worker))
            if n == 0 and worker in left_out:
                x.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        return float(x.detach().mean()), float(local.anchor()["parameter 0"].mean())

    assert simulate(body, 2) == [(5.0, 5.0)] * 2


def test_weights_loaded_before_a_look() -> None:
    def body(worker: int) -> list[float]:
        x = torch.nn.Parameter(torch.zeros(4, 4))
        optimizer = torch.optim.SGD([x], lr=0.0)
        rule = Escape(10**6, 1.0, lambda: float(x.detach().square().sum()))
        local = LocalUpdates(optimizer, every=1, compressor=QUARTER, escape=rule)
        with torch.no_grad():
            x.fill_(5.0)
        found = [float(local.anchor()["parameter 0"].mean()), float(local.error().norm())]
        with local.at_anchor():
            found.append(float(x.detach().mean()))
        if worker == 1:
            local.sit_out()
        else:
            x.grad = torch.ones_like(x)
            optimizer.step()
        assert local.resets == []  # x has not moved
        return [*found, float(x.detach().mean())]

    assert simulate(body, 2) == [[5.0, 0.0, 5.0, 5.0]] * 2


@pytest.mark.parametrize("added", [False, True])
def test_parameters_that_come_later_are_refused(added: bool) -> None:
    """They would be stepped by each worker alone; what is frozen later goes on as it is."""
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
    def body(worker: int) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
        optimizer = torch.optim.SGD([{"params": list(part.named_parameters())} for part in parts], lr=0.1)
        local = LocalUpdates(optimizer, every=1, compressor=Identity())
        parameters = [p for part in parts for p in part.parameters()]
        for p in parameters:
            p.grad = torch.full_like(p, 1.0 + worker)
        optimizer.step()
        assert local.anchor().keys() == {f"parameter {i}" for i in range(4)}
        return [p.detach().clone() for p in parameters]

    one, two = simulate(body, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_an_escape_is_of_the_anchor() -> None:
    """From a saddle along one axis: a reset commits y = a - mean e, clears the errors, and all workers have it."""

    def body(worker: int) -> tuple[Tensor, LocalUpdates]:
        x = torch.nn.Parameter(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
        curvature = torch.tensor([1.0, -1.0, 0.5, 0.25], dtype=torch.float64)

        def f() -> Tensor:
            return 0.5 * (curvature * x.detach().square()).sum()

        optimizer = torch.optim.SGD([x], lr=0.1)
        kind = Compression(TopK(0.25), dense_below=0)
        local = LocalUpdates(optimizer, every=2, compressor=kind, noise=0.01, escape=Escape(10**6, 0.7, f))
        for n in range(60):
            x.grad = curvature * x.detach() + 1e-3 * (worker + n % 3)
            optimizer.step()
        return local.anchor()["parameter 0"], local

    found = simulate(body, 2)
    for x, local in found:
        assert torch.equal(x, found[0][0])
        assert abs(float(x[0, 1])) > 0.5  # it has left along the axis of negative curvature
        assert local.resets
        assert all(reset.reason == "radius" for reset in local.resets)
        assert any(reset.committed for reset in local.resets)
    assert found[0][1].resets == found[1][1].resets


def test_an_anchor_can_be_evaluated() -> None:
    x = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([x], lr=1.0)
    local = LocalUpdates(optimizer, every=8, compressor=WHOLE)
    x.grad = torch.ones_like(x)
    optimizer.step()
    with local.at_anchor():
        assert not x.detach().any()
        with pytest.raises(RuntimeError, match=r"optimizer.step\(\) within at_anchor\(\)"):
            optimizer.step()
        assert not x.detach().any()
    assert bool((x.detach() == -1).all())
    assert local.steps == 1


def test_a_step_at_the_anchor_is_refused_if_a_scaler_skips_it_too() -> None:
    x = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer, scaler = torch.optim.SGD([x], lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0)
    local = LocalUpdates(optimizer, every=1, compressor=WHOLE, scaler=scaler)
    scaler.scale(torch.ones(()))
    x.grad = torch.full_like(x, torch.inf)
    with local.at_anchor(), pytest.raises(RuntimeError, match=r"optimizer.step\(\) within at_anchor\(\)"):
        scaler.step(optimizer)
    assert local.steps == local.rounds == 0


def test_an_evaluation_at_the_anchor() -> None:
    """As a decorator, in each call."""
    x = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([x], lr=1.0)
    local = LocalUpdates(optimizer, every=2, compressor=Identity(), overlap=1)

    @local.at_anchor()
    def evaluate() -> float:
        return float(x.detach().mean())

    seen = []
    for _ in range(5):
        x.grad = torch.ones_like(x)
        optimizer.step()
        seen.append((evaluate(), float(x.detach().mean())))
    assert seen == [(0, -1), (0, -2), (-2, -3), (-2, -4), (-4, -5)]  # exchanges after 2 and 4 land a step later


def test_a_second_one_on_an_optimizer_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(4, 4))], lr=1.0)
    LocalUpdates(optimizer, every=8, compressor=WHOLE)
    with pytest.raises(RuntimeError, match=r"optimizer has LocalUpdates already.* make SGD anew"):
        LocalUpdates(optimizer, every=8, compressor=WHOLE)


def test_refusals() -> None:
    x = torch.nn.Parameter(torch.zeros(40, 40))
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    def make(parameters: Any = None, **options: Any) -> LocalUpdates:
        return LocalUpdates(torch.optim.SGD(parameters or [x], lr=1.0), **local_options(**options))

    cases: dict[str, Any] = {
        "every must be an integer of at least 1, got 0": lambda: make(every=0),
        "every must be an integer of at least 1, got 2.5": lambda: make(every=2.5),
        "fragments must be an integer of at least 1": lambda: make(fragments=0),
        "overlap.fragments must be at most every = 3": lambda: make(every=3, fragments=4),
        "fragments must be at most the number of parameters, 1, got 2": lambda: make(fragments=2),
        "overlap.delay must be below every = 3": lambda: make(every=3, delay=3),
        "delay must be an integer of at least 0": lambda: make(delay=-1),
        "decay must be in (0, 1] for local updates, got 0": lambda: make(decay=0),
        "decay must be in [0, 1], got nan": lambda: make(decay=float("nan")),
        "mean_momentum must be in [0, 1], got 1.5": lambda: make(mean_momentum=1.5),
        "mean_momentum must be in [0, 1], got nan": lambda: make(mean_momentum=float("nan")),
        "mean_momentum needs Adam's moments, state exp_avg and exp_avg_sq, and SGD has none": (
            lambda: make(mean_momentum=0.5)
        ),
        "blend needs a delay": lambda: make(blend=0.5),
        "blend must be None or in [0, 1], got 2": lambda: make(blend=2, delay=1),
        "exchange must be one of direct, auto": lambda: make(exchange="median"),
        "workers must be a process group, a DeviceMesh, Workers or Elastic, got 4": lambda: make(workers=4),
        "compressor must be a packsaddle Compressor": lambda: make(compressor=0.1),
        "compressor must be made, as RandomK(0.01) or Sign() is, got the class TopK": lambda: make(compressor=TopK),
        'memory must be "buffer" for local updates': lambda: make(compressor=Compression(TopK(0.1), memory="ef21")),
        "noise must be finite and not negative": lambda: make(noise=-1.0),
        "escape needs fragments=1, delay=0": lambda: make(delay=1, escape=Escape(3, 1.0, lambda: 0.0)),
        "parameters that require gradients, and has none": lambda: make([frozen]),
        "but parameter 0 is torch.complex64": lambda: make([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]),
        "must not share memory": lambda: make([x, torch.nn.Parameter(x.data)]),
        "share memory, but parameter 0 and parameter 1": lambda: make([x, torch.nn.Parameter(x.data.view(-1)[1599:])]),
        "k of TopK must be at most": lambda: make(compressor=TopK(k=10**6)),
        "outer must be a function that returns a torch optimizer, got list": lambda: make(outer=lambda a: list(a)),
        "optimizer must be a torch optimizer, got Linear": lambda: LocalUpdates(torch.nn.Linear(2, 2)),  # type: ignore[arg-type]
        "CompressedSGD exchanges by itself": lambda: LocalUpdates(CompressedSGD([x], 0.1)),
        "scaler must be a torch.amp.GradScaler": lambda: make(scaler=3),
        "that returns a torch optimizer, or None, got 5": lambda: make(outer=5),
        "or None, got an optimizer, SGD": lambda: make(outer=torch.optim.SGD([x], 0.7)),
        "outer must return an optimizer of all tensors that it is given, and of no others": (
            lambda: make(outer=lambda anchors: torch.optim.SGD([a.detach().clone() for a in anchors]))
        ),
        "escape must be an Escape or None, got 3": lambda: make(escape=3),
        "model must be a torch Module or None, got 5": lambda: make(model=5),
        "noise must be a number, or a function of the step that returns one, got 'a'": lambda: make(noise="a"),
        "blend must be None or in [0, 1], got 'a'": lambda: make(blend="a", delay=1),
        "nesterov must be True, False or None, got 3": lambda: OuterSGD(nesterov=3),  # type: ignore[arg-type]
        "momentum must be in [0, 1), got 'a'": lambda: OuterSGD(momentum="a"),  # type: ignore[arg-type]
        "workers must be a process group, a DeviceMesh, Workers or Elastic, got 'x'": lambda: make(workers="x"),
        "keep_unsent must be True or False, got 'no'": lambda: make(keep_unsent="no"),
        "offload must be True or False, got 'no'": lambda: make(offload="no"),
    }
    for message, call in cases.items():
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            call()
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(40, 40))]) for _ in range(2)]
    with pytest.raises(TypeError, match="scaler"):
        LocalUpdates(optimizers[0], scaler=5)  # type: ignore[arg-type]
    LocalUpdates(optimizers[1])
    with pytest.raises(RuntimeError, match="optimizer has LocalUpdates already"):
        LocalUpdates(optimizers)
    LocalUpdates(optimizers[0])  # which a constructor that has failed has not marked
    with pytest.warns(UserWarning, match="nothing will be compressed"):
        make([torch.nn.Parameter(torch.zeros(3))])


def test_workers_must_agree() -> None:
    def body(worker: int) -> None:
        x = torch.nn.Parameter(torch.zeros(40, 40))
        LocalUpdates(torch.optim.SGD([x], lr=1.0), every=3 + worker)

    with pytest.raises(ValueError, match="worker 0 has every=3 and worker 1 has every=4"):
        simulate(body, 2)

    def keeping(worker: int) -> None:
        x = torch.nn.Parameter(torch.zeros(40, 40))
        LocalUpdates(torch.optim.SGD([x], lr=1.0), keep_unsent=worker == 0)

    with pytest.raises(ValueError, match="worker 0 has keep_unsent=True and worker 1 has keep_unsent=False"):
        simulate(keeping, 2)


@pytest.mark.parametrize(
    ("workers", "options", "messages"),
    [
        (2, {}, 1),
        (4, {}, 1.5),
        (8, {}, 1.75),
        (4, {"compressor": Compression(Sign(), exchange="direct")}, 3),
        (4, {"workers": Workers(weight=2.0)}, 1.5),
        (4, {"workers": Workers(sample=0.9)}, 3),
    ],
    ids=["two", "four", "eight", "asked for", "weights", "sample"],
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


@pytest.mark.parametrize(("overlap", "at"), [((0, 1), 12), ((0, 2), 12), ((3, 2), 11), ((2, 1), 14)])
def test_a_repaired_drift_is_not_sent(overlap: tuple[int, int], at: int) -> None:
    """A wrong number that came with the mean is in worker 1's anchor and parameters; both become worker 0's."""

    def work(rank: int) -> list[float]:
        parameters = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
        optimizer, found = torch.optim.SGD(parameters, lr=0.1), []
        spec = Compression(Identity(), "direct", compare_every=1, on_drift="repair")
        local = LocalUpdates(optimizer, spec, every=4, overlap=Overlap(*overlap))
        rng = torch.Generator().manual_seed(rank)
        for t in range(1, 25):
            for p in parameters:
                p.grad = 1e-4 * torch.randn(64, 64, generator=rng)
            optimizer.step()
            if t == at and rank == 1:
                local._fragments[0].anchor.views[0][0, 0] += 64.0
                parameters[0].data[0, 0] += 64.0
            found.append(float(local.anchor()["parameter 0"][0, 0]))
        assert len(local.drifts) == 1
        return [*found[20:], float(parameters[0].detach()[0, 0])]

    for found in simulate(work, 3):
        assert max(map(abs, found)) < 1e-2


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
