"""States of local updates: what a state must fit, and loading one while an exchange runs.

Resumed runs, and those of another number of workers, are in tests/feedback/engine.
"""

import copy
import inspect
import threading
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from fronts import Training, differences, made
from local_updates import OUTERS, gradient
from torch import Tensor, nn

import packsaddle
from packsaddle import Compression, Identity, LocalUpdates, TopK, simulate
from packsaddle.feedback.state import FORMAT
from packsaddle.local.saved import FREE_ARGUMENTS

Gloo = Callable[..., list[Any]]


def trained(steps: int, **options: Any) -> Training:
    one = made("local", **options)
    for t in range(steps):
        one.step(t)
    return one


def two_groups(anchors: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": anchors[:1]}, {"params": anchors[1:]}], lr=1.0, momentum=0.9)


# Options of the run that is saved and of the one that loads; changes of the state; and what is said.
MISFITS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"every": 4}, {"every": 5}, {}, "every is 5 here, but the state was saved with every 4"),
    ({}, {"fragments": 2}, {}, "fragments is 2 here"),
    ({}, {"outer": OUTERS["nesterov"]}, {}, "outer is True here, but the state was saved with outer False"),
    ({}, {"keep_unsent": False}, {}, "keep_unsent is False here, but the state was saved with keep_unsent True"),
    ({}, {}, {"format": 1}, f"has format 1, .* reads format {FORMAT}: finish the run"),
    ({"outer": OUTERS["nesterov"]}, {"outer": OUTERS["adam"]}, {}, "outer must be the state of AdamW, found .* of SGD"),
    (
        {"outer": OUTERS["nesterov"]},
        {"outer": two_groups},
        {},
        r"outer must be the state of groups of \[\['0.weight'\]",
    ),
    ({"outer": OUTERS["adam"]}, {"outer": OUTERS["adam"]}, {"outer": {}}, "state of AdamW, found that of nothing"),
]


# Another value of each argument that identifies a run.
OTHERS: dict[str, Any] = {
    "optimizer": lambda ps: torch.optim.SGD(ps.values(), lr=0.1),
    "every": lambda step: 4 if step < 8 else 8,
    "outer": packsaddle.OuterSGD(),
    "overlap": 1,
    "overlap.delay": packsaddle.Overlap(1),
    "overlap.fragments": packsaddle.Overlap(0, fragments=2),
    "escape": packsaddle.Escape(3, 0.1, lambda: 0.0),
    "keep_unsent": False,
    "seed": 1,
}


ARGUMENTS = [
    *inspect.signature(LocalUpdates.__init__.__wrapped__).parameters,  # type: ignore[attr-defined]
    *(f"overlap.{field.name}" for field in fields(packsaddle.Overlap)),
]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_argument_is_in_the_identity_of_a_state_or_free(name: str) -> None:
    """So that no state replaces an argument in silence, nor a field of one that the schedule is made of."""
    if name == "self" or name in FREE_ARGUMENTS:
        return

    def made(**options: Any) -> LocalUpdates:
        parameters = {"w": nn.Parameter(torch.ones(6, 6)), "b": nn.Parameter(torch.ones(6))}
        optimizer = options.pop("optimizer", lambda ps: torch.optim.SGD(list(ps.items()), lr=0.1))(parameters)
        return LocalUpdates(
            optimizer, Compression(Identity(), dense_below=0), **{"every": 4, "mean_momentum": 0.0} | options
        )

    with pytest.raises(ValueError, match="but the state was saved with"):
        made(**{name.partition(".")[0]: OTHERS[name]}).load_state_dict(made().state_dict())


def test_a_state_for_other_workers_counts_what_its_weights_were_when_it_was_made() -> None:
    """The pending update and the start point stay, in the units of the current weight."""

    def body(worker: int) -> None:
        rng = torch.Generator().manual_seed(worker)
        p = nn.Parameter(torch.zeros(8, 8))
        optimizer = torch.optim.SGD([("p", p)], lr=0.1)
        local = LocalUpdates(
            optimizer,
            Compression(TopK(0.2), dense_below=0),
            every=4,
            mean_momentum=0.0,
            workers=packsaddle.Workers(weight="steps", steps=[6, 2]),
        )
        for _ in range((6, 2)[worker]):
            p.grad = torch.randn(8, 8, generator=rng)
            optimizer.step()
        state = local.state_dict()
        there = {**state, "share": (0.5, 1.5)[worker]}  # as if the paces were [2, 6] now
        (before,), (after,) = state["fragments"], local.for_resharding(there)["fragments"]
        made, now = (0.75, 0.25) if worker == 0 else (0.25, 0.75)
        torch.testing.assert_close(now * after["error"]["p"], made * before["error"]["p"])
        torch.testing.assert_close(after["shift"]["p"] - after["error"]["p"], -before["error"]["p"])
        assert local.for_resharding(state)["fragments"][0]["shift"] is None

    simulate(body, 2)


