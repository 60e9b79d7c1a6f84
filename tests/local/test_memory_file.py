"""Error memories on disk, of workers that come and go: a worker that returns sends what it had, once."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import Clock
from elastic_fakes import Worker, check_nothing_is_lost, joined, membership, of_state

from packsaddle import simulate
from packsaddle.errors import ConfigError
from packsaddle.local.elastic.memory_file import MemoryFile, OwnFile
from packsaddle.local.elastic.roster import Roster


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.pt"


def gone(path: Path) -> tuple[Worker, Any]:
    """Return a worker that has left its memory in a file, and the state that others have then."""
    worker = joined(settings={"memory_file": path})
    worker.train(7)
    worker.local.leave()
    return worker, worker.manager.save()


def shapes(worker: Worker) -> dict[str, torch.Size]:
    return {name: a.shape for name, a in worker.local.anchor().items()}


def balance(worker: Worker) -> tuple[float, float]:
    """Return the norms that a worker counts as waiting and as lost."""
    return membership(worker).waiting, worker.local.lost


@contextmanager
def full() -> Iterator[None]:
    """Within, no file of this process can grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_memory_is_sent_by_a_flush_without_steps(scaled: bool, path: Path) -> None:
    """A worker that returns at the end of training: all that it has is in its file. Steps that a scaler skips, at too
    large a scale, join too; the step count is that of the others."""
    left, state = gone(path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0) if scaled else None
    back = of_state(lambda: state, joins=False, every=2, scaler=scaler, settings={"memory_file": path})
    for _ in range(2 if scaler else 0):
        back.gradients()
        scaler.scale(torch.ones(()))
        back.parameters[0].grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(back.optimizer)
        scaler.update()
    assert back.local.flush()
    assert back.local.steps == left.local.steps + (2 if scaled else 0)
    torch.testing.assert_close(back.anchor(), left.anchor() - left.local.pending(), rtol=1e-12, atol=1e-12)
    assert not back.local.pending().any()


def test_a_memory_waits_in_its_file(path: Path) -> None:
    """And goes on in another process: what it had moved since the last round is in it."""
    left, state = gone(path)
    assert path.stat().st_size < 4000  # the vector, of 240 bytes, once
    pending, before = left.local.pending(), MemoryFile.read(path, shapes(left)).attempt
    back = of_state(lambda: state, settings={"memory_file": path})
    assert torch.equal(back.local.pending(), pending)
    assert membership(back).worker == membership(left).worker
    torch.testing.assert_close(back.x(), back.anchor() - pending, rtol=1e-12, atol=1e-12)
    back.train(3)  # after which the file is that of the new round
    assert MemoryFile.read(path, shapes(back)).next_attempt > before
    back.local.leave()
    again = of_state(back.manager.save, settings={"memory_file": path})
    assert torch.equal(again.local.pending(), back.local.pending())


@pytest.mark.parametrize("later", [0, 1, 4])
@pytest.mark.parametrize("alone", [True, False])
def test_a_worker_from_a_checkpoint_has_its_file_too(alone: bool, later: int, path: Path) -> None:
    """If all workers restart, the memory is the checkpoint's. If others have gone on with the worker since, the memory
    is the file's. Either is sent once."""
    killed = joined(settings={"memory_file": path})
    killed.train(8)
    saved, x, moved = killed.local.state_dict(), killed.x(), killed.moved.clone()
    killed.train(later)  # the next round is after one step
    others = killed.manager.save()
    membership(killed)._pending.end()
    back = Worker(settings={"memory_file": path})
    for p, old in zip(back.parameters, x.split([24, 6]), strict=True):
        p.data.copy_(old.view(p.shape))
    back.local.load_state_dict(saved)
    if not alone:
        back.manager.before_quorum = lambda: back.manager.load(others)
    back.local.join()
    back.manager.before_quorum = lambda: None
    assert membership(back).worker == membership(killed).worker
    # With the others, the steps since the last round of the killed worker, the ninth or twelfth, are lost.
    sent = moved if alone or not later else killed.moved
    back.train(2)
    back.local.flush()
    assert not back.local.pending().any()
    torch.testing.assert_close(back.anchor(), Worker().x() - sent - back.moved, rtol=1e-12, atol=1e-12)


class KilledError(BaseException):
    """Stands for a SIGKILL."""


@pytest.mark.parametrize("committed", [True, False])
def test_a_worker_that_is_killed_within_a_round_loses_no_memory(committed: bool, path: Path) -> None:
    """Its file has what it will have if others commit the round, and if they do not."""

    def kill() -> bool:
        raise KilledError

    killed, twin = (Worker(settings={"memory_file": file}) for file in (path, path.with_name("twin.pt")))
    membership(twin).worker = membership(killed).worker
    for worker in (killed, twin):
        worker.local.join()
        worker.train(5)
    killed.manager.should_commit = kill  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        killed.train(1)
    file = membership(killed)._pending.file
    assert file is not None
    file.close()
    state = twin.manager.save()
    twin.train(1)
    back = of_state(twin.manager.save if committed else lambda: state, settings={"memory_file": path})
    assert back.local.lost == 0
    if committed:
        assert torch.equal(back.local.pending(), twin.local.pending())
    else:
        sent = Worker().x() - back.anchor()
        torch.testing.assert_close(back.local.pending(), killed.moved - sent, rtol=1e-12, atol=1e-12)


