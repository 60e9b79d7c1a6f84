"""Workers that come and go, without torchft: failed rounds, weights, memories on disk, and what is refused."""

import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import Clock
from elastic_fakes import COMPRESSION, FakeGroup, FakeManager, Worker
from torch import Tensor

import packsaddle
from packsaddle import (
    Compression,
    Compressor,
    Elastic,
    Escape,
    Identity,
    LocalUpdates,
    LowRank,
    RandomK,
    Sign,
    TopK,
    simulate,
)
from packsaddle.comm import Group, PeerLostError, Solo, connect
from packsaddle.comm.managed import lighthouse_address
from packsaddle.errors import ConfigError, MissingExtraError
from packsaddle.local.elastic.memory_file import MemoryFile, OwnFile
from packsaddle.local.elastic.roster import Roster
from packsaddle.local.elastic.workers import ElasticWorkers
from packsaddle.local.participation import share


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let patience and grace end by readings of the clock: a patience below a second ends at the first failed round."""
    monkeypatch.setattr("packsaddle.local.elastic.workers.time", Clock())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def nesterov(anchors: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True)


def result(worker: Worker, steps: int = 30) -> list[Tensor]:
    if isinstance(worker.local._workers, ElasticWorkers):
        worker.local.join()
    worker.train(steps)
    return worker.everything()


CASES: list[dict[str, Any]] = [
    {"inner": adamw, "outer": nesterov, "exchange": "direct"},
    {
        "inner": adamw,
        "compressor": Compression(TopK(0.2, values="int8"), "direct", dense_below=10),
        "keep_unsent": False,
    },
    {"compressor": Compression(RandomK(0.3), dense_below=0), "noise": 0.01, "decay": 0.9},
    {"inner": adamw, "outer": nesterov, "agreement": 0.5, "mean_momentum": 0.0, "exchange": "direct"},
]


@pytest.mark.parametrize("case", CASES)
def test_undisturbed_it_is_local_updates_bit_for_bit(case: dict[str, Any]) -> None:
    here = simulate(lambda rank: result(Worker(_group(), **case)), 3)
    static = simulate(lambda rank: result(Worker(_group(), elastic=False, **case)), 3)
    for mine, theirs in zip(here, static, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def _group() -> Group:
    from packsaddle.comm import resolve

    return resolve(None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fault", ["vote", "hello", "exchange", "confirm"])
def test_a_failed_round_leaves_all_as_it_was_and_is_tried_again(case: dict[str, Any], fault: str) -> None:
    """At the second attempt that sends something; in the end nothing tells that there was a failure."""

    def run(rank: int) -> tuple[list[Tensor], int]:
        worker = Worker(_group(), **case)
        worker.local.join()
        worker.train(5)
        group, manager = worker.local._workers.channel.group, worker.manager
        before: list[list[Tensor]] = []

        def look() -> None:
            before.append(worker.everything())

        calls = group.calls - 2  # of one attempt, the join's two left out
        if fault == "vote":
            manager.refused = {manager.votes}
        else:
            at = {"hello": 0, "exchange": 1, "confirm": calls - 1}[fault]
            group.broken = {group.calls + at}
        manager.before_quorum = look
        worker.train(25)
        for a, b in zip(before[0], before[1], strict=True):
            assert torch.equal(a, b)
        return worker.everything(), manager.votes

    undisturbed = simulate(lambda rank: result(Worker(_group(), **case)), 2)
    for (mine, votes), theirs in zip(simulate(run, 2), undisturbed, strict=True):
        assert votes == 12  # a join, ten rounds, and one again
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("end", ["flush", "leave"])
@pytest.mark.parametrize("compressor", [Identity(), TopK(0.25)], ids=str)
@pytest.mark.parametrize("steps", [3, 4])
def test_fragments_whose_turn_has_not_come_are_sent_at_the_end(compressor: Any, steps: int, end: str) -> None:
    """Right after a round of one fragment, with no error memory that would tell."""

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        worker = Worker(_group(), every=2, fragments=2, compressor=Compression(compressor, dense_below=0))
        worker.local.join()
        before = worker.x()
        worker.train(steps)
        getattr(worker.local, end)()
        return before, worker.moved, worker.anchor()

    found = simulate(run, 2)
    for before, _, anchor in found:
        torch.testing.assert_close(anchor, before - sum(moved for _, moved, _ in found) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("committed", [True, False])
def test_a_worker_in_doubt_learns_from_the_others_what_came_of_its_round(committed: bool) -> None:
    """Its confirmation broke. If others have committed, what it sent is in their anchor, and else it sends it again."""
    worker, other = Worker(), Worker()
    for w in (worker, other):
        w.local.join()
        w.train(2)
    state = other.manager.save()  # as before the round
    group = worker.local._workers.channel.group
    group.broken = {group.calls + 4}  # after the hello, the dense part, the sizes and the messages

    def recover() -> None:
        if group.calls < max(group.broken) + 1:
            return
        worker.manager.before_quorum = lambda: None
        membership = worker.local._workers
        assert membership is not None
        if committed:
            state["roster"]["included"] = {membership.worker: membership.account.attempts}
        state["roster"]["past"] = [membership.roster.history]
        state["roster"]["history"], state["fragments"][0]["rounds"] = 17, 1
        for anchor in state["fragments"][0]["anchor"].values():
            anchor.add_(1.0)  # what the round did to it, say
        worker.manager.load(state)
        assert membership.roster.history == 17

    worker.manager.before_quorum = recover
    start = worker.anchor()
    worker.train(1)
    sent = start + 1.0 - worker.anchor()  # after the other's round, by the one that was tried again
    kept = worker.local.pending()
    if committed:  # the second attempt had nothing to send: it only listened
        assert torch.equal(sent, torch.zeros_like(sent))
        assert 0 < float(kept.norm()) < float(worker.moved.norm())
    else:
        torch.testing.assert_close(sent + kept, worker.moved, rtol=1e-12, atol=1e-12)


def test_a_worker_that_is_behind_takes_its_steps_along() -> None:
    worker, other = Worker(), Worker()
    for w in (worker, other):
        w.local.join()
    other.train(3)
    worker.train(2)
    pending = worker.local.pending()
    worker.manager.load(other.manager.save())
    assert torch.equal(worker.anchor(), other.anchor())
    torch.testing.assert_close(worker.local.pending(), pending, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(worker.x(), other.anchor() - pending, rtol=1e-12, atol=1e-12)


def test_a_round_that_others_do_not_have_is_counted_as_lost(caplog: pytest.LogCaptureFixture) -> None:
    """One alone committed it, and others went on from before: what it sent is lost, and what it kept is not."""
    worker, other = Worker(), Worker()
    for w in (worker, other):
        w.local.join()
        w.train(4)
    pending = worker.local.pending()
    sent = float((worker.moved - pending).norm())
    worker.manager.load(other.manager.save())
    assert torch.equal(worker.anchor(), other.anchor())
    torch.testing.assert_close(worker.local.pending(), pending, rtol=1e-12, atol=1e-12)
    worker.train(2)
    assert worker.local._workers.roster.gone == pytest.approx(sent)  # type: ignore[union-attr]
    assert "was in a round that the others do not have" in caplog.text


def test_a_newcomer_enters_the_bytes_of_its_first_round_at_the_step_of_the_others() -> None:
    def run(rank: int) -> list[tuple[int, int]]:
        worker = Worker(_group())
        worker.local.join()
        worker.train(3)
        if rank == 0:
            worker.train(3)
            return []
        newcomer = Worker(_group())
        newcomer.manager.before_quorum = lambda: newcomer.manager.load(worker.manager.save())
        newcomer.local.join()
        return [(span.first, span.last) for span in newcomer.local.ledger.spans]

    assert simulate(run, 2)[1] == [(2, 2)]


@pytest.mark.parametrize("inner", [True, False])
def test_a_newcomer_begins_at_the_anchor_with_the_steps_and_the_position_of_the_others(inner: bool) -> None:
    """The inner optimizer's state too, unless it is not wanted."""
    other, newcomer = (Worker(inner=adamw, outer=nesterov, settings={"share_optimizer_state": inner}) for _ in range(2))
    other.local.join()
    other.train(7)
    newcomer.manager.before_quorum = lambda: newcomer.manager.load(other.manager.save())
    with torch.no_grad():
        newcomer.parameters[0].add_(3.0)  # from another start
    newcomer.train(1)  # whose gradient is dropped
    assert torch.equal(newcomer.x(), other.anchor())
    assert newcomer.local.steps == 8
    assert newcomer.local.position == other.local.position == 6
    states = [w.local.outer.state_dict()["state"] for w in (other, newcomer)]
    assert all(torch.equal(states[0][i]["momentum_buffer"], states[1][i]["momentum_buffer"]) for i in (0, 1))
    theirs, mine = (w.optimizer.state_dict()["state"] for w in (other, newcomer))
    assert mine.keys() == (theirs.keys() if inner else set())
    assert all(torch.equal(mine[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in mine)


@pytest.mark.parametrize("compressor", [Identity(), COMPRESSION, Compression(RandomK(0.3), dense_below=0)])
@pytest.mark.parametrize("weight", ["steps", "function"])
def test_weighted_by_what_workers_have_trained_on(compressor: Any, weight: str) -> None:
    """The anchor moves by sum_i w_i (moved_i - pending_i) / sum_i w_i, as weights 3 to 1 stay what they are."""
    tokens = [10, 30]

    def run(rank: int) -> tuple[Tensor, Tensor, int]:
        worker = Worker(_group(), compressor=compressor, settings={"weight": "steps"})
        membership = worker.local._workers
        assert membership is not None
        total = [0]
        if weight == "function":
            membership.settings = Elastic(worker.manager, weight=lambda: float(total[0]), leave_on_sigterm=False)
        worker.local.join()
        start = worker.anchor()
        for _ in range(6):
            steps = 3 if weight == "function" or rank else 1
            membership.paces = [steps]
            for _ in range(steps):
                total[0] += tokens[rank]
                worker.train(1)
        sent = worker.moved - worker.local.pending()
        return start - worker.anchor(), sent, worker.local.position

    (moved, first, position), (also, second, _) = simulate(run, 2)
    assert torch.equal(moved, also)
    torch.testing.assert_close(moved, (first + 3 * second) / 4, rtol=1e-12, atol=1e-12)
    assert position == (36 if weight == "function" else 24)


def test_shares() -> None:
    assert [share([0.1] * 7, i) for i in range(7)] == [1.0] * 7  # exactly, so that equal weights change no bit
    assert [share([1.0, 3.0], i) for i in (0, 1)] == [0.5, 1.5]
    assert [share([0.0, 3.0], i) for i in (0, 1)] == [0.0, 2.0]


def test_a_faster_worker_does_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rank: int) -> list[int]:
        worker = Worker(_group(), every=12, settings={"weight": "steps"})
        worker.local.join()
        membership, at = worker.local._workers, []
        assert membership is not None
        clock = [0.0]
        for _ in range(60):
            clock[0] += 3.0 if rank else 1.0
            membership._resumed, now = 0.0, clock[0]
            monkeypatch.setattr("packsaddle.local.elastic.workers.time.monotonic", lambda now=now: now)
            worker.train(1)
            if worker.local.exchanging:
                at.append(worker.local.steps)
                clock[0] = 0.0
            if worker.local.rounds == 3:
                break
        return at

    assert simulate(run, 2) == [[12, 30, 48], [12, 18, 24]]  # as with a fixed set of workers 24 together


def test_all_that_is_pending_goes_with_flush() -> None:
    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        worker = Worker(_group())
        worker.local.join()
        start = worker.anchor()
        worker.train(10)
        assert worker.local.flush()
        assert not worker.local.pending().any()
        assert torch.equal(worker.x(), worker.anchor())
        return start - worker.anchor(), worker.moved, worker.x()

    (moved, first, x), (_, second, y) = simulate(run, 2)
    assert torch.equal(x, y)
    torch.testing.assert_close(moved, (first + second) / 2, rtol=1e-12, atol=1e-12)


def test_a_bad_update_is_left_out_by_all() -> None:
    def run(rank: int) -> tuple[list[Any], Tensor]:
        worker = Worker(_group())
        worker.local.join()
        worker.train(2)
        if rank:
            worker.parameters[0].data[0, 0] = float("nan")
        worker.train(1)
        return worker.local.skips, worker.anchor()

    (skips, anchor), (same, _) = simulate(run, 2)
    assert skips == same
    assert skips[0].workers == (1,)
    assert anchor.isfinite().all()


def test_a_round_that_is_not_taken_leaves_the_norms_of_memories() -> None:
    """Which count as lost or waiting when a worker goes: what was to be sent is still there."""

    def run(rank: int) -> tuple[list[float], float]:
        worker = Worker(_group())
        worker.local.join()
        worker.train(5)
        if rank:
            worker.parameters[0].data[0, 0] = float("nan")
        worker.train(1)
        assert worker.local.skipped == 1
        roster = worker.local._workers.roster  # type: ignore[union-attr]
        norms = sorted(member.norm for member in roster.members.values())
        return norms, float(worker.local._fragments[0].feedback.memory.vector.norm())

    (norms, first), (same, second) = simulate(run, 2)
    assert norms == same == pytest.approx(sorted([first, second]))


# Memories on disk.


def gone(path: Path, steps: int = 7) -> tuple[Worker, Any]:
    """A worker that has left its memory in a file, and what others know."""
    worker = Worker(settings={"memory_file": path})
    worker.local.join()
    worker.train(steps)
    worker.local.leave()
    return worker, worker.manager.save()


def returned(state: Any, path: Path, **arguments: Any) -> Worker:
    """A worker with that file, which receives the others' state at its first quorum."""
    worker = Worker(settings={"memory_file": path}, **arguments)
    membership = worker.local._workers
    assert membership is not None
    worker.manager.before_quorum = lambda: None if membership.roster.past else worker.manager.load(state)
    return worker


def test_a_memory_is_sent_by_a_flush_without_steps(tmp_path: Path) -> None:
    """A worker that returns at the end of training: all that it has is in its file."""
    path = tmp_path / "memory.pt"
    left, state = gone(path)
    pending, before = left.local.pending(), left.anchor()
    back = returned(state, path)
    assert back.local.flush()
    torch.testing.assert_close(back.anchor(), before - pending, rtol=1e-12, atol=1e-12)
    assert not back.local.pending().any()


def test_a_scaler_that_skips_the_first_steps_joins_too(tmp_path: Path) -> None:
    """An Inf in each, as at too large a scale: the memory is loaded, and the step count is that of the others."""
    path = tmp_path / "memory.pt"
    left, state = gone(path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    back = returned(state, path, every=2, scaler=scaler)
    for _ in range(2):
        back.gradients()
        scaler.scale(torch.ones(()))
        back.parameters[0].grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(back.optimizer)
        scaler.update()
    assert back.local.steps == left.local.steps + 2
    assert back.local.flush()
    torch.testing.assert_close(back.anchor(), left.anchor() - left.local.pending(), rtol=1e-12, atol=1e-12)


def test_a_memory_waits_in_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And goes on in another process: what it had moved since the last round is in it."""
    path = tmp_path / "memory.pt"
    left, state = gone(path)
    assert path.stat().st_size < 4000  # the vector, of 240 bytes, once
    pending = left.local.pending()
    back = Worker(settings={"memory_file": path})
    before = MemoryFile.read(path, _shapes(back)).attempt
    back.manager.before_quorum = lambda: back.manager.load(state)
    back.local.join()
    assert torch.equal(back.local.pending(), pending)
    assert back.local._workers.worker == left.local._workers.worker  # type: ignore[union-attr]
    torch.testing.assert_close(back.x(), back.anchor() - pending, rtol=1e-12, atol=1e-12)
    back.manager.before_quorum = lambda: None
    back.train(3)  # after which the file is that of the new round
    assert MemoryFile.read(path, _shapes(back)).next_attempt > before
    back.local.leave()
    again = Worker(settings={"memory_file": path})
    again.manager.before_quorum = lambda: again.manager.load(back.manager.save())
    again.local.join()
    assert torch.equal(again.local.pending(), back.local.pending())


@pytest.mark.parametrize("committed", [True, False])
def test_a_worker_that_is_killed_within_a_round_loses_no_memory(committed: bool, tmp_path: Path) -> None:
    """Its file has what it will have if others commit the round, and if they do not."""

    class KilledError(BaseException):
        pass

    def kill() -> bool:
        raise KilledError

    path = tmp_path / "memory.pt"
    killed, twin = (Worker(settings={"memory_file": file}) for file in (path, tmp_path / "twin.pt"))
    twin.local._workers.worker = killed.local._workers.worker
    for worker in (killed, twin):
        worker.local.join()
        worker.train(5)
    killed.manager.should_commit = kill  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        killed.train(1)
    assert killed.local._workers._file is not None
    killed.local._workers._file.close()
    state = twin.manager.save()
    twin.train(1)
    back = returned(twin.manager.save() if committed else state, path)
    back.local.join()
    assert back.local.lost == 0
    if committed:
        assert torch.equal(back.local.pending(), twin.local.pending())
    else:
        sent = Worker().x() - back.anchor()
        torch.testing.assert_close(back.local.pending(), killed.moved - sent, rtol=1e-12, atol=1e-12)


def _shapes(worker: Worker) -> dict[str, torch.Size]:
    return {name: a.shape for name, a in worker.local.anchor().items()}


@pytest.mark.parametrize("why", ["sent", "run", "damaged", "format", "shapes"])
def test_a_memory_that_cannot_be_used_is_set_aside(why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "memory.pt"
    left, state = gone(path)
    expected = {"sent": "older than what its worker has sent since", "run": "of another run"}
    if why == "sent":
        state["roster"]["included"][left.local._workers.worker] += 1  # type: ignore[union-attr]
    elif why == "run":
        state["roster"]["run"] += 1
    elif why == "damaged":
        path.write_bytes(path.read_bytes()[:100])
        expected[why] = "cannot be read"
    else:
        found = torch.load(path, weights_only=True)
        found |= {"format": 1} if why == "format" else {"error": {"w": torch.ones(1)}}
        torch.save(found, path)
        expected |= {"format": "has format 1", "shapes": "is of other parameters"}
    other = path.with_name("memory.pt.unusable")
    other.write_bytes(b"set aside earlier")
    content = path.read_bytes()
    back = Worker(settings={"memory_file": path})
    back.manager.before_quorum = lambda: back.manager.load(state)
    back.local.join()
    assert not back.local.pending().any()
    assert expected[why] in caplog.text
    assert other.read_bytes() == b"set aside earlier"
    assert path.with_name("memory.pt.unusable-2").read_bytes() == content
    assert MemoryFile.read(path, _shapes(back)).norm == 0  # its own, from now on
    back.manager.before_quorum = lambda: None
    back.train(3)
    assert (back.local.lost > 0) == (why == "sent")


def test_what_is_lost_is_counted_and_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A worker that is in no round any more, with and without a file; the file's counts as waiting."""
    for keeps in (False, True):
        caplog.clear()
        settings = {"memory_file": tmp_path / "memory.pt"} if keeps else {}
        left = Worker(settings=settings)
        left.local.join()
        left.train(6)
        stays = Worker()
        stays.manager.load(left.manager.save())
        assert stays.local.lost == 0.0
        stays.local.join()
        membership = stays.local._workers
        assert membership is not None
        norm = float(left.local.pending().norm())
        assert norm > 0
        found = (membership.waiting, stays.local.lost) if keeps else (stays.local.lost, membership.waiting)
        assert found == (pytest.approx(norm), 0.0)
        assert ("waits in its file" if keeps else "is lost") in caplog.text


@contextmanager
def full() -> Iterator[None]:
    """Within, no file of this process can grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def successor(state: Any, **settings: Any) -> Worker:
    """A worker that joins others with this state."""
    found = Worker(settings=settings)
    found.manager.before_quorum = lambda: found.manager.load(state)
    found.local.join()
    found.manager.before_quorum = lambda: None
    return found


def balance(worker: Worker) -> tuple[float, float]:
    """What a worker counts as waiting and as lost."""
    assert worker.local._workers is not None
    return worker.local._workers.waiting, worker.local.lost


@pytest.mark.parametrize("since", [0, 2])
def test_a_memory_that_cannot_be_written_goes_with_a_last_round(since: int, tmp_path: Path) -> None:
    """Also where the file is of the last round: it is outdated then, and removed."""
    path = tmp_path / "memory.pt"

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
        worker = Worker(_group(), settings={"memory_file": path} if rank else {})
        worker.local.join()
        start = worker.anchor()
        worker.train(3 + since)
        if rank:
            with full():
                assert worker.local.leave()
        else:
            worker.train(3 - since)
        roster = worker.local._workers.roster  # type: ignore[union-attr]
        norms = sum(member.norm for member in roster.members.values())
        return start - worker.anchor(), worker.moved, worker.local.pending(), norms

    (moved, first, rest, norms), (_, second, none, _) = simulate(run, 2)
    assert not rest.any()
    assert not none.any()
    assert norms == 0  # so nothing is said to wait, or to be lost
    assert not path.exists()
    torch.testing.assert_close(moved, (first + second) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("rounds", "told"), [(0, True), (1, False), (2, True)])
def test_a_memory_that_can_go_nowhere_is_counted_as_lost(
    rounds: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full during the last `rounds` rounds and at the end, where no round comes about any more.

    The file of the last round, if there is one, is waiting. Otherwise the memory is lost: for the others, too, from the
    next round on in which a worker can tell them, itself or its successor.
    """
    path = tmp_path / "memory.pt"
    left = Worker(settings={"memory_file": path, "grace": 5.0})
    left.local.join()
    left.train(3)
    with full():
        left.train(3 * rounds + 1)
        norm = left.local._workers.account.norm  # type: ignore[union-attr]
        state, left.manager.refused = left.manager.save(), range(10**6)
        assert norm > 0
        assert not left.local.leave()
    nothing, all_of_it = pytest.approx((0.0, 0.0)), (0.0, pytest.approx(norm))
    assert left.local.lost == (0.0 if rounds == 0 else pytest.approx(norm))
    fate = "waits in its file" if rounds == 0 else "is lost"
    assert f"of norm {norm:.3g}, {fate}, and its last 1 inner steps are lost: no round has come about" in caplog.text
    stays = successor(state)
    assert balance(stays) == ((pytest.approx(norm), 0.0) if rounds == 0 or not told else all_of_it)
    back = successor(state, memory_file=path)
    assert float(back.local.pending().norm()) == (pytest.approx(norm) if rounds == 0 else 0.0)
    back.train(3)
    assert balance(back) == (nothing if rounds == 0 else all_of_it)


def test_two_workers_with_one_file(tmp_path: Path) -> None:
    """The second is refused as long as the first is there; the lock leaves nothing behind."""
    path = tmp_path / "memory.pt"
    first = Worker(settings={"memory_file": path})
    line = f"the memory in {path} is in use by process {os.getpid()} on .*; give each worker a file of its own"
    for _ in range(2):
        with pytest.raises(ConfigError, match=line):
            Worker(settings={"memory_file": path})
    first.local.join()
    first.train(3)
    first.local.leave()
    Worker(settings={"memory_file": path}).local.leave()
    assert [found.name for found in tmp_path.iterdir()] == ["memory.pt"]


def test_a_copy_of_a_live_workers_file_is_refused(tmp_path: Path) -> None:
    """It would be sent twice. A lock does not see it, nor does it work on every file system."""
    path = tmp_path / "memory.pt"
    left, state = gone(path)
    content, roster, file = path.read_bytes(), Roster(), OwnFile(path)
    for field in roster.fields(("roster",)):
        field.load(field.read(state, {}))
    with pytest.raises(ConfigError, match=r"is that of worker [0-9a-f]+, which is training now; give each worker"):
        file.claim(_shapes(left), roster)
    assert not file.save(MemoryFile(1, 2, 3, {}))
    assert path.read_bytes() == content


def test_a_place_where_no_memory_can_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"the memory cannot be written to .*file/memory: (Not a directory|File exists)"
    ):
        Worker(settings={"memory_file": tmp_path / "file" / "memory"})


@pytest.mark.parametrize("compressor", [Sign(), Identity()], ids=repr)
def test_a_second_flush_sends_nothing(compressor: Compressor) -> None:
    def run(rank: int) -> tuple[int, int, int]:
        worker = Worker(_group(), compressor=Compression(compressor, dense_below=0))
        worker.local.join()
        worker.train(7)
        sent = [worker.local.ledger.total.sent]
        for _ in range(2):
            assert worker.local.flush()
            sent.append(worker.local.ledger.total.sent)
        return sent[1] - sent[0], sent[2] - sent[1], worker.local.rounds

    for first, second, rounds in simulate(run, 3):
        assert second < first - 200  # of 30 numbers, float64, of two workers
        assert rounds == 3


def test_a_newcomer_without_updates_is_not_in_a_flush() -> None:
    """It has been in no round with an update, so nothing that the others have to send is divided by three."""

    def run(rank: int) -> tuple[Tensor, Tensor]:
        worker = Worker(_group(), compressor=Compression(Sign(), dense_below=0))
        worker.local.join()
        start = worker.anchor()
        if rank < 2:
            worker.train(6)
        else:
            for _ in range(2):
                worker.local._workers.round(uncompressed=False)  # type: ignore[union-attr]
        assert worker.local.flush()
        return start - worker.anchor(), worker.moved

    found = simulate(run, 3)
    mean = (found[0][1] + found[1][1]) / 2
    for moved, _ in found:
        torch.testing.assert_close(moved, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("clock")
def test_a_worker_with_frozen_parameters_leaves() -> None:
    """Nothing of theirs can be sent, so one round is enough, and it does not wait for the end of its grace."""

    def run(rank: int) -> tuple[bool, int]:
        worker = Worker(_group())
        worker.local.join()
        worker.train(7)
        worker.parameters[0].requires_grad_(False)
        for _ in range(6):
            worker.gradients()
            worker.parameters[0].grad = None
            worker.optimizer.step()
        before = worker.manager.votes
        return worker.local.leave(), worker.manager.votes - before

    assert simulate(run, 2) == [(True, 1)] * 2


def test_leaving_without_a_file_is_a_round_of_all_that_is_pending() -> None:
    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        worker = Worker(_group())
        worker.local.join()
        start = worker.anchor()
        worker.train(5)
        if rank:
            worker.local.leave()
        else:
            worker.train(1)  # the next round, which the other has asked to be dense
        return start - worker.anchor(), worker.moved, worker.local.pending()

    (moved, first, rest), (_, second, none) = simulate(run, 2)
    assert not rest.any()
    assert not none.any()
    torch.testing.assert_close(moved, (first + second) / 2, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_of_what_has_been_sent_since_is_not_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    """Others have gone on with this worker after it was saved: its memory counts as lost. If without it, it goes on."""
    for gone_on in (True, False):
        worker, back = Worker(), Worker()
        worker.local.join()
        worker.train(8)
        saved, x, pending = worker.local.state_dict(), worker.x(), worker.local.pending()
        norm = float(worker.local._fragments[0].feedback.memory.vector.norm())
        others = worker.manager.save()
        if gone_on:
            worker.train(1)
            others = worker.manager.save()
        for p, old in zip(back.parameters, x.split([24, 6]), strict=True):
            p.data.copy_(old.view(p.shape))
        back.local.load_state_dict(saved)
        back.manager.before_quorum = lambda back=back, others=others: back.manager.load(others)
        back.local.join()
        assert torch.equal(back.anchor(), worker.anchor())
        assert back.local.lost == (pytest.approx(norm) if gone_on else 0.0)
        if gone_on:
            assert not back.local.pending().any()
        else:
            torch.testing.assert_close(back.local.pending(), pending, rtol=1e-12, atol=1e-12)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delay": 1}, "delay must be 0 with a manager"),
        ({"exchange": "senders"}, 'exchange must not be "senders" with a manager'),
        ({"escape": Escape(3, 1.0, lambda: 0.0)}, "escape must be None with a manager"),
        ({"compressor": Compression(LowRank(1), dense_below=0)}, "average messages directly with a manager"),
        ({"compressor": Compression(TopK(0.1), exchange="two-way", dense_below=0)}, "average messages directly"),
    ],
)
def test_what_does_not_go_with_a_manager(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Worker(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "tokens"}, 'weight must be None, "steps" or a function'),
        ({"patience": 0}, "patience must be above 0 seconds"),
        ({"grace": -1}, "grace must be above 0 seconds"),
        ({"patience": "-1ms"}, "patience must be above 0 seconds, got '-1ms'"),
        ({"grace": "5m"}, "grace must be seconds such as 30, 55ms or 2min, got '5m'"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Elastic(FakeManager(Solo()), **settings)


def test_times_are_kept_in_seconds() -> None:
    elastic = Elastic(FakeManager(Solo()), patience="2min", grace="500ms")
    assert (elastic.patience, elastic.grace) == (120.0, 0.5)


def test_a_manager_must_be_one_and_synchronous() -> None:
    with pytest.raises(TypeError, match="manager must be a torchft Manager, got int"):
        Elastic(3)
    asynchronous = FakeManager(Solo())
    asynchronous._use_async_quorum = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="use_async_quorum=False"):
        Elastic(asynchronous)


def test_what_is_of_a_manager_alone() -> None:
    static, elastic = Worker(elastic=False).local, Worker().local
    for call in (static.join, static.leave):
        with pytest.raises(RuntimeError, match="is for workers that come and go"):
            call()
    with pytest.raises(RuntimeError, match=r"with a manager, pending\(\)"):
        elastic.error()
    assert (static.lost, static.position) == (0.0, 0)


def test_a_worker_that_starts_elsewhere_is_told() -> None:
    def run(rank: int) -> None:
        worker = Worker(_group())
        if rank:
            worker.parameters[0].data.add_(1.0)
        worker.local.join()

    with pytest.raises(ConfigError, match="workers must begin at the same parameters"):
        simulate(run, 2)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("changed", [False, True])
def test_a_worker_with_other_frozen_parameters_is_refused(changed: bool) -> None:
    """No round would make them equal: a newcomer receives the anchor, which has the trained ones only.
    Those that are `changed` on all workers after they have joined, such as a teacher's, may go on."""

    def run(rank: int) -> str:
        model = torch.nn.ModuleDict({"fixed": torch.nn.Linear(2, 2), "trained": torch.nn.Linear(2, 2)})
        model["fixed"].requires_grad_(False)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.fill_(i + float(rank == 2 and not changed))
        optimizer, manager = torch.optim.SGD(model["trained"].parameters(), lr=0.1), FakeManager(_group())
        workers = Elastic(manager, group=FakeGroup(manager), leave_on_sigterm=False, patience=0.5)
        local = LocalUpdates(optimizer, workers=workers, model=model, compressor=Identity())
        try:
            local.join()
            if changed:
                model["fixed"].weight.data.add_(1.0)
                assert local._workers is not None
                local._workers.has_joined = rank != 2  # as if worker 2 joined only now
                assert local._workers.round(uncompressed=True)
                local._workers.has_joined = True
                assert local.flush()
        except (ConfigError, PeerLostError) as error:
            return str(error)
        return ""

    said = simulate(run, 3)
    if changed:
        assert said == [""] * 3
        return
    assert "given the same arguments, but worker" in said[2]
    assert "has checksum of fixed.weight=" in said[2]
    assert all("no round has come about" in each for each in said[:2])


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("one", "others", "line"),
    [
        ({"every": 4}, {}, "has every=4 and the others have every=3"),
        ({"outer": nesterov}, {}, r"has outer=\('SGD', {'lr': 0\.7, .*}\) and the others have outer=None"),
        ({"decay": 0.5, "seed": 1}, {"decay": 0.75}, r"has decay=0\.5 and the others have decay=0\.75"),
    ],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_with_other_arguments_is_told_which(
    rank: int, one: dict[str, Any], others: dict[str, Any], line: str
) -> None:
    """The one of three that differs; the others repeat the round, until their patience ends."""

    def run(mine: int) -> str:
        worker = Worker(_group(), settings={"patience": 0.5}, **(one if mine == rank else others))
        try:
            worker.local.join()
        except (ConfigError, PeerLostError) as error:
            return str(error)
        return ""

    said = simulate(run, 3)
    found = re.fullmatch(f"workers must be given the same arguments, but (worker [0-9a-f]+) {line}", said.pop(rank))
    assert found is not None
    reason = f"no round has come about in .*: workers must be given the same arguments, but {found[1]} has "
    assert all(re.match(reason, other) for other in said)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_whose_schedule_differs_is_told_before_it_sends(rank: int) -> None:
    """The functions have one name, so that only the messages of the second round differ."""

    def run(mine: int) -> tuple[str, int, int]:
        def schedule(t: int) -> Any:
            return TopK(0.5 if mine == rank and t == 1 else 0.25)

        spec = Compression(schedule, exchange="direct", dense_below=0)
        worker = Worker(_group(), settings={"patience": 0.5}, compressor=spec)
        worker.local.join()
        with pytest.raises((ConfigError, PeerLostError)) as caught:
            worker.train(30)
        assert worker.local._workers is not None
        return str(caught.value), worker.local.rounds, worker.local._workers.worker

    found = simulate(run, 3)
    name = found[rank][2]
    line = f"workers must send messages of one kind, but worker {name:x} has compressor="
    sides = r"TopK\(.*0\.5.*\) and the others have compressor=TopK\(.*0\.25"
    assert re.match(re.escape(line) + sides, found[rank][0])
    others = [text for worker, (text, *_) in enumerate(found) if worker != rank]
    assert all(re.match(r"no round has come about in .*: " + re.escape(line), text) for text in others)
    assert [rounds for _, rounds, _ in found] == [1, 1, 1]


def test_an_identity_says_version_size_and_round() -> None:
    worker = Worker()
    worker.local.join()
    worker.train(6)
    assert worker.local._workers is not None
    lines = worker.local._workers._message().split("\n")
    assert lines[0] == f"packsaddle={packsaddle.__version__!r}"
    assert lines[1].startswith("compressor=TopK(")
    assert lines[2:] == ["d=30", "round=2"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"fragments": 2}, "fragments is 2 here, but the state was saved with fragments 1"),
        ({"outer": nesterov}, "outer is True here, but the state was saved with outer False"),
    ],
)
def test_a_newcomer_with_other_arguments_is_told_which(arguments: dict[str, Any], line: str) -> None:
    other, newcomer = Worker(), Worker(**arguments)
    other.local.join()
    with pytest.raises(ConfigError, match=line):
        newcomer.manager.load(other.manager.save())


