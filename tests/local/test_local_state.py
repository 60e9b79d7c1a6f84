"""State of local updates: resumed bit for bit, also with an exchange under way; carried to other numbers of workers."""

import copy
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fronts import differences
from local_updates import INNERS, OUTERS, begin, flat, gradient
from specs import local_options
from torch import Tensor, nn

import packsaddle
from packsaddle import (
    QSGD,
    CheckpointError,
    Compression,
    Escape,
    Identity,
    LocalUpdates,
    LowRank,
    RandomK,
    TopK,
    simulate,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"every": 4, "compressor": Compression(TopK(0.2), dense_below=1, compare_every=2)},
    "outer": {"every": 4, "outer": OUTERS["nesterov"], "noise": 0.01, "decay": 0.9},
    "fragments": {"every": 4, "fragments": 3, "delay": 3},
    "under way, outer": {"every": 5, "fragments": 2, "delay": 4, "outer": OUTERS["adam"]},
    "blend": {"every": 4, "delay": 2, "blend": 0.5},
    "two-way": {"every": 3, "compressor": Compression(TopK(0.2), exchange="two-way", dense_below=1), "delay": 2},
    "low rank": {"every": 3, "compressor": Compression(LowRank(1), dense_below=1)},
    "random": {"every": 2, "compressor": Compression(RandomK(0.2, values="int2"), dense_below=1), "delay": 1},
    "private": {"every": 2, "compressor": Compression(QSGD(), dense_below=1), "offload": True},
    "from the anchor": {"every": 4, "fragments": 2, "delay": 3, "keep_unsent": False},
    "senders": {"every": 3, "exchange": "senders", "delay": 1},
}


class Net(nn.Module):
    """The parameters of the toy problem."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in begin().items():
            self.register_parameter(name, nn.Parameter(value))


class Training:
    """One worker's."""

    def __init__(self, rank: int, options: dict[str, Any]) -> None:
        self.rank, self.net = rank, Net()
        self.optimizer = INNERS["adamw"](list(self.net.parameters()))
        options = {"compressor": Compression(TopK(0.2), dense_below=1), **options}
        if options.pop("escapes", False):
            options["escape"] = Escape(3, 0.5, lambda: float(flat(dict(self.net.named_parameters())).square().sum()))
        self.local = LocalUpdates(self.optimizer, seed=3, **local_options(**options))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 30)
        self.parts = {
            "model": self.net,
            "optimizer": self.optimizer,
            "local": self.local,
            "schedule": self.schedule,
        }

    def train(self, first: int, last: int) -> None:
        for n in range(first, last):
            for name, p in self.net.named_parameters():
                p.grad = gradient(name, p.detach(), self.rank, n)
            self.optimizer.step()
            self.schedule.step()

    def everything(self) -> dict[str, Tensor]:
        """All that a later step depends on."""
        state = self.local.state_dict()
        moments = self.optimizer.state_dict()["state"]
        found = {f"adam {i} {k}": v for i, s in moments.items() for k, v in s.items()}
        found |= {f"x {name}": p.detach() for name, p in self.net.named_parameters()}
        for i, part in enumerate(state["fragments"]):
            found |= {f"{i} {kind} {name}": v for kind in ("anchor", "error") for name, v in part[kind].items()}
            for kind in ("start", "mean"):
                found |= {f"{i} {kind} {name}": v for name, v in (part["exchange"] or {}).get(kind, {}).items()}
        moved = [b.sent for _, b in sorted(self.local.ledger.by_purpose.items())]
        return {name: value.clone() for name, value in found.items()} | {"bytes": torch.tensor(moved)}


def sums(rank: int, folder: str, options: dict[str, Any], at: int | None) -> dict[str, Tensor]:
    """The means over workers of x and e, the anchor, and means under way."""
    one = Training(rank, options)
    if at is None:
        assert packsaddle.load_checkpoint(folder, one.parts) is not None
    else:
        one.train(0, at)
        packsaddle.save_checkpoint(folder, one.parts, step=at)
    group = packsaddle.comm.group.resolve(None)
    found = {}
    for key, value in one.everything().items():
        if key == "bytes":
            continue
        if key.split()[1] in ("error", "start") or key.startswith(("x ", "adam")):
            total = value.double()
            group.all_reduce(total)
            found[key] = total / group.size
        else:
            found[key] = value
    return found


