"""The warning about local updates that end without flush: once, on rank 0, and with no false alarm."""

import gc
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_python import environment, python
from nightly import nightly

from packsaddle import LocalUpdates, simulate
from packsaddle.comm import resolve

Gloo = Callable[..., list[Any]]
STEPS = 10


def trained(steps: int = STEPS) -> tuple[torch.nn.Module, LocalUpdates]:
    rank = resolve(None).rank
    model = torch.nn.Linear(40, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = LocalUpdates(optimizer, every=4)
    rng = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 40, generator=rng)).square().mean().backward()
        optimizer.step()
    return model, local


def agree(local: LocalUpdates, model: torch.nn.Module) -> None:
    with local.at_anchor():
        model(torch.ones(40))


WAYS: dict[str, Callable[[torch.nn.Module, LocalUpdates], object]] = {
    "flush": lambda model, local: local.flush(),
    "state_dict": lambda model, local: local.state_dict(),
    "state_dict_of": lambda model, local: local.state_dict_of(model),
    "at_anchor": lambda model, local: agree(local, model),
    "anchor": lambda model, local: local.anchor(),
    "load_state_dict": lambda model, local: local.load_state_dict(local.state_dict()),
    "nothing": lambda model, local: None,
    "error": lambda model, local: local.error(),  # a number, which changes nothing
}


def heard(make: Callable[[], object]) -> list[str]:
    """Return what is logged by the end of the objects that `make` makes."""
    said, handler = list[str](), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("packsaddle").addHandler(handler)
    make()
    gc.collect()
    logging.getLogger("packsaddle").removeHandler(handler)
    return said


def while_failing() -> None:
    """The LocalUpdates ends while an error is handled."""
    try:
        trained()
        raise KeyError
    except KeyError:
        gc.collect()


def all_ways() -> dict[str, list[str]]:
    found = {name: heard(lambda way=way: way(*trained())) for name, way in WAYS.items()}  # type: ignore[misc]
    return found | {"no step": heard(lambda: trained(0)), "while failing": heard(while_failing)}


def test_each_way_to_end(gloo: Gloo) -> None:
    """Garbage collection of one whose changes were not used, on rank 0 only."""
    found, others = gloo(all_ways, 2)
    expected = (
        "LocalUpdates ended without flush() after 10 steps, 2 of them since its last round, so the workers' models"
    )
    for name, said in found.items():
        assert [line[: len(expected)] for line in said] == [expected] * (name in ("nothing", "error")), name
    assert not any(others.values())


def test_one_worker_and_a_simulation_are_silent() -> None:
    assert heard(trained) == []
    assert heard(lambda: simulate(lambda worker: trained()[1].steps, 2)) == []


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from packsaddle import LocalUpdates

rank, how = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = torch.nn.Linear(40, 50)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
local = LocalUpdates(optimizer, every=4)
rng = torch.Generator().manual_seed(rank)
for _ in range(10):
    optimizer.zero_grad()
    model(torch.randn(8, 40, generator=rng)).square().mean().backward()
    optimizer.step()
if how == "raise":
    raise KeyError("of the script")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["exit", nightly("raise")])
def test_interpreter_exit(how: str, tmp_path: Path) -> None:
    """One line, after the process group was destroyed; an exception of the script stays the last line."""
    workers = [
        subprocess.Popen(
            [interpreter, "-c", SCRIPT, str(rank), str(tmp_path / "store"), how],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank, interpreter in enumerate((sys.executable, python()))
    ]
    said = [worker.communicate(timeout=100)[1] for worker in workers]
    assert said[0].count("without flush()") == (how == "exit")
    assert "without flush()" not in said[1]
    if how == "raise":
        assert said[0].strip().endswith("KeyError: 'of the script'")
