"""Mistakes of a first script: what is said, at construction where it can be, and when nothing is."""

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from packsaddle import (
    CompressedSGD,
    Identity,
    LocalUpdates,
    OuterSGD,
    Workers,
    load_checkpoint,
    register_ddp_hook,
    save_checkpoint,
    simulate,
)
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.feedback.background import Background, Promise
from packsaddle.local.lockstep import Lockstep

Gloo = Callable[..., list[Any]]


def message(call: Callable[[], object]) -> str:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


# ---- arguments


@pytest.mark.parametrize(("given", "meant"), [("compression", "compressor"), ("H", "every"), ("evry", "every")])
def test_names_of_other_libraries(given: str, meant: str) -> None:
    optimizer = SGD(nn.Linear(40, 40).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=f"LocalUpdates has no argument {given}, did you mean {meant}=?"):
        LocalUpdates(optimizer, **{given: 8})  # type: ignore[arg-type]
    LocalUpdates(optimizer, every=8)


def test_names_of_other_libraries_on_the_other_fronts() -> None:
    with pytest.raises(TypeError, match="CompressedSGD has no argument compression, did you mean compressor="):
        CompressedSGD([nn.Parameter(torch.zeros(2))], 0.1, compression=Identity())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="register_ddp_hook has no argument qqq; it has model, compressor, noise"):
        register_ddp_hook(None, qqq=1)  # type: ignore[call-arg, arg-type]


def test_objects_that_are_no_optimizers() -> None:
    optimizer = SGD(nn.Linear(40, 40).parameters(), lr=0.1)
    for given, found in (
        (torch.optim.lr_scheduler.StepLR(optimizer, 10), "StepLR"),
        (torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "ReduceLROnPlateau"),
    ):
        assert message(lambda given=given: LocalUpdates(given)) == f"optimizer must be a torch optimizer, got {found}"


@pytest.mark.parametrize("outer", [SGD, OuterSGD], ids=lambda c: c.__name__)
def test_a_class_as_the_outer_optimizer(outer: Any) -> None:
    """torch's SGD would be made with its own defaults, a rate of 0.001."""
    optimizer = SGD(nn.Linear(40, 40).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=f"outer must be OuterSGD.*, got the class {outer.__name__} itself"):
        LocalUpdates(optimizer, outer=outer)


OUTERS = {"AdamW": None, "AdamW, outer": OuterSGD(), "AdamW, rate": OuterSGD(momentum=0.0), "Muon, AdamW": None}


@pytest.mark.parametrize("inner", OUTERS)
def test_mean_momentum_where_the_guide_advises_against_it(inner: str) -> None:
    net = nn.Linear(40, 40)
    adamw: list[Optimizer] = [AdamW([net.bias])]
    optimizers = [Muon([net.weight]), *adamw] if "Muon" in inner else adamw
    expected = {"AdamW, outer": "outer=SGD with momentum", "Muon, AdamW": "Muon"}.get(inner)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        LocalUpdates(optimizers, every=2, outer=OUTERS[inner], mean_momentum=0.5)
    said = [w for w in found if "mean_momentum" in str(w.message)]
    assert [f"measurements with {expected}: set" in str(w.message) for w in said] == [True] * (expected is not None)
    assert all(w.filename == __file__ for w in said)


# ---- workers with other arguments

INNER: dict[str, tuple[Callable[[Sequence[nn.Parameter]], Optimizer], str]] = {
    "class": (lambda ps: SGD(ps, lr=0.1), "optimizer[0]='AdamW' and worker 1 has optimizer[0]='SGD'"),
    "rate": (
        lambda ps: AdamW(ps, lr=0.1),
        "optimizer[0].param_groups[0].lr=0.001 and worker 1 has optimizer[0].param_groups[0].lr=0.1",
    ),
    "groups": (
        lambda ps: AdamW([{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.0}], lr=1e-3),
        "and worker 1 has optimizer[0].param_groups[1].amsgrad=False",
    ),
    "implementation": (lambda ps: AdamW(ps, lr=torch.tensor(1e-3, dtype=torch.float64), foreach=False), ""),
}


