"""Workers that come and go, without torchft: failed rounds, newcomers, weights, and what is refused."""

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock import Clock
from elastic_fakes import (
    COMPRESSION,
    FakeGroup,
    FakeManager,
    Worker,
    check_nothing_is_lost,
    joined,
    membership,
    of_state,
    pace,
)
from torch import Tensor

from packsaddle import Compression, Compressor, Elastic, Identity, LocalUpdates, RandomK, Sign, TopK, simulate
from packsaddle.comm import PeerLostError, Solo, connect, resolve
from packsaddle.comm.managed import lighthouse_address
from packsaddle.errors import ConfigError, MissingExtraError
from packsaddle.local.round import share_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let patience and grace end by readings of the clock: a patience below a second ends at the first failed round."""
    monkeypatch.setattr("packsaddle.local.elastic.workers.time", Clock())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def nesterov(anchors: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True)


CASES: list[dict[str, Any]] = [
    {"inner": adamw, "outer": nesterov, "exchange": "direct"},
    {
        "inner": adamw,
        "compressor": Compression(TopK(0.2, values="int8"), "direct", dense_below=10),
        "keep_unsent": False,
    },
    {"compressor": Compression(RandomK(0.3), dense_below=0), "noise": 0.01, "decay": 0.9},
    {"inner": adamw, "outer": nesterov, "agreement": 0.5, "mean_momentum": 0.0, "exchange": "direct"},
    {"inner": adamw, "compressor": Compression(TopK(0.25, values="int8"), "two-way", dense_below=0)},
]


def undisturbed(case: dict[str, Any], workers: int, *, elastic: bool = True) -> list[list[Tensor]]:
    def run(rank: int) -> list[Tensor]:
        worker = joined(**case) if elastic else Worker(resolve(None), elastic=False, **case)
        worker.train(30)
        return worker.everything()

    return simulate(run, workers)


@pytest.mark.parametrize("case", CASES)
def test_undisturbed_it_is_local_updates_bit_for_bit(case: dict[str, Any]) -> None:
    for mine, theirs in zip(undisturbed(case, 3), undisturbed(case, 3, elastic=False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


FAULTS = [(CASES[0], fault) for fault in ("vote", "hello", "exchange")] + [(case, "confirm") for case in CASES]


@pytest.mark.parametrize(("case", "fault"), FAULTS)
def test_a_failed_round_leaves_all_as_it_was_and_is_tried_again(case: dict[str, Any], fault: str) -> None:
    """At the second attempt that sends something; in the end nothing tells that there was a failure."""

    def run(rank: int) -> list[Tensor]:
        worker = joined(**case)
        worker.train(5)
        group, manager, before = worker.local._workers.channel.group, worker.manager, list[list[Tensor]]()
        calls = group.calls - 2  # of one attempt, the join's two left out
        if fault == "vote":
            manager.refused = {manager.votes}
        else:
            group.broken = {group.calls + {"hello": 0, "exchange": 1, "confirm": calls - 1}[fault]}
        manager.before_quorum = lambda: before.append(worker.everything())
        worker.train(25)
        for a, b in zip(before[0], before[1], strict=True):
            assert torch.equal(a, b)
        assert manager.votes == 12  # a join, ten rounds, and one again
        return worker.everything()

    for mine, theirs in zip(simulate(run, 2), undisturbed(case, 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("committed", [True, False])
def test_a_worker_in_doubt_learns_from_the_others_what_came_of_its_round(committed: bool) -> None:
    """Its confirmation broke. If others have committed, what it sent is in their anchor, and else it sends it again."""
    worker, other = joined(), joined()
    for w in (worker, other):
        w.train(2)
    state = other.manager.save()  # as before the round
    group = worker.local._workers.channel.group
    group.broken = {group.calls + 3}  # after the hello, the messages and the dense part

    def recover() -> None:
        if group.calls < max(group.broken) + 1:
            return
        worker.manager.before_quorum = lambda: None
        mine = membership(worker)
        if committed:
            state["roster"]["included"] = {mine.worker: mine.account.attempts}
        state["roster"]["past"] = [mine.roster.history]
        state["roster"]["history"], state["fragments"][0]["rounds"] = 17, 1
        for anchor in state["fragments"][0]["anchor"].values():
            anchor.add_(1.0)  # what the round did to it, say
        worker.manager.load(state)
        assert mine.roster.history == 17

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


@pytest.mark.parametrize("extra", [0, 2])
def test_a_worker_that_is_behind_or_alone_in_a_round_takes_its_pending_updates_along(
    extra: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What it sent in a round that the others do not have is lost, which is logged; what it kept is not."""
    worker, other = joined(), joined()
    membership(other).roster.run = membership(worker).roster.run
    other.train(3 + extra // 2)
    worker.train(2 + extra)
    pending = worker.local.pending()
    worker.manager.load(other.manager.save())
    assert torch.equal(worker.anchor(), other.anchor())
    torch.testing.assert_close(worker.local.pending(), pending, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(worker.x(), other.anchor() - pending, rtol=1e-12, atol=1e-12)
    assert ("was in a round that the others do not have: its update is lost" in caplog.text) == (extra > 0)


@pytest.mark.parametrize("rounds", [1, 70])
def test_a_worker_that_is_only_behind_loses_nothing(rounds: int, caplog: pytest.LogCaptureFixture) -> None:
    """Not by more rounds than the others' history remembers either."""

    def run(rank: int) -> Worker:
        worker = joined()
        worker.train(3)
        if rank == 0:  # goes on alone, and the other one with its state
            worker.manager.group = Solo()
            worker.train(3 * rounds)
            states.append(worker.manager.save())
        return worker

    states: list[Any] = []
    first, behind = simulate(run, 2)
    pending = behind.local.pending()
    behind.manager.load(states[0])
    assert torch.equal(behind.anchor(), first.anchor())
    torch.testing.assert_close(behind.local.pending(), pending, rtol=1e-12, atol=1e-12)
    assert "is lost" not in caplog.text


# ---- two runs


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("same", [False, True])
def test_a_worker_that_has_trained_keeps_its_run(same: bool) -> None:
    """Two newcomers have formed a quorum without it, and made more rounds than it has: it is refused, and loses
    nothing. Nor does it load fewer rounds of its own run, from an old checkpoint."""

    def run(rank: int) -> Worker:
        newcomer = joined()
        newcomer.train(9)
        return newcomer

    survivor = joined()
    survivor.train(13 if same else 4)
    state = simulate(run, 2)[0].manager.save()
    if same:
        state["roster"]["run"] = membership(survivor).roster.run
        state["fragments"][0]["rounds"] = 2
    survivor.manager.before_quorum = lambda: survivor.manager.load(state)
    with pytest.raises(
        ConfigError, match=r"would replace that of this worker \(rounds: [14], run: .*\), which keeps its state"
    ):
        survivor.train(2)
    check_nothing_is_lost([survivor], pending=True)
    survivor.manager.before_quorum = lambda: None  # the newcomers are gone
    assert survivor.local.flush()
    check_nothing_is_lost([survivor], pending=False)


def test_a_worker_that_has_only_joined_may_change_its_run() -> None:
    """It has nothing that is lost: its steps since are kept."""
    alone, other = joined(), joined()
    other.train(3)
    alone.train(2)
    pending = alone.local.pending()
    alone.manager.load(other.manager.save())
    assert torch.equal(alone.anchor(), other.anchor())
    torch.testing.assert_close(alone.local.pending(), pending, rtol=1e-12, atol=1e-12)
    assert membership(alone).roster.run == membership(other).roster.run


# ---- newcomers


def test_a_newcomer_enters_the_bytes_of_its_first_round_at_the_step_of_the_others() -> None:
    def run(rank: int) -> list[tuple[int, int]]:
        worker = joined()
        worker.train(3)
        if rank == 0:
            worker.train(3)
            return []
        newcomer = of_state(worker.manager.save)
        return [(span.first, span.last) for span in newcomer.local.ledger.spans]

    assert simulate(run, 2)[1] == [(2, 2)]


@pytest.mark.parametrize("compare", [True, False])
def test_a_newcomer_begins_at_the_anchor_with_the_steps_and_the_position_of_the_others(compare: bool) -> None:
    """With the inner optimizer's state too, unless optimizers may differ."""
    options: dict[str, Any] = {"inner": adamw, "outer": nesterov, "settings": {"compare_optimizers": compare}}
    other = joined(**options)
    other.train(7)
    newcomer = of_state(other.manager.save, joins=False, **options)
    newcomer.parameters[0].data.add_(3.0)  # from another start
    newcomer.train(1)  # whose gradient is dropped
    assert torch.equal(newcomer.x(), other.anchor())
    assert newcomer.local.steps == 8
    assert newcomer.local.position == other.local.position == 6
    states = [w.local.outer.state_dict()["state"] for w in (other, newcomer)]  # type: ignore[union-attr]
    assert all(torch.equal(states[0][i]["momentum_buffer"], states[1][i]["momentum_buffer"]) for i in (0, 1))
    theirs, mine = (w.optimizer.state_dict()["state"] for w in (other, newcomer))
    assert mine.keys() == (theirs.keys() if compare else set())
    assert all(torch.equal(mine[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in mine)


# ---- weights and paces


@pytest.mark.parametrize("compressor", [Identity(), COMPRESSION, Compression(RandomK(0.3), dense_below=0)])
@pytest.mark.parametrize("weight", ["steps", "function"])
def test_weighted_by_what_workers_have_trained_on(compressor: Any, weight: str) -> None:
    """The anchor moves by sum_i w_i (moved_i - pending_i) / sum_i w_i, as weights 3 to 1 stay what they are."""
    tokens = [10, 30]

    def run(rank: int) -> tuple[Tensor, Tensor, int]:
        total = [0]
        of = "steps" if weight == "steps" else lambda: float(total[0])
        worker = joined(compressor=compressor, settings={"weight": of})
        start = worker.anchor()
        for _ in range(6):
            steps = 3 if weight == "function" or rank else 1
            pace(worker, steps)
            for _ in range(steps):
                total[0] += tokens[rank]
                worker.train(1)
        return start - worker.anchor(), worker.moved - worker.local.pending(), worker.local.position

    (moved, first, position), (also, second, _) = simulate(run, 2)
    assert torch.equal(moved, also)
    torch.testing.assert_close(moved, (first + 3 * second) / 4, rtol=1e-12, atol=1e-12)
    assert position == (36 if weight == "function" else 24)


def test_shares() -> None:
    assert [share_of([0.1] * 7, i) for i in range(7)] == [1.0] * 7  # exactly, so that equal weights change no bit
    assert [share_of([1.0, 3.0], i) for i in (0, 1)] == [0.5, 1.5]
    assert [share_of([0.0, 3.0], i) for i in (0, 1)] == [0.0, 2.0]


def test_a_faster_worker_does_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rank: int) -> list[int]:
        worker, at, now = joined(every=12, settings={"weight": "steps"}), list[int](), 0.0
        while worker.local.rounds < 3:
            now += 3.0 if rank else 1.0
            worker.local._workers._resumed = 0.0
            monkeypatch.setattr("packsaddle.local.elastic.workers.time.monotonic", lambda now=now: now)
            worker.train(1)
            if worker.local.exchanging:
                at.append(worker.local.steps)
                now = 0.0
        return at

    assert simulate(run, 2) == [[12, 30, 48], [12, 18, 24]]  # as with a fixed set of workers 24 together


def test_weights_that_fall_are_refused() -> None:
    worker = joined(settings={"weight": lambda: -1.0})
    with pytest.raises(ConfigError, match=r"weight must return a total that is finite and does not fall, got -1 more"):
        worker.train(3)


# ---- invalid updates, flushes and leaving


def test_an_invalid_update_is_rejected_by_all() -> None:
    def run(rank: int) -> Worker:
        worker = joined()
        worker.train(5)
        if rank:
            worker.parameters[0].data[0, 0] = float("nan")
        worker.train(1)
        return worker

    first, second = simulate(run, 2)
    assert [skip.workers for skip in first.local.skips] == [skip.workers for skip in second.local.skips] == [(1,)]
    assert first.anchor().isfinite().all()
    assert first.local.position == 6  # the steps of the round before, of both workers


@pytest.mark.parametrize("end", ["flush", "leave"])
@pytest.mark.parametrize("compressor", [Identity(), TopK(0.25)], ids=str)
@pytest.mark.parametrize("steps", [3, 4, 7])
def test_all_that_is_pending_is_sent_at_the_end(compressor: Compressor, steps: int, end: str) -> None:
    """Also that of fragments that are not due: right after a round of one, with no error memory that would tell."""

    def run(rank: int) -> Worker:
        worker = joined(every=2, fragments=2, compressor=Compression(compressor, dense_below=0))
        worker.train(steps)
        assert getattr(worker.local, end)()
        assert torch.equal(worker.x(), worker.anchor())
        return worker

    check_nothing_is_lost(simulate(run, 2), pending=False)


def test_one_leaves_in_a_round_of_all_that_is_pending() -> None:
    def run(rank: int) -> Worker:
        worker = joined()
        worker.train(5)
        if rank:
            worker.local.leave()
        else:
            worker.train(1)  # the next round, which the other has asked to be dense
        return worker

    check_nothing_is_lost(simulate(run, 2), pending=False)


@pytest.mark.parametrize("leaves", [False, True])
def test_it_is_logged_who_has_left_and_who_is_lost(leaves: bool, caplog: pytest.LogCaptureFixture) -> None:
    def run(rank: int) -> int:
        worker = joined()
        worker.train(5)
        if rank and leaves:
            worker.local.leave()
        else:
            worker.train(1)
        if not rank:
            worker.manager.group = Solo()
            worker.train(3)
        return membership(worker).worker

    with caplog.at_level("INFO", "packsaddle"):
        name = simulate(run, 2)[1]
    found = {
        r.levelname: r.getMessage() for r in caplog.records if f"{name:x}" in r.getMessage() and "join" not in r.msg
    }
    if leaves:
        assert found == {"INFO": f"worker {name:x} has left after 2 rounds"}
    else:
        assert list(found) == ["WARNING"]
        assert f"worker {name:x} is gone after 2 rounds, and its updates since" in found["WARNING"]


@pytest.mark.parametrize("compressor", [Sign(), Identity()], ids=repr)
def test_a_second_flush_sends_nothing(compressor: Compressor) -> None:
    def run(rank: int) -> tuple[int, int, int]:
        worker = joined(compressor=Compression(compressor, dense_below=0))
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

    def run(rank: int) -> Worker:
        worker = joined(compressor=Compression(Sign(), dense_below=0))
        if rank < 2:
            worker.train(6)
        else:
            for _ in range(2):
                worker.local._workers.round(uncompressed=False)
        assert worker.local.flush()
        return worker

    *both, newcomer = simulate(run, 3)
    check_nothing_is_lost(both, pending=False)
    assert torch.equal(newcomer.anchor(), both[0].anchor())


@pytest.mark.usefixtures("clock")
def test_a_worker_with_frozen_parameters_leaves() -> None:
    """Nothing of theirs can be sent, so one round is enough, and it does not wait for the end of its grace."""

    def run(rank: int) -> tuple[bool, int]:
        worker = joined()
        worker.train(7)
        worker.parameters[0].requires_grad_(False)
        for _ in range(6):
            worker.gradients()
            worker.parameters[0].grad = None
            worker.optimizer.step()
        before = worker.manager.votes
        return worker.local.leave(), worker.manager.votes - before

    assert simulate(run, 2) == [(True, 1)] * 2


def test_a_checkpoint_of_what_has_been_sent_since_is_not_sent_again() -> None:
    """If others have gone on with this worker after it was saved, its memory is cleared. If without it, it is kept."""
    for gone_on in (True, False):
        worker, back = joined(), Worker()
        worker.train(8)
        saved, x, pending = worker.local.state_dict(), worker.x(), worker.local.pending()
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
        expected = torch.zeros_like(pending) if gone_on else pending
        torch.testing.assert_close(back.local.pending(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [(1, 0, 2), (1, 1, 1)])
def test_the_owners_of_a_round_are_the_workers_with_an_update(weights: tuple[int, ...]) -> None:
    """Chunks are divided again: also one that has only joined, which keeps no residual, receives the mean."""

    def run(rank: int) -> tuple[Worker, slice]:
        worker = joined(compressor=Compression(TopK(0.25), "two-way", dense_below=0))
        pace(worker, 10)
        worker.train(weights[rank])
        assert worker.local._workers.round(uncompressed=False)
        return worker, worker.local._fragments[0].feedback.owned

    found = simulate(run, 3)
    owned = [(part.start, part.stop) for _, part in found]
    assert owned == ([(0, 15), (15, 15), (15, 30)] if 0 in weights else [(0, 10), (10, 20), (20, 30)])
    check_nothing_is_lost([worker for (worker, _), weight in zip(found, weights, strict=True) if weight], pending=True)
    assert all(torch.equal(worker.anchor(), found[0][0].anchor()) for worker, _ in found)


def test_the_exchange_does_not_depend_on_the_number_of_workers() -> None:
    """Which a newcomer would not know."""
    spec = Compression(Sign(), "auto", dense_below=0)
    assert {joined(compressor=spec).local.options.compression.exchange} == {"direct"}


# ---- what is refused


def test_what_is_of_a_manager_alone() -> None:
    static, elastic = Worker(elastic=False).local, Worker().local
    for call in (static.join, static.leave):
        with pytest.raises(RuntimeError, match="is for workers that come and go"):
            call()
    with pytest.raises(RuntimeError, match=r"with a manager, pending\(\)"):
        elastic.error()
    assert static.position == 0


def test_times_are_kept_in_seconds() -> None:
    elastic = Elastic(FakeManager(Solo()), patience="2min", grace="500ms")
    assert (elastic.patience, elastic.grace) == (120.0, 0.5)


def message(call: Callable[[], object]) -> str:
    """Return the error of a worker that is refused, or loses the others; empty: there is none."""
    try:
        call()
    except (ConfigError, PeerLostError) as error:
        return str(error)
    return ""


def test_a_worker_that_starts_elsewhere_is_told() -> None:
    def run(rank: int) -> None:
        worker = Worker(resolve(None))
        worker.parameters[0].data.add_(float(rank))
        worker.local.join()

    with pytest.raises(ConfigError, match="workers must begin at the same parameters"):
        simulate(run, 2)


@pytest.mark.parametrize("odd", [0, 2])
def test_only_a_worker_whose_anchor_differs_loads_another(odd: int) -> None:
    """Its own is damaged after a round. The others, which are the most, keep theirs, and the round is made again."""

    def run(rank: int) -> tuple[list[int], Worker]:
        worker, steps = joined(), list[int]()
        worker.train(3)
        if rank == 1:
            states.append(worker.manager.save())
        if rank == odd:
            worker.local._fragments[0].anchor.flat[5] += 1.0

        def quorum() -> None:
            steps.append(worker.manager.step)
            if not worker.manager.step:
                worker.manager.load(states[0])
                worker.manager.step = 2

        worker.manager.before_quorum = quorum
        worker.train(3)
        return steps, worker

    states: list[Any] = []
    found = simulate(run, 3)
    assert [steps for steps, _ in found] == [[2, 0 if rank == odd else 2] for rank in range(3)]
    assert all(torch.equal(worker.anchor(), found[1][1].anchor()) for _, worker in found)


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
        optimizer, manager = torch.optim.SGD(model["trained"].parameters(), lr=0.1), FakeManager(resolve(None))
        workers = Elastic(manager, group=FakeGroup(manager), leave_on_sigterm=False, patience=0.5)
        local = LocalUpdates(optimizer, workers=workers, model=model, compressor=Identity())

        def call() -> None:
            local.join()
            if changed:
                model["fixed"].weight.data.add_(1.0)
                local._workers.member.has_joined = rank != 2  # as if worker 2 joined only now
                assert local._workers.round(uncompressed=True)  # type: ignore[union-attr]
                local._workers.member.has_joined = True
                assert local.flush()

        return message(call)

    said = simulate(run, 3)
    if changed:
        assert said == [""] * 3
        return
    assert "given the same arguments, but worker" in said[2]
    assert "has checksum of fixed.weight=" in said[2]
    assert all("no round was completed" in each for each in said[:2])


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("rank", "one", "others", "line"),
    [
        (0, {"every": 4}, {}, "has every=4 and the others have every=3"),
        (2, {"outer": nesterov}, {}, r"has outer=\('SGD', {'lr': 0\.7, .*}\) and the others have outer=None"),
        (2, {"decay": 0.5, "seed": 1}, {"decay": 0.75}, r"has decay=0\.5 and the others have decay=0\.75"),
    ],
)
def test_a_worker_with_other_arguments_is_told_which(
    rank: int, one: dict[str, Any], others: dict[str, Any], line: str
) -> None:
    """The one of three that differs; the others repeat the round, until their patience ends."""

    def run(mine: int) -> str:
        return message(lambda: joined(settings={"patience": 0.5}, **(one if mine == rank else others)))

    said = simulate(run, 3)
    found = re.fullmatch(f"workers must be given the same arguments, but (worker [0-9a-f]+) {line}", said.pop(rank))
    assert found is not None
    reason = f"no round was completed in .*: workers must be given the same arguments, but {found[1]} has "
    assert all(re.match(reason, other) for other in said)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_whose_schedule_differs_is_told_before_it_sends(rank: int) -> None:
    """The functions have one name, so that only the messages of the second round differ."""

    def run(mine: int) -> tuple[str, int, int]:
        def schedule(t: int) -> Any:
            return TopK(0.5 if mine == rank and t == 1 else 0.25)

        spec = Compression(schedule, exchange="direct", dense_below=0)
        worker = joined(settings={"patience": 0.5}, compressor=spec)
        return message(lambda: worker.train(30)), worker.local.rounds, membership(worker).worker

    found = simulate(run, 3)
    line = f"workers must send messages of one kind, but worker {found[rank][2]:x} has compressor="
    sides = r"TopK\(.*0\.5.*\) and the others have compressor=TopK\(.*0\.25"
    assert re.match(re.escape(line) + sides, found[rank][0])
    others = [text for worker, (text, *_) in enumerate(found) if worker != rank]
    assert all(re.match(r"no round was completed in .*: " + re.escape(line), text) for text in others)
    assert [rounds for _, rounds, _ in found] == [1, 1, 1]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("has_joined", [True, False])
def test_two_workers_with_one_checkpoint_are_refused(has_joined: bool) -> None:
    """They would send one memory twice, and count as one worker. The worker that trains already is not refused."""
    saved = joined()
    saved.train(8)

    def run(rank: int) -> str:
        worker = Worker(resolve(None), settings={"patience": 0.5})
        worker.local.load_state_dict(saved.local.state_dict())
        membership(worker).has_joined = trains = has_joined and rank == 0
        return message(lambda: worker.train(1) if trains else worker.local.join())

    line = f"another worker has loaded the checkpoint of worker {membership(saved).worker:x}"
    found = simulate(run, 2)
    assert found[1].startswith(line)
    assert found[0].startswith("no round was completed" if has_joined else line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"fragments": 2}, "fragments is 2 here, but the state was saved with fragments 1"),
        ({"outer": nesterov}, "outer is True here, but the state was saved with outer False"),
    ],
)
def test_a_newcomer_with_other_arguments_is_told_which(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        of_state(joined().manager.save, **arguments)


@pytest.mark.usefixtures("clock")
def test_patience_ends() -> None:
    worker = Worker(refused=range(10**6), settings={"patience": "2500ms"})
    with pytest.raises(PeerLostError, match=r"no round was completed in 2\.5 s"):
        worker.local.join()
    assert worker.manager.votes == 3


def test_without_torchft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchft", None)
    monkeypatch.setitem(sys.modules, "torchft.process_group", None)
    line = r"needs torchft: pip install 'packsaddle\[torchft\]'"
    with pytest.raises(MissingExtraError, match=line):
        connect("http://localhost:1")
    with pytest.raises(MissingExtraError, match=line):
        LocalUpdates(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]), workers=FakeManager(Solo()))


@pytest.mark.parametrize("address", ["localhost:29510", "http://localhost", "https://a:1", "http://[a:1", "http://a:b"])
def test_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", address)
    with pytest.raises(ConfigError, match="the lighthouse must be http://HOST:PORT, got"):
        lighthouse_address()
