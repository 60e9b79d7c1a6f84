"""Local updates of workers that come and go: the rounds that a torchft Manager commits, and who is in them.

A round of local updates is a transaction of `error_feedback` anyway. Here it is tried by those that are in torchft's
quorum, and the vote decides:

    quorum     who is there; a worker that is behind gets the state of one that is not (`_recover`)
    hello      who they are, and whether they agree: one all-gather of some numbers
    exchange   C(share v) of the fragment whose turn it is, averaged; share = W w_i / sum_j w_j, 1 without weights
    confirm    an all-gather, which ends on one worker only if all have what was exchanged
    vote       Manager.should_commit: all is taken, or all is as before and tried again with whoever is left

A worker whose confirmation fails does not know whether another has committed the round. It keeps what it tried until
the next quorum: if others are ahead, their state says which of this worker's attempts is in the anchor, and what was
tried is taken or forgotten accordingly. So nothing is applied twice, and nothing is dropped.

A worker's first round is one in which it only listens (w_i = 0), as is any of one that has not moved.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.failures import PeerLostError
from packsaddle.comm.managed import ManagedGroup
from packsaddle.errors import ConfigError, GuardError
from packsaddle.numerics.seeds import mix
from packsaddle.optim.account import Account
from packsaddle.optim.fragment import Fragment
from packsaddle.optim.local_options import Elastic
from packsaddle.optim.memory_file import MemoryFile, OwnFile
from packsaddle.optim.participation import share
from packsaddle.optim.roster import Hello, Roster, most
from packsaddle.optim.shared_state import check_shared, shared_state, take_anchor, take_inner
from packsaddle.optim.sigterm import LeavingError, Sigterm, end_process
from packsaddle.optim.stages.drift import fingerprint

_log = logging.getLogger("packsaddle")
_PAUSE = 0.05  # seconds between two attempts at a round


@dataclass(frozen=True)
class Attempt:
    """A round that has been exchanged, and waits for the vote."""

    hellos: Sequence[Hello]  # by rank
    weights: Sequence[float]  # by rank
    norms: Sequence[float]  # by rank, of the memories afterwards
    parts: Sequence[Fragment]  # with their flights


class RoundFailedError(RuntimeError):
    """A round could not be tried to its end, and is tried again."""


class Membership:
    """This worker's part in the rounds of a Manager.

    `send(part, dense, share)` makes a fragment's flight, exchanges it, and returns ||v||^2; `land(part)` ends one that
    was committed. Both are `LocalUpdates`'s. `arguments` is the text of all that workers must have been given alike.

    >>> local = packsaddle.LocalUpdates(optimizer, workers=manager)  # doctest: +SKIP
    >>> local.join()  # doctest: +SKIP
    >>> local.membership.workers, local.membership.lost  # doctest: +SKIP
    """

    def __init__(
        self,
        settings: Elastic,
        channel: Communicator,
        fragments: Sequence[Fragment],
        inner: Optimizer,
        outer: Optimizer | None,
        *,
        every: int,
        compare_every: int,
        arguments: str,
        send: Callable[[Fragment, bool, float], float],
        land: Callable[[Fragment], bool],
    ) -> None:
        assert isinstance(channel.group, ManagedGroup)
        self.settings, self._channel, self._group = settings, channel, channel.group
        self._fragments, self._send, self._land = fragments, send, land
        self._inner, self._outer = inner, outer
        self._arguments, self._arguments_hash = arguments, mix(*arguments.encode()) >> 1
        self._compare_every = compare_every
        self._file = None if settings.memory_file is None else OwnFile(Path(settings.memory_file))
        self._device = fragments[0].anchor.flat.device
        self.period = max(1, every // len(fragments))  # inner steps of the fastest worker between two rounds

        # Of this worker.
        self.worker = _new_name()
        self.joined = False
        self.exchanged = False  # whether there was a round after the last inner step
        self.steps = 0  # inner ones; of a worker that has just come, those of the one that it has its state from
        self.account = Account()
        self._target = self.period  # inner steps from one round to the next
        self._resumed = time.monotonic()  # when the last round ended
        self._energy = 0.0  # of what it has tried to send: ||v||^2
        self._doubt: Sequence[Fragment] = ()  # whose flights may have been committed by others
        self._handed = False  # on SIGTERM, before the end of this worker's part: nothing is left to hand over
        self._sends_all = False  # on the way out, and the memory is not in a file: the next round is the last

        self.roster = Roster()  # the same on all workers, after a round
        settings.manager.register_state_dict_fn("packsaddle", self._recover, self._shared)
        self._sigterm = Sigterm(self._may_leave, settings.grace)
        if settings.leave_on_sigterm:
            self._sigterm.listen()

    @property
    def workers(self) -> int:
        """The number of workers in the last round."""
        return sum(member.here for member in self.roster.members.values())

    @property
    def lost(self) -> float:
        """The sum of the norms of lost memories."""
        return self.roster.gone + self.roster.absent(keeps=False)

    @property
    def waiting(self) -> float:
        """The sum of the norms of memories that wait in files of absent workers."""
        return self.roster.absent(keeps=True)

    # Rounds.

    def join(self) -> None:
        """Take part in a round without an update of one's own, and have the others' state after it."""
        self.round(dense=False)
        self.account.ahead = self.account.since  # what a worker that was restored had done of its next round
        self._take_up()
        _log.info("worker %x joins at round %d, with %d others", self.worker, self._rounds, self.workers - 1)

    def stepped(self, steps: int) -> None:
        """Count an inner step, which makes `steps`, and do what is due: leave if asked to, else a round."""
        self.steps, self.exchanged = steps, False
        self.account.step()
        if self._sigterm.asked:
            self._exit()
        if self.account.ahead >= self._target:
            self.round(dense=False)

    def round(self, *, dense: bool, patience: float | None = None) -> bool:
        """Try a round until it is committed; whether all of it was taken. `dense`: all that is pending is sent.

        Raises PeerLostError if it does not come about in `patience` seconds, and ConfigError if this worker does not
        fit the others.
        """
        arrived, until = time.monotonic(), self.settings.patience if patience is None else patience
        ahead = self.account.ahead
        seconds = (arrived - self._resumed) / ahead if ahead else 0.0
        while True:
            reason = ""
            try:
                taken = self._once(dense, seconds)
            except LeavingError:
                self._exit()
            except RoundFailedError as error:
                taken, reason = None, str(error)
            except BaseException:
                self._forget()
                raise
            if taken is not None:
                self._resumed, self.account.ahead, self.exchanged = time.monotonic(), 0, True
                if self._sigterm.asked and self._sends_all:
                    self._exit()
                return taken
            if time.monotonic() - arrived > until:
                self._forget()
                why = f": {' '.join(reason.split())[:200]}" if reason else ""
                raise PeerLostError(f"no round has come about in {until:g} s{why}")
            if self._sigterm.asked and not self._sends_all:
                self._exit()
            time.sleep(_PAUSE)

    def _once(self, dense: bool, seconds: float) -> bool | None:
        """Try a round; whether it was taken, None if it was not committed."""
        self._quorum()
        self._settle_doubt(committed=False)  # others that are ahead have said otherwise in `_recover`
        manager = self.settings.manager
        attempt, reason = None, ""
        if manager.errored() is None:
            try:
                attempt = self._try(dense, seconds)
            except (ConfigError, LeavingError):
                self._break()
                raise
            except (RuntimeError, AssertionError) as error:  # of torch's backends, and of groups that are not there
                reason = str(error)
                manager.report_error(error)
                self._break()
        if not manager.should_commit():
            if not self._doubt:
                self._forget()
            if attempt is None:
                raise RoundFailedError(reason or str(manager.errored()))
            return None
        assert attempt is not None
        return self._commit(attempt)

    def _quorum(self) -> None:
        """Wait for others; a worker that is behind has the others' state afterwards."""
        manager = self.settings.manager
        with self._sigterm.waiting():
            try:
                manager.start_quorum(timeout=timedelta(seconds=self._sigterm.left) if self._sends_all else None)
            except (ConfigError, LeavingError):
                raise
            except Exception as error:  # torchft's own are of several types
                # torchft 0.2.0 would raise it again at every later quorum.
                manager._quorum_future = None
                raise RoundFailedError(str(error)) from error

    def _break(self) -> None:
        """Let the others know at once: what they wait for in a collective will not come."""
        with suppress(RuntimeError):
            self._group.abort()

    def _try(self, dense: bool, seconds: float) -> Attempt:
        """Exchange a round with those that are there."""
        self._group.renew()
        self._channel.step = max(0, self.steps - 1)
        self.account.attempts += 1
        mine = self._hello(dense, seconds)
        hellos = self._greet(mine)
        self._check(hellos, mine)
        dense = any(hello.dense for hello in hellos)
        weights = [h.weight or h.idle_weight if dense else h.weight for h in hellos]
        parts = list(self._fragments) if dense else [self._fragments[self._rounds % len(self._fragments)]]
        if not any(weights):
            parts = []
        self._energy = sum(self._send(part, dense, share(weights, self._group.rank)) for part in parts)
        norm = torch.tensor([self._norm_after()], dtype=torch.float64, device=self._device)
        self._doubt = parts
        confirmed = self._channel.gather({"norm": norm}, fixed_size=True, purpose="members")
        return Attempt(hellos, weights, [float(c["norm"][0]) for c in confirmed], parts)

    def _hello(self, dense: bool, seconds: float) -> Hello:
        compared = self._compare_every > 0 and self._rounds % self._compare_every == 0
        return Hello(
            worker=self.worker,
            arguments=self._arguments_hash,
            history=self.roster.history,
            anchor=self._fingerprint() if compared else 0,
            run=self.roster.run,
            attempt=self.account.attempts,
            steps=self.account.since,
            dense=int(dense or self._sends_all),
            keeps=int(self._keeps),
            weight=self._weight() if self.joined else 0.0,
            idle_weight=self.account.last_weight if self.account.norm or self._has_more() else 0.0,
            seconds=seconds,
            lost=self.account.found_lost,
        )

    def _has_more(self) -> bool:
        """Tell if fragments whose turn has not come have moved, where there was no step since the last round."""
        waiting = self.joined and not self.account.since and len(self._fragments) > 1
        return waiting and any(bool(part.unapplied().any()) for part in self._fragments)

    def _greet(self, mine: Hello) -> list[Hello]:
        gathered = self._channel.gather({"hello": mine.packed(self._device)}, fixed_size=True, purpose="members")
        return [Hello.unpacked(parts["hello"]) for parts in gathered]

    def _weight(self) -> float:
        return self.account.weight(self.settings.weight)

    def _check(self, hellos: Sequence[Hello], mine: Hello) -> None:
        """See that workers have the same arguments and anchors: what most have, else what the first has."""
        if len({h.arguments for h in hellos}) > 1:
            self._compare_arguments(hellos, mine)
        where = [(h.history, h.anchor) for h in hellos]
        if len(set(where)) == 1:
            return
        if not self.roster.past:
            raise ConfigError("workers must begin at the same parameters: a Manager with init_sync=True sees to it")
        if (mine.history, mine.anchor) != most(where):
            _log.warning("worker %x has an anchor of its own, and takes that of the others", self.worker)
            self.settings.manager.load_state_dict({"step": 0, "batches_committed": 0})  # so it is behind
        raise RoundFailedError("workers have different anchors")

    def _compare_arguments(self, hellos: Sequence[Hello], mine: Hello) -> NoReturn:
        """Raise ConfigError, naming the first argument that differs, on workers whose arguments are not the usual."""
        texts = self._channel.gather_text(self._arguments, self._device, "members")
        usual = most([h.arguments for h in hellos])
        if mine.arguments == usual:
            raise RoundFailedError("a worker was given other arguments")
        theirs = texts[[h.arguments for h in hellos].index(usual)]
        lines = zip_longest(self._arguments.split("\n"), theirs.split("\n"), fillvalue="nothing more")
        here, there = next(pair for pair in lines if pair[0] != pair[1])
        raise ConfigError(
            f"workers must be given the same arguments, but this one has {here} and the others have {there}"
        )

    def _norm_after(self) -> float:
        """Return the norm of this worker's memory if the round is committed."""
        squares = 0.0
        for part in self._fragments:
            flight = part.flight
            e = flight.v if flight is not None and flight.share else part.feedback.memory.vector
            squares += _energy(e)
        return math.sqrt(squares)

    def _commit(self, attempt: Attempt) -> bool:
        """Take a round that has been voted for."""
        taken = self._settle_doubt(committed=True)
        self._tell(attempt)
        self.roster.commit(attempt.hellos, attempt.weights, attempt.norms, taken=taken)
        mine, weight = attempt.hellos[self._group.rank], attempt.weights[self._group.rank]
        own = self.account
        own.found_lost -= mine.lost
        kept = sum(_energy(part.feedback.memory.vector) for part in attempt.parts)
        own.norm = self.roster.members[self.worker].norm
        self.joined = True
        if weight:
            own.included, own.sent = mine.attempt, math.sqrt(max(0.0, self._energy - kept))
            if taken:
                own.start_count(mine.weight)
        self._set_pace(attempt.hellos, mine)
        landed = [self._land(part) for part in attempt.parts]
        self._save()
        return all(landed)

    def _tell(self, attempt: Attempt) -> None:
        """Say on one of the workers who is not here any more, and what becomes of its memory."""
        for worker, member in self.roster.missed(attempt.hellos).items():
            if self._group.rank == 0 and member.norm:
                fate = "waits in its file" if member.keeps else "is lost"
                _log.warning(
                    "worker %x is gone after %d rounds: its error memory, of norm %.3g, %s",
                    *(worker, self._rounds, member.norm, fate),
                )

    def _set_pace(self, hellos: Sequence[Hello], mine: Hello) -> None:
        """Have a slower worker do fewer steps before the next round, so that the others need not wait for it."""
        if self.settings.weight is None or not mine.seconds:
            return
        fastest = min(h.seconds for h in hellos if h.seconds)
        self._target = max(1, min(self.period, round(self.period * fastest / mine.seconds)))

    def _settle_doubt(self, *, committed: bool) -> bool:
        """Take what was tried, or forget it; whether it was taken by all."""
        parts, self._doubt = self._doubt, ()
        if not committed:
            for part in parts:
                part.forget()
            return False
        flights = [(part, part.flight) for part in parts if part.flight is not None]
        taken = [part.finish(flight) for part, flight in flights]  # each of them
        return all(taken)

    def _forget(self) -> None:
        """Be as before the round that was tried."""
        self._doubt = ()
        for part in self._fragments:
            part.forget()

    @property
    def _rounds(self) -> int:
        return sum(part.rounds for part in self._fragments)

    def _fingerprint(self) -> int:
        return int(torch.stack([fingerprint(part.anchor.flat) for part in self._fragments]).sum())

    # Those that come.

    def _shared(self) -> dict[str, Any]:
        """Return what is the same on all workers, for one that is behind."""
        inner = self._inner if self.settings.share_optimizer_state else None
        return shared_state(self.steps, self._fragments, self._outer, inner, self.roster)

    @torch.no_grad()
    def _recover(self, state: Mapping[str, Any]) -> None:
        """Take the state of a worker that is ahead.

        What this worker has moved and not sent stays: x moves with the anchor. One that has never been in a round
        begins at the anchor, and so does one that was restored to what it has sent since.
        """
        self._sigterm.hold()  # SIGTERM waits until this is done
        check_shared(state, self._fragments, self._outer)
        own = self.account
        included = state["taken"].get(self.worker, 0)
        had = bool(self._doubt) and included == own.attempts
        was = [(part, [s.to(x, copy=True) for s, x in zip(part.starts(), part.tensors(), strict=True)])
               for part in self._fragments]  # fmt: skip
        sent = {part for part in self._doubt if had}
        taken = self._settle_doubt(committed=had)
        if had:
            own.included = own.attempts
        stale = included > own.included
        if stale:
            own.found_lost += own.norm
            _log.warning("worker %x has an older memory than it has sent since, of norm %.3g", self.worker, own.norm)
            for part in self._fragments:
                part.feedback.reset()
            own.start_count(self._weight())
        elif self.roster.past and self.roster.history not in (*state["past"], state["history"]):
            own.found_lost += own.sent
            _log.warning(
                "worker %x was in a round that the others do not have: what it sent, of norm %.3g, is lost",
                *(self.worker, own.sent),
            )
        for (part, before), saved in zip(was, state["fragments"], strict=True):
            take_anchor(part, saved)
            if (part in sent and taken) or stale or not self.roster.past:
                part.restart()
            else:
                part.follow(before)
        if self._outer is not None:
            self._outer.load_state_dict(state["outer"])
        if had and taken:
            own.start_count(self._weight())
        if not self.roster.past:
            self.steps = state["steps"]
            if state["inner"] is not None and self.settings.share_optimizer_state:
                take_inner(self._inner, state["inner"])
        self.roster.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what all workers know of the rounds, and what this one does of its own, plain types."""
        return self.roster.state_dict() | self.account.state_dict() | {"worker": self.worker}

    def load_state_dict(self, state: Mapping[str, Any], steps: int) -> None:
        """Restore `state`, from `state_dict`, of a worker after this number of inner `steps`."""
        self.roster.load_state_dict(state)
        self.account = Account.of(state)
        self.worker, self.steps = state["worker"], steps

    # Memories on disk, and those that go.

    def _take_up(self) -> None:
        """Continue with the memory in this worker's file, if it has not been sent since it was written."""
        if self._file is None:
            return
        shapes = {place.name: place.parameter.shape for part in self._fragments for place in part.places}
        found, lost = self._file.claim(shapes, self.roster)
        self.account.found_lost += lost
        if found is not None:
            self.worker = found.worker
            self.account.attempts = self.account.included = found.attempt
            for part in self._fragments:
                for place, view in part.named(part.feedback.memory.vector):
                    view.copy_(found.pending[place.name])
                part.restart()
            self.account.norm = self._norm_after()
            _log.info(
                "worker %x continues with its memory in %s, of norm %.3g",
                *(self.worker, self._file.path, self.account.norm),
            )
        if not self._keeps:
            self._save()  # now, so that the others are told the truth about this file

    def pending(self) -> dict[str, Tensor]:
        """Return what this worker has moved and not sent, by parameter and shaped as it."""
        return {place.name: view for part in self._fragments for place, view in part.named(part.unapplied())}

    @property
    def _keeps(self) -> bool:
        """True if this worker's file has its memory as it was after its last round."""
        return self._file is not None and self._file.holds(self.account.included)

    def _save(self) -> bool:
        """Write the memory to this worker's file; return False if it has none or that is impossible."""
        if self._file is None:
            return False
        return self._file.save(MemoryFile(self.roster.run, self.worker, self.account.included, self.pending()))

    def _may_leave(self) -> bool:
        """On SIGTERM hand the memory over to the file; return False if the next round must have it."""
        if not self._sends_all:
            self._handed = self._save() or not self._has_pending()
            self._sends_all = not self._handed
        return self._handed

    def leave(self) -> bool:
        """Hand the memory over, to the file or else with one more round, and end this worker's part.

        The round must come about in `grace` seconds. Returns False, with an error in the log, if something is lost.
        """
        handed = self._handed or self._save() or self._send_all()
        self._forget()
        if self._file is not None:
            self._file.close()
        self.settings.manager.shutdown(wait=False)
        return handed

    def _send_all(self) -> bool:
        """Send all that is pending in one more round, uncompressed; return False if it is lost."""
        self._sends_all = True
        until, reason = time.monotonic() + self._sigterm.left, "its grace is over"
        while self._has_pending() and (left := until - time.monotonic()) > 0:
            try:
                if not self.round(dense=True, patience=left):
                    reason = "the last round was not taken"
            except (PeerLostError, ConfigError, GuardError) as error:
                reason = str(error)
                break
        if not self._has_pending():
            if self._file is not None:
                self._file.remove()
            return True
        self._count_lost(reason)
        return False

    def _has_pending(self) -> bool:
        return self.joined and any(bool(part.unapplied().any()) for part in self._fragments)

    def _count_lost(self, reason: str) -> None:
        """Count the memory as lost, unless its file has it from before the last inner steps."""
        own, kept = self.account, self._keeps
        self.roster.gone += 0.0 if kept else own.norm
        memory = "waits in its file" if kept else "is lost"
        _log.error(
            "worker %x leaves: its error memory, of norm %.3g, %s, and its last %d inner steps are lost: %s",
            *(self.worker, own.norm, memory, own.since, reason),
        )

    def _exit(self) -> NoReturn:
        """Leave, and end the process, with code 1 if something is lost."""
        end_process(0 if self.leave() else 1)


def _new_name() -> int:
    return int.from_bytes(os.urandom(8), "little") >> 1


def _energy(vector: Tensor) -> float:
    return float(vector.double().square().sum())
