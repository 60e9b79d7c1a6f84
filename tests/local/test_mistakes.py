"""Mistakes of a first script that are warned of, and when nothing is said. Errors are in test_refusals.py."""

import copy
import gc
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
    Identity,
    LocalUpdates,
    OuterSGD,
    load_checkpoint,
    save_checkpoint,
    simulate,
)
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.feedback.background import Background, Promise
from packsaddle.local.workers import Lockstep

Gloo = Callable[..., list[Any]]


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


@pytest.mark.parametrize("options", [{}, {"warn_own_state": False}], ids=["warns", "unless asked"])
def test_a_second_phase_forgets_the_anchor_of_the_first(options: dict[str, Any]) -> None:
    """The first `LocalUpdates` is in a cycle with its optimizer's hooks, so it lives until gc collects cycles."""

    def body(worker: int) -> None:
        model, first = stepped(worker, 4)
        first.flush()
        optimizer = SGD(model.parameters(), lr=0.1)
        second = LocalUpdates(optimizer, every=4, model=model, **options)
        model(torch.ones(8, 40) * worker).square().mean().backward()
        optimizer.step()
        second.flush()
        model.state_dict()
        assert len(model._state_dict_pre_hooks) == (0 if options else 1)

    simulate(body, 2)


def test_no_hook_is_left_in_the_model() -> None:
    def body(worker: int) -> int:
        model = stepped(worker, 4)[0]
        gc.collect()
        return len(model._state_dict_pre_hooks)

    assert simulate(body, 2) == [0, 0]


def checkpointed(folder: str) -> None:
    model, local = stepped(dist.get_rank(), 6)
    save_checkpoint(folder, {"model": model, "local": local}, step=6)
    load_checkpoint(folder, {"model": model, "local": local})


def test_checkpoints_read_own_states_in_silence(gloo: Gloo, tmp_path: Path) -> None:
    gloo(checkpointed, 2, str(tmp_path))


# ---- steps that are not counted


def trained_by(other: Optimizer, model: nn.Module, worker: int) -> None:
    for n in range(3):
        other.zero_grad()
        model(torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * n + worker))).square().mean().backward()
        other.step()


def test_an_optimizer_that_is_not_counted_raises_an_error() -> None:
    """As one that calls an inner optimizer without its own step() does."""

    def body(worker: int) -> None:
        model, _local = stepped(worker, 0)
        with pytest.raises(
            RuntimeError, match="AdamW steps on parameters that LocalUpdates exchanges, and no step of SGD"
        ):
            trained_by(AdamW(model.parameters()), model, worker)

    simulate(body, 2)


def test_a_model_that_is_converted_afterwards_raises_an_error() -> None:
    model = nn.Linear(40, 40)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    local = LocalUpdates(optimizer)
    model.to(torch.bfloat16)(torch.ones(2, 40, dtype=torch.bfloat16)).sum().backward()
    message = r"\[40, 40\] \(weight\) in group 0 of SGD was torch.float32 on cpu .* and is torch.bfloat16 on cpu now"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert local.steps == 0


def test_an_optimizer_that_is_not_counted_may_train_after_a_flush() -> None:
    def body(worker: int) -> None:
        model, local = stepped(worker, 6)
        with pytest.warns(UserWarning, match=r"or flush\(\) before another optimizer trains on") as found:
            trained_by(AdamW(model.parameters()), model, worker)
        assert [w.filename for w in found] == [__file__]
        local.flush()
        trained_by(AdamW(model.parameters()), model, worker)

    simulate(body, 2)


def test_a_flush_without_a_step_does_not_hide_that_workers_differ() -> None:
    def body(worker: int) -> None:
        model, local = stepped(worker, 0)
        assert local.flush()
        model.weight.data.add_(worker)
        with pytest.raises(RuntimeError, match=r"worker 1 differs from worker 0: LocalUpdates has counted no step"):
            local.flush()

    simulate(body, 2)


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
