"""What local updates refuse at construction, in the words that a user reads: one row for each mistake."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from elastic_fakes import FakeGroup, FakeManager
from specs import local_options
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from packsaddle import (
    CompressedSGD,
    Compression,
    Elastic,
    Escape,
    Identity,
    LocalUpdates,
    LowRank,
    OuterSGD,
    SketchTopK,
    TopK,
    register_ddp_hook,
    simulate,
)
from packsaddle.comm import Solo

X = nn.Parameter(torch.zeros(40, 40))
FROZEN = nn.Parameter(torch.zeros(3), requires_grad=False)
COMPLEX = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
ESCAPE = Escape(3, 1.0, lambda: 0.0)
COORDINATOR = Compression(TopK(0.1), exchange="coordinator")


class Asynchronous(FakeManager):
    _use_async_quorum = True


def made(*parameters: nn.Parameter, **options: Any) -> LocalUpdates:
    return LocalUpdates(SGD(parameters or [X], lr=1.0), **local_options(**options))


def elastic(settings: dict[str, Any] | None = None, **options: Any) -> LocalUpdates:
    manager = FakeManager(Solo())
    return made(workers=Elastic(manager, group=FakeGroup(manager), leave_on_sigterm=False, **settings or {}), **options)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))


def members(net: nn.Module) -> list[Optimizer]:
    """Return optimizers of the matrices and of the biases."""
    matrices, vectors = ([p for p in net.parameters() if (p.ndim == 2) is two] for two in (True, False))
    return [Muon(matrices), AdamW(vectors)]


def several(given: Callable[[list[Optimizer], nn.Sequential], Any], **options: Any) -> LocalUpdates:
    """Make local updates of what `given` makes of two optimizers and their network."""
    net = network()
    return LocalUpdates(given(members(net), net), **options)


def missing() -> LocalUpdates:
    net = network()
    return LocalUpdates(members(net)[0], model=net)


def none_of_the_model() -> LocalUpdates:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))
    return LocalUpdates(SGD(nn.Linear(2, 2).parameters()), model=net)


def two_arguments() -> LocalUpdates:
    muon, adamw = members(network())
    return LocalUpdates(muon, adamw)  # type: ignore[arg-type]


def later(compression: Compression) -> None:
    """Use a compression from the second round of an elastic worker on."""
    x, manager = nn.Parameter(torch.zeros(40, 40)), FakeManager(Solo())
    optimizer = SGD([x], lr=0.1)
    schedule = replace(compression, compressor=lambda t: compression.at(t) if t else Identity())
    workers = Elastic(manager, group=FakeGroup(manager), leave_on_sigterm=False)
    LocalUpdates(optimizer, schedule, every=1, workers=workers)
    for _ in range(2):
        x.grad = torch.ones(40, 40)
        optimizer.step()


REFUSED: dict[str, Callable[[], object]] = {
    # Names of other libraries.
    "LocalUpdates has no argument compression, did you mean compressor=": lambda: made_with(compression=8),
    "LocalUpdates has no argument H, did you mean every=": lambda: made_with(H=8),
    "LocalUpdates has no argument evry, did you mean every=": lambda: made_with(evry=8),
    "CompressedSGD has no argument compression, did you mean compressor=": partial(
        CompressedSGD, [X], 0.1, compression=Identity()
    ),
    "register_ddp_hook has no argument qqq; it has model, compressor, noise": partial(register_ddp_hook, None, qqq=1),
    # Intervals and overlap.
    "every must be an integer of at least 1, got 0": lambda: made(every=0),
    "every must be an integer of at least 1, got 2.5": lambda: made(every=2.5),
    "fragments must be an integer of at least 1": lambda: made(fragments=0),
    "overlap.fragments must be at most every = 3": lambda: made(every=3, fragments=4),
    "fragments must be at most the number of parameters, 1, got 2": lambda: made(fragments=2),
    "overlap.delay must be below every = 3": lambda: made(every=3, delay=3),
    "delay must be an integer of at least 0": lambda: made(delay=-1),
    # Compression, noise and the escape check.
    "decay must be in (0, 1] for local updates, got 0": lambda: made(decay=0),
    "decay must be in [0, 1], got nan": lambda: made(decay=float("nan")),
    "exchange must be one of direct, auto": lambda: made(exchange="median"),
    "compressor must be a packsaddle Compressor": lambda: made(compressor=0.1),
    "compressor must be made, as RandomK(0.01) or Sign() is, got the class TopK": lambda: made(compressor=TopK),
    "k of TopK must be at most": lambda: made(compressor=TopK(k=10**6)),
    "noise must be finite and not negative": lambda: made(noise=-1.0),
    "noise must be a number, or a function of the step that returns one, got 'a'": lambda: made(noise="a"),
    "escape must be an Escape or None, got 3": lambda: made(escape=3),
    "escape needs fragments=1, delay=0": lambda: made(delay=1, escape=ESCAPE),
    "keep_unsent must be True or False, got 'no'": lambda: made(keep_unsent="no"),
    "offload must be True or False, got 'no'": lambda: made(offload="no"),
    # Optimizers and parameters.
    "optimizer must be a torch optimizer, got Linear": lambda: LocalUpdates(nn.Linear(2, 2)),  # type: ignore[arg-type]
    "optimizer must be a torch optimizer, got StepLR": lambda: LocalUpdates(
        torch.optim.lr_scheduler.StepLR(SGD([X]), 10)  # type: ignore[arg-type]
    ),
    "must be given as a list: LocalUpdates([muon, adamw])": two_arguments,
    "or a list of them such as [muon, adamw], got a list_iterator": lambda: several(lambda pair, _: iter(pair)),
    "or a list of them such as [muon, adamw], got a dict": lambda: several(lambda pair, _: dict(enumerate(pair))),
    "list of them, and the list is empty": lambda: LocalUpdates([]),
    "torch optimizer, got Sequential": lambda: several(lambda pair, net: [pair[0], net]),
    "no parameter in common, but AdamW and SGD have one of [8]": lambda: several(
        lambda pair, net: [*pair, SGD([net[0].bias])]
    ),
    "no parameter in common, but AdamW and SGD have one of [8] (0.bias)": lambda: several(
        lambda pair, net: [*pair, SGD([("0.bias", net[0].bias)])]
    ),
    "but 0.bias, 1.bias would be trained by each worker alone: pass all optimizers, [muon, adamw] say": missing,
    "but 0.weight, 0.bias, 1.weight and 1 more would": none_of_the_model,
    "CompressedSGD exchanges by itself": lambda: LocalUpdates(CompressedSGD([X], 0.1)),
    "scaler must be a torch.amp.GradScaler": lambda: made(scaler=3),
    "model must be a torch Module or None, got 5": lambda: made(model=5),
    "parameters that require gradients, and has none": lambda: made(FROZEN),
    "but parameter 0 is torch.complex64": lambda: made(COMPLEX),
    "must not share memory": lambda: made(X, nn.Parameter(X.data)),
    "share memory, but parameter 0 and parameter 1": lambda: made(X, nn.Parameter(X.data.view(-1)[1599:])),
    # The outer step, and first moments.
    "outer must be a function that returns a torch optimizer, got list": lambda: made(outer=lambda a: list(a)),
    "that returns a torch optimizer, or None, got 5": lambda: made(outer=5),
    "or None, got an optimizer, SGD": lambda: made(outer=SGD([X], 0.7)),
    "got the class SGD itself": lambda: made(outer=SGD),  # which has a rate of its own, 0.001
    "got the class OuterSGD itself": lambda: made(outer=OuterSGD),
    "outer must return an optimizer of all tensors that it is given, and of no others": lambda: made(
        outer=lambda anchors: SGD([a.detach().clone() for a in anchors])
    ),
    "nesterov must be True, False or None, got 3": partial(OuterSGD, nesterov=3),
    "momentum must be in [0, 1), got 'a'": partial(OuterSGD, momentum="a"),
    "mean_momentum must be in [0, 1], got 1.5": lambda: made(mean_momentum=1.5),
    "mean_momentum must be in [0, 1], got nan": lambda: made(mean_momentum=float("nan")),
    "mean_momentum needs Adam's moments, state exp_avg and exp_avg_sq, and SGD has none": lambda: made(
        mean_momentum=0.5
    ),
    "exp_avg and exp_avg_sq, and Muon has none": lambda: LocalUpdates(Muon([X]), mean_momentum=0.5),
    "exp_avg and exp_avg_sq, and Adafactor has none": lambda: LocalUpdates(
        torch.optim.Adafactor([X]), mean_momentum=0.5
    ),
    # A fixed set of workers.
    "workers must be a process group, a DeviceMesh, Workers or Elastic, got 4": lambda: made(workers=4),
    'weight must be finite and above 0, "steps" or None, got 0.0': lambda: made(weight=0.0),
    'weight must be finite and above 0, "steps" or None, got nan': lambda: made(weight=float("nan")),
    'weight must be finite and above 0, "steps" or None, got True': lambda: made(weight=True),
    'exchange must not be "senders" with weight': lambda: made(weight=2.0, exchange="senders"),
    "escape must be None with weight: its": lambda: made(weight=2.0, escape=ESCAPE),
    "must average messages directly or two-way with a manager": lambda: later(COORDINATOR),
    "not what SharedSupportAllReduce needs": lambda: later(Compression(SketchTopK(0.1))),
    'steps must be numbers by rank with weight="steps", else None, got [8, 3]': lambda: made(steps=[8, 3]),
    'steps must be numbers by rank with weight="steps", else None, got 8': lambda: made(weight="steps", steps=8),
    "steps[1] must be an integer of at least 1, got 0": lambda: made(weight="steps", steps=[8, 0]),
    "steps must have a number for each of the 1 workers, got 2 numbers": lambda: made(weight="steps", steps=[8, 3]),
    "clip must be finite and at least 1, or None, got 0.5": lambda: made(clip=0.5),
    "clip must be finite and at least 1, or None, got inf": lambda: made(clip=float("inf")),
    "clip must be finite and at least 1, or None, got nan": lambda: made(clip=float("nan")),
    "clip must be finite and at least 1, or None, got True": lambda: made(clip=True),
    "clip must be finite and at least 1, or None, got '2'": lambda: made(clip="2"),
    # Workers that come and go.
    "clip must be finite and at least 1, or None, got 0.7": lambda: elastic({"clip": 0.7}),
    "manager must be a torchft Manager, got int": lambda: Elastic(3),
    "use_async_quorum=False": lambda: Elastic(Asynchronous(Solo())),
    "delay must be 0 with a manager": lambda: elastic(delay=1),
    'exchange must not be "senders" with a manager': lambda: elastic(exchange="senders"),
    "escape must be None with a manager": lambda: elastic(escape=ESCAPE),
    "not what LowRankAllReduce needs": lambda: elastic(compressor=Compression(LowRank(1))),
    "not what Coordinator needs": lambda: elastic(compressor=COORDINATOR),
    'weight must be None, "steps" or a function': lambda: elastic({"weight": "tokens"}),
    "patience must be above 0 seconds": lambda: elastic({"patience": 0}),
    "grace must be above 0 seconds": lambda: elastic({"grace": -1}),
    "patience must be above 0 seconds, got '-1ms'": lambda: elastic({"patience": "-1ms"}),
    "grace must be seconds such as 30, 55ms or 2min, got '5m'": lambda: elastic({"grace": "5m"}),
}


def made_with(**arguments: Any) -> LocalUpdates:
    return LocalUpdates(SGD([X]), **arguments)


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        REFUSED[message]()


def test_an_optimizer_has_one_local_updates() -> None:
    first, second = (SGD([nn.Parameter(torch.zeros(40, 40))]) for _ in range(2))
    with pytest.raises(TypeError, match="scaler"):
        LocalUpdates(first, scaler=5)  # type: ignore[arg-type]
    LocalUpdates(second)
    with pytest.raises(RuntimeError, match=r"optimizer already has LocalUpdates.* make a new SGD"):
        LocalUpdates([first, second])
    LocalUpdates(first)  # which constructors that have failed have not marked


def test_a_model_of_vectors_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="nothing will be compressed"):
        made(nn.Parameter(torch.zeros(3)))


# ---- workers with other arguments

Make = Callable[[Sequence[nn.Parameter]], Optimizer]
ALLOWED = "If they should differ, set workers=Workers(compare_optimizers=False) on all workers"


def of_rate(ps: Sequence[nn.Parameter]) -> Optimizer:
    return AdamW(ps, lr=0.1)


def of_groups(ps: Sequence[nn.Parameter]) -> Optimizer:
    return AdamW([{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.0}], lr=1e-3)


def of_another_implementation(ps: Sequence[nn.Parameter]) -> Optimizer:
    return AdamW(ps, lr=torch.tensor(1e-3, dtype=torch.float64), foreach=False)


# Arguments of worker 0 and of worker 1, and what all workers raise.
UNLIKE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"every": 24},
        {"every": 8},
        "worker 0 has every=24 and worker 1 has every=8. For workers of different speeds, keep `every` equal and set",
    ),
    ({}, {"keep_unsent": False}, "worker 0 has keep_unsent=True and worker 1 has keep_unsent=False"),
    ({}, {"weight": 2.0}, "worker 0 has weight=False and worker 1 has weight=True"),
    ({"weight": "steps"}, {"weight": 2.0}, "worker 0 has weight='steps' and worker 1 has weight=True"),
    (
        {"weight": "steps", "steps": [3, 1]},
        {"weight": "steps", "steps": [3, 2]},
        "worker 0 has workers.steps=(3, 1) and worker 1 has workers.steps=(3, 2)",
    ),
    ({}, {"frozen": 4}, "worker 0 has untrained[0]='parameter 2 [3] torch.float32' and worker 1 has"),
    ({}, {"inner": SGD}, "worker 0 has optimizer[0]='AdamW' and worker 1 has optimizer[0]='SGD'"),
    ({}, {"inner": of_rate}, "has optimizer[0].param_groups[0].lr=0.001 and worker 1 has optimizer[0].param_groups[0]"),
    ({}, {"inner": of_groups}, "and worker 1 has optimizer[0].param_groups[1].amsgrad=False"),
    ({}, {"inner": of_another_implementation}, ""),
]


@pytest.mark.parametrize(("first", "second", "message"), UNLIKE)
def test_workers_must_agree(first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    def body(worker: int, **more: Any) -> str:
        given = {"inner": AdamW, "frozen": 3, "mean_momentum": 0.0} | (second if worker else first) | more
        make, frozen = given.pop("inner"), nn.Parameter(torch.zeros(given.pop("frozen")), requires_grad=False)
        try:
            LocalUpdates(make([*nn.Linear(40, 40).parameters(), frozen]), **local_options(**given))
        except ValueError as error:
            return str(error)
        return ""

    for found in simulate(body, 2):
        assert message in found
        assert bool(found) == bool(message)
        assert (ALLOWED in found) == ("optimizer[0]" in found)
    if "inner" in second:
        assert simulate(lambda worker: body(worker, compare_optimizers=False), 2) == ["", ""]