@pytest.mark.parametrize(("saved", "here", "changes", "message"), MISFITS)
def test_a_state_that_does_not_fit(
    saved: dict[str, Any], here: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """It changes nothing, a running exchange included."""
    state = trained(5, delay=2, **saved).engine.state_dict() | changes
    one = trained(4, delay=2, **here)
    before = copy.deepcopy(one.engine.state_dict())
    for call in (one.engine.check_state_dict, one.engine.load_state_dict):
        with pytest.raises(ValueError, match=message):
            call(state)
    assert differences(one.engine.state_dict(), before) == []


def test_what_is_no_state() -> None:
    one = made("local")
    with pytest.raises(ValueError, match=r"the state has no format; was it saved by LocalUpdates\?"):
        one.engine.load_state_dict({})
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(one.engine)


def test_a_state_with_other_names_of_parameters() -> None:
    model = nn.Linear(4, 4)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    numbered = LocalUpdates(optimizers[0], Identity())
    named = LocalUpdates(optimizers[1], Identity(), model=model)
    with pytest.raises(ValueError, match="parameters is by name here, but the state was saved with parameters by numb"):
        named.load_state_dict(numbered.state_dict())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_outer_state_is_loaded_by_name(order: tuple[int, int]) -> None:
    """Also if the optimizers are given in another order, so that torch's own state would be of other parameters."""

    def begun(order: tuple[int, int]) -> tuple[nn.Module, list[torch.optim.Optimizer], LocalUpdates]:
        net = nn.ParameterDict({name: torch.zeros(4, 4) for name in "ab"})
        pair: list[torch.optim.Optimizer] = [torch.optim.SGD([p], lr=0.1) for p in net.values()]
        spec = Compression(Identity(), dense_below=0)
        return net, pair, LocalUpdates([pair[i] for i in order], spec, every=2, outer=OUTERS["nesterov"], model=net)

    def train(net: nn.Module, pair: list[torch.optim.Optimizer], start: int, end: int, rank: int) -> None:
        for n in range(start, end):
            for (name, p), optimizer in zip(net.named_parameters(), pair, strict=True):
                p.grad = gradient(name, torch.zeros_like(p), rank, n) * (1 if name == "a" else -3)
                optimizer.step()

    def body(rank: int) -> None:
        net, pair, local = begun((0, 1))
        train(net, pair, 0, 6, rank)
        state, weights = local.state_dict(), copy.deepcopy(net.state_dict())
        for _ in range(2):  # nor does training change a state that was loaded
            other, its_pair, resumed = begun(order)
            other.load_state_dict(weights)
            resumed.load_state_dict(state)
            train(other, its_pair, 6, 10, rank)
        train(net, pair, 6, 10, rank)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)

    simulate(body, 2)


# ---- while an exchange runs in the background


def replace_exchange(local: LocalUpdates, by: Callable[..., Any]) -> Callable[[], None]:
    """Call `by` with the exchange of each later round and its arguments, until the returned function is called."""
    (part,) = local._fragments
    begin = part.feedback.round

    def replaced(t: int) -> Any:
        found = begin(t)
        found.exchange = partial(by, found.exchange)  # type: ignore[method-assign]
        return found

    part.feedback.round = replaced  # type: ignore[method-assign]
    return lambda: vars(part.feedback).pop("round")


def rolled_back() -> list[dict[str, Tensor]]:
    """Load an earlier state while an exchange runs in the background, and train on; beside a run that had none."""
    found, may_end = [], threading.Event()

    def waits(exchange: Callable[..., Any], *args: Any, **options: Any) -> Any:
        assert may_end.wait(30)
        return exchange(*args, **options)

    for runs in (True, False):
        one = trained(1, every=4, delay=3)
        saved = one.everything()
        if runs:
            replace_exchange(one.engine, waits)
            for t in range(1, 5):
                one.step(t)
            threading.Timer(0.2, may_end.set).start()
        one.load(saved)
        for t in range(1, 10):
            one.step(t)
        found.append({"pending": one.engine.pending(), "x": torch.cat([p.view(-1) for p in one.parameters()])})
    return found


def test_a_state_is_loaded_while_an_exchange_runs(gloo: Gloo) -> None:
    for one, other in gloo(rolled_back, 2):
        assert differences(one, other) == []


def loaded_after_a_failure() -> int:
    """An exchange fails in the background; then an earlier state is loaded, with which the next one does not."""
    one = made("local", every=4, delay=3)
    saved = copy.deepcopy(one.engine.state_dict())

    def fails(*args: Any, **options: Any) -> None:
        raise KeyError("of the exchange")

    restore = replace_exchange(one.engine, fails)
    for t in range(5):
        one.step(t)
    one.engine.load_state_dict(saved)
    restore()
    for t in range(9):
        one.step(t)
    return int(one.engine.rounds)


def test_a_state_is_loaded_after_a_failed_exchange(gloo: Gloo) -> None:
    assert gloo(loaded_after_a_failure, 2) == [1, 1]