@pytest.mark.filterwarnings("ignore:the checkpoint of step")
@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("name", ["plain", "outer", "fragments", "two-way"])
def test_another_number_of_workers(name: str, old: int, new: int, tmp_path: Path) -> None:
    """Anchor and outer state are kept; of x, e and the inner optimizer's state each new worker has the mean."""
    options = VARIANTS[name]
    before = simulate(lambda rank: sums(rank, str(tmp_path), dict(options), 6), old)[0]
    after = simulate(lambda rank: sums(rank, str(tmp_path), dict(options), None), new)
    for found in after:
        assert found.keys() == before.keys()
        for key, value in before.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=key, check_dtype=False)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("new", [1, 2])
def test_y_stays_for_another_number_of_workers(new: int, delay: int, keep: bool, tmp_path: Path) -> None:
    """Also of owners, as others own their coordinates then; with a delay, during an exchange."""
    kind = Compression(TopK(0.2), exchange="two-way", dense_below=1)
    options = {"every": 4, "compressor": kind, "delay": delay, "keep_unsent": keep}

    def y(rank: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        one = Training(rank, options)
        if steps:
            one.train(0, steps)
            packsaddle.save_checkpoint(tmp_path, one.parts, step=steps)
        else:
            assert packsaddle.load_checkpoint(tmp_path, one.parts) is not None
        error = one.local.error()
        found = nn.utils.parameters_to_vector(one.local.anchor().values()) - error
        assert one.local.flush(Identity())
        return error, found, nn.utils.parameters_to_vector(one.net.parameters()).detach()

    (error, before, _), *_ = simulate(lambda rank: y(rank, 10), 3)  # an exchange began after step 8
    with pytest.warns(UserWarning, match="saved by 3 workers"):
        after = simulate(lambda rank: y(rank, 0), new)
    for found_error, found, x in after:
        torch.testing.assert_close(found_error, error, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, before, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x, before, rtol=1e-12, atol=1e-12)


def test_a_state_that_does_not_fit() -> None:
    one = Training(0, {"every": 4})
    one.train(0, 5)
    state = one.local.state_dict()
    cases: list[tuple[Callable[[], LocalUpdates], dict[str, Any], str]] = [
        (lambda: Training(0, {"every": 5}).local, state, "every is 5 here, but the state was saved with every 4"),
        (lambda: Training(0, {"every": 4, "fragments": 2}).local, state, "fragments is 2 here"),
        (
            lambda: Training(0, {"every": 4, "outer": OUTERS["nesterov"]}).local,
            state,
            "outer is True here, but the state was saved with outer False",
        ),
        (
            lambda: one.local,
            {**state, "format": 1},
            "has format 1, .* reads format 6: finish the run",
        ),
        (lambda: one.local, {}, r"the state has no format; was it saved by LocalUpdates\?"),
    ]
    for make, given, message in cases:
        local = make()
        with pytest.raises(ValueError, match=message):
            local.load_state_dict(given)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        __import__("copy").deepcopy(one.local)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_outer_state_is_loaded_by_name(order: tuple[int, int]) -> None:
    """Also if the optimizers are given in another order, so that torch's own state would be of other parameters."""

    def made(order: tuple[int, int]) -> tuple[nn.Module, list[torch.optim.Optimizer], LocalUpdates]:
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
        net, pair, local = made((0, 1))
        train(net, pair, 0, 6, rank)
        state, weights = local.state_dict(), copy.deepcopy(net.state_dict())
        for _ in range(2):  # nor does training change a state that was loaded
            other, its_pair, resumed = made(order)
            other.load_state_dict(weights)
            resumed.load_state_dict(state)
            train(other, its_pair, 6, 10, rank)
        train(net, pair, 6, 10, rank)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)

    simulate(body, 2)


