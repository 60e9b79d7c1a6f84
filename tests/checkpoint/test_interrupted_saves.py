"""Saves that end early, by SIGKILL or a full disk: all workers load one save, the old or the new, and never a mix."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import gloo as pool
import pytest
import torch
import torch.distributed as dist

import packsaddle
from packsaddle import CheckpointError, load_checkpoint, save_checkpoint
from packsaddle.comm.group import resolve
from packsaddle.comm.simulation import simulate
from packsaddle.integrations import WorkerState, load_state, save_state

KINDS = ("checkpoint", "state")
WORKERS = 2


def made(value: float) -> WorkerState:
    """A worker whose parameters all have one value."""
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return WorkerState(packsaddle.LocalUpdates(optimizer, packsaddle.Identity(), every=2), model)


def save(kind: str, folder: Path, value: float, each: bool = False) -> None:
    """Save step 8 in a folder for all workers, or in a folder for each."""
    worker, folder = made(value), folder / str(each * resolve(None).rank)
    with torch.no_grad():  # the anchor is the same on all workers, their parameters are not
        worker.parts["model"].bias.add_(resolve(None).rank)
    if kind == "state":
        save_state(worker, folder)
    else:
        save_checkpoint(folder, worker.parts, step=8)


def load(kind: str, folder: Path, each: bool = False) -> float | None:
    """Return the value that was saved, after a look at what is this worker's own."""
    worker, rank = made(-1.0), resolve(None).rank
    folder = folder / str(each * rank)
    found = load_state(worker, folder) if kind == "state" else load_checkpoint(folder, worker.parts)
    if not found:
        return None
    value: float = worker.parts["model"].weight[0, 0].item()
    assert worker.parts["model"].bias.tolist() == [value + rank] * 2
    return value


def loaded(*arguments: Any) -> Any:
    """The value that all workers load."""
    first, *others = simulate(lambda rank: load(*arguments), WORKERS)
    assert others == [first] * (WORKERS - 1)
    return first


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ---- SIGKILL


def killed_at(folder: Path, store: str, rank: int, at: int, kind: str, each: bool) -> None:
    """In a process: save the value 2. Before its change number `at` of a file or folder, worker 1 kills itself."""
    changes = count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        changing = writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if rank == 1 and changing and str(folder) in str(arguments[0]) and next(changes) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    sys.addaudithook(watch)
    save(kind, folder, 2.0, each)
    os._exit(0)


def second_save(folder: Path, at: int, kind: str, each: bool) -> int:
    """Save in processes that are all killed once worker 1 has killed itself. Returns worker 1's exit code."""
    store = str(folder.with_name(f"store-{at}"))
    workers = [
        pool._CONTEXT.Process(target=killed_at, args=(folder, store, rank, at, kind, each)) for rank in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    wait([workers[1].sentinel])
    workers[1].join()
    if workers[1].exitcode:
        workers[0].kill()
    workers[0].join()
    code = workers[1].exitcode
    assert code is not None
    return code


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:(the checkpoint of step 8|an earlier state)")
@pytest.mark.parametrize(("kind", "each"), [("checkpoint", True), ("state", False)])
def test_killed_in_the_second_save_of_a_step(kind: str, each: bool, tmp_path: Path) -> None:
    """Before each change of a file: the first save is whole until the second is, and the next removes all rests."""
    found = []
    for at in count(1):
        folder = tmp_path / str(at)
        simulate(lambda rank, to=folder: save(kind, to, 1.0, each), WORKERS)
        before = files(folder)
        code = second_save(folder, at, kind, each)
        found.append(loaded(kind, folder, each))
        simulate(lambda rank, to=folder: save(kind, to, 3.0, each), WORKERS)
        assert loaded(kind, folder, each) == 3.0
        assert len([name for name in files(folder) if "unusable" not in name]) == len(before) == 2 * WORKERS
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found == sorted(found)  # the old save, then the new one
    assert found.count(1.0) > 4
    assert found[-1] == 2.0


# ---- a full disk


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[Callable[[], int]]:
    """Worker 1 has no space from its step number `at` of writing on. Yields the number of its steps."""
    steps = 0

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal steps
            if resolve(None).rank == 1:
                steps += 1
                if steps >= at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "open"), (Path, "replace")):
            patch.setattr(owner, name, limited(getattr(owner, name)))
        yield lambda: steps


@pytest.mark.parametrize("each", [False, True], ids=["one folder", "a folder each"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_of_one_worker_changes_nothing(
    kind: str, each: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step of writing: all workers raise, and have the first save."""
    name = "packsaddle-2" if kind == "state" else "step-00000008-2"
    said = f"worker 1: checkpoint {tmp_path}/{int(each)}/{name} cannot be written: No space left on device"

    def refused(rank: int) -> str:
        with pytest.raises(CheckpointError) as caught:
            save(kind, tmp_path, 2.0, each)
        return str(caught.value)

    with full_disk(monkeypatch, 1_000) as steps:
        simulate(lambda rank: save(kind, tmp_path, 1.0, each), WORKERS)
        last = steps()
    assert last >= 8
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for at in range(1, last + 1):
        with full_disk(monkeypatch, at):
            assert simulate(refused, WORKERS) == [said] * WORKERS
        assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
        assert loaded(kind, tmp_path, each) == 1.0
    simulate(lambda rank: save(kind, tmp_path, 2.0, each), WORKERS)
    assert loaded(kind, tmp_path, each) == 2.0


# ---- files of two saves


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_two_saves_are_not_loaded(kind: str, tmp_path: Path) -> None:
    """As where one worker's disk is an old run's: the numbers of the saves are equal, their identities are not."""
    for value in (1.0, 2.0):
        simulate(lambda rank, value=value: save(kind, tmp_path / str(value), value), WORKERS)
    for path in (tmp_path / "2.0").rglob("worker-1.*"):
        shutil.copy(path, tmp_path / "1.0" / path.relative_to(tmp_path / "2.0"))

    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match="the files of worker 1 of 2 are of another save"):
            load(kind, tmp_path / "1.0")
        return "refused"

    assert simulate(refused, WORKERS) == ["refused"] * WORKERS