@pytest.mark.parametrize("inner", INNER)
def test_other_inner_optimizers(inner: str) -> None:
    make, expected = INNER[inner]

    def body(worker: int, **options: Any) -> LocalUpdates:
        net = nn.Linear(40, 40)
        ps = list(net.parameters())
        return LocalUpdates(make(ps) if worker else AdamW(ps, lr=1e-3), **options)

    simulate(lambda worker: body(worker, workers=Workers(compare_optimizers=False)), 2)
    if not expected:
        simulate(body, 2)
        return
    for found in simulate(lambda worker: message(lambda: body(worker)), 2):
        assert expected in found
        assert "If they should differ, set workers=Workers(compare_optimizers=False) on all workers" in found


def test_unlike_periods_are_answered_with_what_to_do() -> None:
    def body(worker: int) -> str:
        optimizer = SGD(nn.Linear(40, 40).parameters(), lr=0.1)
        return message(lambda: LocalUpdates(optimizer, every=8 if worker else 24))

    for found in simulate(body, 2):
        assert "worker 0 has every=24 and worker 1 has every=8. For workers of different speeds, keep `every`" in found
        assert "Workers(weight=" in found


# ---- state_dict between rounds


def stepped(worker: int, steps: int, **options: Any) -> tuple[nn.Module, LocalUpdates]:
    model = nn.Linear(40, 40)
    optimizer = SGD(model.parameters(), lr=0.1)
    local = LocalUpdates(optimizer, **{"every": 4, "model": model, **options})
    for n in range(steps):
        rng = torch.Generator().manual_seed(10 * n + worker)
        optimizer.zero_grad()
        model(torch.randn(8, 40, generator=rng)).square().mean().backward()
        optimizer.step()
    return model, local


def test_a_models_own_state_is_warned_of_once() -> None:
    def body(worker: int) -> None:
        model, local = stepped(worker, 6)
        twin = copy.deepcopy(model)
        with pytest.warns(UserWarning, match=r"model.state_dict\(\) between rounds has this worker's own") as found:
            model.state_dict()
        assert [w.filename for w in found] == [__file__]
        model.state_dict()
        assert twin.state_dict().keys() == pickle.loads(pickle.dumps(model)).state_dict().keys()
        del local

    simulate(body, 2)


SILENT: dict[str, Callable[[nn.Module, LocalUpdates], object]] = {
    "at the anchor": lambda model, local: local.state_dict_of(model),
    "flushed": lambda model, local: (local.flush(), model.state_dict()),
    "before the first step": lambda model, local: model.state_dict(),
    "after a lossless round": lambda model, local: model.state_dict(),
    "another module": lambda model, local: nn.Linear(2, 2).state_dict(),
    "unless asked": lambda model, local: model.state_dict(),
}


@pytest.mark.parametrize("way", SILENT)
def test_states_of_one_model_are_silent(way: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "after a lossless round": {"compressor": Identity()},
        "unless asked": {"warn_own_state": False},
    }
    steps = {"before the first step": 0, "after a lossless round": 8}.get(way, 6)

    def body(worker: int) -> None:
        SILENT[way](*stepped(worker, steps, **options.get(way, {})))

    simulate(body, 2)


def checkpointed(folder: str) -> None:
    model, local = stepped(dist.get_rank(), 6)
    save_checkpoint(folder, {"model": model, "local": local}, step=6)
    load_checkpoint(folder, {"model": model, "local": local})


def test_checkpoints_read_own_states_in_silence(gloo: Gloo, tmp_path: Path) -> None:
    gloo(checkpointed, 2, str(tmp_path))


# ---- results in the background


def test_a_result_in_the_background_must_be_on_its_device() -> None:
    behind = Background(torch.device("cpu"))
    with pytest.raises(ValueError, match="results must be on cpu, and one is on meta"):
        behind.submit(lambda: None, [(behind.promise(), torch.zeros(1, device="meta"))])


def test_a_call_without_a_result_waits_on_the_device() -> None:
    """A Future of a tensor on another device has no event, so that waiting for it would wait for nothing."""
    devices = []

    class Recorder(Background):
        def submit(self, work: Callable[[], object], results: Sequence[tuple[Promise, torch.Tensor]]) -> None:
            devices.extend(result.device.type for _, result in results)

    meta = torch.device("meta")
    behind = Recorder(torch.device("cpu"))
    Lockstep(Communicator(resolve(None), Ledger()), meta, behind, norms=False, paced=False).start(
        "calls flush()", 1, lambda: None
    )
    assert devices == ["meta"]