UNUSABLE = {
    "sent": "older than what its worker has sent since",
    "run": "of another run",
    "damaged": "cannot be read",
    "format": "has format 1",
    "shapes": "is of other parameters",
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_a_memory_that_cannot_be_used_is_set_aside(why: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left, state = gone(path)
    if why == "sent":
        state["roster"]["included"][membership(left).worker] += 1
    elif why == "run":
        state["roster"]["run"] += 1
    elif why == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    else:
        found = torch.load(path, weights_only=True)
        torch.save(found | ({"format": 1} if why == "format" else {"error": {"w": torch.ones(1)}}), path)
    other = path.with_name("memory.pt.unusable")
    other.write_bytes(b"set aside earlier")
    content = path.read_bytes()
    back = of_state(lambda: state, settings={"memory_file": path})
    assert not back.local.pending().any()
    assert UNUSABLE[why] in caplog.text
    assert other.read_bytes() == b"set aside earlier"
    assert path.with_name("memory.pt.unusable-2").read_bytes() == content
    assert MemoryFile.read(path, shapes(back)).norm == 0  # its own, from now on
    back.train(3)
    assert (back.local.lost > 0) == (why == "sent")


@pytest.mark.parametrize("keeps", [False, True])
def test_what_is_lost_is_counted_and_said(keeps: bool, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a worker that is in no round any more; with a file it counts as waiting."""
    left = joined(settings={"memory_file": path if keeps else None})
    left.train(6)
    stays = Worker()
    stays.manager.load(left.manager.save())
    assert stays.local.lost == 0.0
    stays.local.join()
    norm = float(left.local.pending().norm())
    assert norm > 0
    assert sorted(balance(stays)) == [0.0, pytest.approx(norm)]
    assert (membership(stays).waiting > 0) == keeps
    assert ("waits in its file" if keeps else "is lost") in caplog.text


@pytest.mark.parametrize("since", [0, 2])
def test_a_memory_that_cannot_be_written_goes_with_a_last_round(since: int, path: Path) -> None:
    """Also where the file is of the last round: it is outdated then, and removed."""

    def run(rank: int) -> Worker:
        worker = joined(settings={"memory_file": path if rank else None})
        worker.train(3 + since)
        if rank:
            with full():
                assert worker.local.leave()
        else:
            worker.train(3 - since)
        return worker

    first, second = simulate(run, 2)
    check_nothing_is_lost([first, second], pending=False)
    norms = sum(member.norm for member in membership(first).roster.members.values())
    assert norms == 0  # so nothing is said to wait, or to be lost
    assert not path.exists()


@pytest.mark.parametrize(("rounds", "told"), [(0, True), (1, False), (2, True)])
def test_a_memory_that_can_go_nowhere_is_counted_as_lost(
    rounds: int, told: bool, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full during the last `rounds` rounds and at the end, where no round comes about any more.

    The file of the last round, if there is one, is waiting. Otherwise the memory is lost: for the others, too, from the
    next round on in which a worker can tell them, itself or its successor.
    """
    monkeypatch.setattr("packsaddle.local.elastic.workers.time", Clock())
    left = joined(settings={"memory_file": path, "grace": 5.0})
    left.train(3)
    with full():
        left.train(3 * rounds + 1)
        norm = membership(left).account.norm
        state, left.manager.refused = left.manager.save(), range(10**6)
        assert norm > 0
        assert not left.local.leave()
    nothing, all_of_it = pytest.approx((0.0, 0.0)), (0.0, pytest.approx(norm))
    assert left.local.lost == (0.0 if rounds == 0 else pytest.approx(norm))
    fate = "waits in its file" if rounds == 0 else "is lost"
    assert f"of norm {norm:.3g}, {fate}, and its last 1 inner steps are lost: no round was completed" in caplog.text
    stays = of_state(lambda: state)
    assert balance(stays) == ((pytest.approx(norm), 0.0) if rounds == 0 or not told else all_of_it)
    back = of_state(lambda: state, settings={"memory_file": path})
    assert float(back.local.pending().norm()) == (pytest.approx(norm) if rounds == 0 else 0.0)
    back.train(3)
    assert balance(back) == (nothing if rounds == 0 else all_of_it)


def test_two_workers_with_one_file(path: Path) -> None:
    """The second is refused as long as the first is there; the lock leaves nothing behind."""
    first = Worker(settings={"memory_file": path})
    line = f"the memory in {path} is in use by process {os.getpid()} on .*; give each worker a file of its own"
    for _ in range(2):
        with pytest.raises(ConfigError, match=line):
            Worker(settings={"memory_file": path})
    first.local.join()
    first.train(3)
    first.local.leave()
    Worker(settings={"memory_file": path}).local.leave()
    assert [found.name for found in path.parent.iterdir()] == ["memory.pt"]


def test_a_copy_of_a_live_workers_file_is_refused(path: Path) -> None:
    """It would be sent twice. A lock does not see it, nor does it work on every file system."""
    left, state = gone(path)
    content, roster, file = path.read_bytes(), Roster(), OwnFile(path)
    for field in roster.fields(("roster",)):
        field.load(field.read(state, {}))
    with pytest.raises(ConfigError, match=r"is that of worker [0-9a-f]+, which is training now; give each worker"):
        file.claim(shapes(left), roster)
    assert not file.save(MemoryFile(1, 2, 3, {}))
    assert path.read_bytes() == content


def test_a_place_where_no_memory_can_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"the memory cannot be written to .*file/memory: (Not a directory|File exists)"
    ):
        Worker(settings={"memory_file": tmp_path / "file" / "memory"})