@pytest.mark.usefixtures("clock")
def test_patience_ends() -> None:
    worker = Worker(refused=range(10**6), settings={"patience": "2500ms"})
    with pytest.raises(PeerLostError, match=r"no round has come about in 2\.5 s"):
        worker.local.join()
    assert worker.manager.votes == 3


def test_weights_that_fall_are_refused() -> None:
    worker = Worker(settings={"weight": lambda: -1.0})
    worker.local.join()
    with pytest.raises(ConfigError, match=r"weight must return a total that is finite and does not fall, got -1 more"):
        worker.train(3)


def test_without_torchft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchft", None)
    monkeypatch.setitem(sys.modules, "torchft.process_group", None)
    line = r"needs torchft: pip install 'packsaddle\[torchft\]'"
    calls: list[Callable[[], object]] = [
        lambda: connect("http://localhost:1"),
        lambda: LocalUpdates(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]), workers=FakeManager(Solo())),
    ]
    for call in calls:
        with pytest.raises(MissingExtraError, match=line):
            call()


@pytest.mark.parametrize("address", ["localhost:29510", "http://localhost", "https://a:1", "http://[a:1", "http://a:b"])
def test_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", address)
    with pytest.raises(ConfigError, match="the lighthouse must be http://HOST:PORT, got"):
        lighthouse_address()