def test_an_outer_state_that_does_not_fit() -> None:
    """Nothing changes, an exchange under way included."""

    def two_groups(anchors: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": anchors[:1]}, {"params": anchors[1:]}], lr=1.0, momentum=0.9)

    options: dict[str, Any] = {"every": 4, "delay": 2}
    state = Training(0, {**options, "outer": OUTERS["nesterov"]}).local.state_dict()
    others = {
        "outer must be the state of AdamW, found that of SGD": OUTERS["adam"],
        r"outer must be the state of groups of \[\['parameter 0'\], ": two_groups,
    }
    for message, outer in others.items():
        training = Training(0, {**options, "outer": outer})
        training.train(0, 5)
        before = copy.deepcopy(training.local.state_dict())
        for call in (training.local.check_state_dict, training.local.load_state_dict):
            with pytest.raises(ValueError, match=message):
                call(state)
        assert differences(training.local.state_dict(), before) == []
    training = Training(0, {**options, "outer": OUTERS["adam"]})
    with pytest.raises(ValueError, match="outer must be the state of AdamW, found that of nothing"):
        training.local.check_state_dict({**training.local.state_dict(), "outer": {}})


def test_refused_by_load_checkpoint(tmp_path: Path) -> None:
    one = Training(0, {"every": 4})
    one.train(0, 5)
    packsaddle.save_checkpoint(tmp_path, one.parts, step=5)
    with pytest.raises(CheckpointError, match="local: every is 3 here"):
        packsaddle.load_checkpoint(tmp_path, Training(0, {"every": 3}).parts)


def test_what_x_begins_at_is_part_of_a_state() -> None:
    """With keep_unsent x has its error in it, and without it has not: e would count twice."""
    one, other = Training(0, {"every": 2}), Training(0, {"every": 2, "keep_unsent": False})
    one.train(0, 3)
    with pytest.raises(ValueError, match="keep_unsent is False here, but the state was saved with keep_unsent True"):
        other.local.load_state_dict(one.local.state_dict())


def slow_exchange(local: LocalUpdates) -> threading.Event:
    """Have the next exchange wait for the event that is returned."""
    may_end = threading.Event()

    def waits(exchange: Callable[..., Any], *args: Any, **options: Any) -> Any:
        assert may_end.wait(30)
        return exchange(*args, **options)

    replace_exchange(local, waits)
    return may_end


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


def rolled_back() -> tuple[Tensor, Tensor]:
    """Load an earlier state while an exchange runs in the background, and train on; beside a run that had none."""
    rank, found = torch.distributed.get_rank(), []
    for runs in (True, False):
        one = Training(rank, {"every": 4, "delay": 3})
        one.train(0, 1)
        saved = {name: copy.deepcopy(part.state_dict()) for name, part in one.parts.items()}
        if runs:
            may_end = slow_exchange(one.local)
            one.train(1, 5)
            threading.Timer(0.2, may_end.set).start()
        for name, part in one.parts.items():
            part.load_state_dict(saved[name])
        one.train(1, 10)
        found.append(torch.cat([one.local.pending(), flat(dict(one.net.named_parameters()))]))
    return found[0], found[1]


def test_a_state_is_loaded_while_an_exchange_runs(gloo: Callable[..., list[Any]]) -> None:
    for one, other in gloo(rolled_back, 2):
        assert torch.equal(one, other)


def loaded_after_a_failure() -> str:
    """An exchange fails in the background; then an earlier state is loaded."""
    one = Training(torch.distributed.get_rank(), {"every": 4, "delay": 3})
    saved = copy.deepcopy(one.local.state_dict())

    def fails(*args: Any, **options: Any) -> None:
        raise KeyError("of the exchange")

    restore = replace_exchange(one.local, fails)
    one.train(0, 5)
    one.local.load_state_dict(saved)
    restore()
    one.train(0, 9)
    return f"{one.local.rounds} round"


def test_a_state_is_loaded_after_a_failed_exchange(gloo: Callable[..., list[Any]]) -> None:
    assert gloo(loaded_after_a_failure, 2) == ["1 round"] * 2


def test_a_state_with_other_names_of_parameters() -> None:
    model = nn.Linear(4, 4)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    numbered = LocalUpdates(optimizers[0], Identity())
    named = LocalUpdates(optimizers[1], Identity(), model=model)
    with pytest.raises(ValueError, match="parameters is by name here, but the state was saved with parameters by numb"):
        named.load_state_dict(numbered.state_dict())
