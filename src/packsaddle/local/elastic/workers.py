"""Rounds of local updates with workers that join and leave: a torchft Manager commits or rolls back each round.

The workers of torchft's quorum exchange their updates v of one fragment (parameters exchanged together) in five steps:

    quorum     the set of workers is fixed; a worker that is behind loads the state of another one (`_recover`)
    hello      one all-gather of each worker's name, weight, and hashes of arguments, anchor and message
    exchange   the mean of the compressed, weighted v; fragments alternate; weights are W w_i / sum_j w_j, 1 by default
    confirm    an all-gather, which completes on a worker only if all workers have completed the exchange
    vote       Manager.should_commit: all commit, or all roll back and repeat the round with the remaining workers

A worker whose confirmation fails cannot determine whether another worker has committed the round. It keeps the exchange
until the next quorum. If others are ahead, the state that it receives contains its last attempt included in the anchor,
by which the exchange is committed or rolled back. So no update is applied twice, and none is lost.

A worker only receives (w_i = 0) in its first round, and in rounds before which it has not stepped, unless all pending
updates are sent.

A worker may be a site of several processes. Each process runs these steps with its peers in the other sites, and after
each step they agree whether it failed on one of them (`fail_together`); the vote is torchft's, of all of them. All that
decides about a round is equal on the processes of a site: its name, weights, hashes, times and signals are combined.
"""

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, ObjectCollectives, as_text, check_agreement, hash_of
from packsaddle.comm.failures import PeerLostError
from packsaddle.comm.group import Group, Solo
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.managed import ManagedGroup
from packsaddle.comm.sharding import is_split, local_part
from packsaddle.comm.sites import SiteGroup, fail_together
from packsaddle.compressors import Compressor, Identity
from packsaddle.errors import ConfigError, GuardError
from packsaddle.feedback.checks import fingerprint
from packsaddle.feedback.optimizers import load_states, local_state
from packsaddle.feedback.state import Rule, State, Value, Vector, attribute, skip
from packsaddle.local.after import Reactions
from packsaddle.local.clipping import Standing
from packsaddle.local.elastic.memory_file import MemoryFile, OwnFile
from packsaddle.local.elastic.roster import Account, Hello, Roster, most
from packsaddle.local.elastic.sigterm import LeavingError, Sigterm, end_process
from packsaddle.local.fragment import Fragment, by_parameter
from packsaddle.local.lockstep import Lockstep
from packsaddle.local.options import Elastic, LocalOptions
from packsaddle.local.outer import OuterOptimizer
from packsaddle.local.pace import paces
from packsaddle.local.participation import share
from packsaddle.local.round import LocalRound
from packsaddle.local.schedule import Schedule
from packsaddle.numerics.devices import wide, widened

_log = logging.getLogger("packsaddle")
_PAUSE = 0.05  # seconds between two attempts at a round


@dataclass(frozen=True)
class Attempt:
    """One attempt at a round, in which all workers have exchanged their updates, but not committed them yet."""

    hellos: Sequence[Hello]  # the messages with which the workers started the round, by rank
    weights: Sequence[float]  # weights w_i of the workers in the mean, by rank
    norms: Sequence[float]  # norm that each worker's error memory has if the round is committed, by rank
    parts: Sequence[Fragment]  # the exchanged fragments


class RoundFailedError(RuntimeError):
    """An attempt at a round was not committed; `ElasticWorkers.round` repeats the round. The message is empty if the
    workers voted against it."""


class ElasticWorkers:
    """Runs this worker's rounds in a run whose workers join and leave, coordinated by a torchft Manager.

    Args:
        options: options of the local updates.
        channel: the communicator of the workers. Its group is a `ManagedGroup`, or a `SiteGroup` that contains one.
        within: the processes of this site; None: this worker is one process.
        fragments: the fragments of the model.
        schedule: the steps after which a fragment is exchanged.
        inner: the optimizers of the parameters.
        outer: the outer optimizer of the anchor, or None.
    """

    lockstep: Lockstep | None = None  # elastic workers do not make their calls in lockstep

    def __init__(
        self,
        options: LocalOptions,
        channel: Communicator,
        within: Group | None,
        fragments: Sequence[Fragment],
        schedule: Schedule,
        inner: Sequence[Optimizer],
        outer: OuterOptimizer | None,
    ) -> None:
        settings = options.workers
        group = channel.group.peers if isinstance(channel.group, SiteGroup) else channel.group
        assert isinstance(settings, Elastic)
        assert isinstance(group, ManagedGroup)
        self.settings, self.channel, self._group = settings, channel, group
        self._fragments, self._inner, self._outer = fragments, inner, outer
        self._compression, self._schedule = options.compression, schedule
        self._arguments_hash = 0
        self._file = None if settings.memory_file is None else OwnFile(Path(settings.memory_file))
        self._device = fragments[0].anchor.flat.device
        self._site = within or Solo()
        self._objects = ObjectCollectives(self._site, torch.device("cpu"))
        splits = {is_split(p) for part in fragments for p in part.parameters}
        if within is not None and len(splits) > 1:
            raise ValueError("parameters must all be sharded in a site with a manager, or none, and some are not")
        # True if this worker is a site, each of whose processes has the whole model.
        self._has_replicas = within is not None and splits == {False}
        # The state that was received from another worker and is not loaded yet; None: there is none.
        self._received: Mapping[str, Any] | None = None

        # State of this worker.
        # The random name of this worker, identical on all processes of its site.
        self.worker: int = self._objects.send(int.from_bytes(os.urandom(8), "little") >> 1, 0)
        self.has_joined = False
        self._exchanged = False  # True if a round followed the last inner step
        self.steps = 0  # inner steps; a new worker starts at the count of the worker that sent its state
        self.account = Account()
        self.paces = [schedule.period]  # inner steps of this worker from one round to the next
        self._resumed = time.monotonic()  # time at the end of the last round
        self._energy = 0.0  # ||v||^2 in the uncommitted round, where v is local update plus error memory
        self._in_doubt: Sequence[Fragment] = ()  # fragments of a round that other workers may have committed
        self._handed = False  # True after SIGTERM if the error memory is in its file, or is zero
        self._sends_all = False  # True if this worker leaves without a file, so the next round sends all updates

        self.roster = Roster()  # identical on all workers after a round
        same = {"fragments": len(fragments), "outer": outer is not None}
        self._shared_state = State("LocalUpdates", [Rule((), "shared")], lambda: same, self._shared_fields)
        settings.manager.register_state_dict_fn("packsaddle", self._receive, self._shared)
        self._sigterm = Sigterm(self._may_leave, float(settings.grace))
        if settings.leave_on_sigterm:
            self._sigterm.listen()

    def start(
        self,
        reactions: Reactions,
        same: Mapping[str, object],
        parameters: Mapping[str, Tensor],
        untrained: Sequence[tuple[str, Tensor]],
    ) -> None:
        """Set the reactions to the end of a round, and the values that are compared when this worker joins: the
        arguments `same`, and checksums of the frozen parameters."""
        self._reactions = reactions
        frozen = {name: t for name, t in untrained if isinstance(t, torch.nn.Parameter)}

        def arguments() -> str:
            checksums = self._totals(*(int(fingerprint(local_part(t))) for t in frozen.values()))
            named = zip(frozen, checksums, strict=True)
            return as_text({**same, **{f"checksum of {name}": checksum for name, checksum in named}})

        self._arguments = arguments
        keeps = {"memory_file": self._file is not None}
        check_agreement(Communicator(self._site, Ledger()), {**same, **keeps}, torch.device("cpu"), of="process")

    @property
    def workers(self) -> int:
        """The number of workers in the last round."""
        return sum(member.here for member in self.roster.members.values())

    @property
    def lost(self) -> float:
        """The sum of the norms of error memories that workers lost."""
        return self.roster.gone + self.roster.absent(keeps=False)

    @property
    def waiting(self) -> float:
        """The sum of the norms of error memories that absent workers saved in files."""
        return self.roster.absent(keeps=True)

    # Agreement of the processes of a site; collective over them.

    def _totals(self, *numbers: int) -> list[int]:
        """Return integers, each summed over the processes of the site, modulo 2^64."""
        if self._site.size == 1:
            return list(map(int, numbers))
        totals = torch.tensor(numbers, dtype=torch.int64)
        self._site.all_reduce(totals)
        return totals.tolist()

    def _any(self, flag: bool) -> bool:
        """Return True if the flag is True on one of the site's processes."""
        return self._totals(flag)[0] > 0

    def _weight(self) -> float:
        """Return the weight that this worker's update would have in a round now. If the weight is set by a function,
        its values in the processes of this worker's site are summed."""
        rule = self.settings.weight
        return self.account.weight((lambda: sum(self._objects.gather(float(rule())))) if callable(rule) else rule)

    # Rounds.

    def enter(self) -> bool:
        """Join, unless this worker has joined; return True if the other workers' parameters were loaded."""
        if self.has_joined:
            return False
        self.join()
        return True

    def join(self) -> None:
        """Run a round without an update, in which the other workers' state is loaded; then load the memory file.
        Updates in the file that were sent after it was written are not loaded. No-op if this worker has joined."""
        if self.has_joined:
            return
        self.round(uncompressed=False)
        # Count the inner steps since the last round. They are above 0 only if
        # this worker was restored from a checkpoint.
        self.account.ahead = self.account.since
        if self._file is not None:
            self._claim_memory(self._file)
            if not self._keeps:
                # Save before the next round, in which this worker reports that its file is up to date.
                self._save()
        _log.info("worker %x joins at round %d, with %d others", self.worker, self._rounds, self.workers - 1)

    def _claim_memory(self, file: OwnFile) -> None:
        """Continue as the worker to which the memory file belongs: use its name, attempts and error memory, and move
        the parameters to its start point.

        The processes of a site have a file each. A process without an up-to-date file has lost its memory, unless each
        process has the whole model: then all continue with the memory of the first process that has it.
        """
        shapes = {place.name: place.parameter.shape for part in self._fragments for place in part.places}
        found, lost = file.claim(shapes, self.roster)
        of_site = self._objects.gather(None if found is None else [found.worker, lost])
        names = sorted({of[0] for of in of_site if of is not None})
        if len(names) > 1:
            raise ConfigError(f"memory files of a site must be of one worker, and are of {', '.join(map(hex, names))}")
        if not names:
            return
        # Use the memory in this process's file, or that of another process that has the whole model.
        self.worker = names[0]
        error = {} if found is None else found.error
        if found is None and self.worker in self.roster.members:
            lost = self.roster.members[self.worker].norm
        if self._has_replicas:
            losses = [math.inf if of is None else of[1] for of in of_site]
            source = losses.index(min(losses))
            error, lost = self._objects.send(dict(error), source), losses[source]
        self.account.attempts = self.account.included = self.roster.taken.get(self.worker, 0)
        self.account.found_lost += lost
        for part in self._fragments:
            for place, view in part.named(part.feedback.memory.vector):
                if error:
                    view.copy_(error[place.name])
            part.anchor.move_to_start()
        self.account.norm = self._norm_after()
        _log.info("worker %x continues with its memory in %s, of norm %.3g", self.worker, file.path, self.account.norm)

    def after_step(self, steps: int, parameters: Iterable[Tensor], *, has_ended: bool) -> bool:
        """Count an inner step, the `steps`-th; then leave if SIGTERM was received, or run a round if one is due.

        Always returns False, since a worker that has ended its training leaves and runs no more collectives.
        """
        self.steps, self._exchanged = steps, False
        self.account.since += 1
        self.account.ahead += 1
        if self.settings.leave_on_sigterm and self._any(self._sigterm.asked):
            self._exit()
        if self.account.ahead >= self.paces[0]:
            self.round(uncompressed=False)
        return False

    def flush(self, compressor: Compressor | None, steps: int) -> bool:
        """Run an uncompressed round of all present workers. Raises RuntimeError for a compressor."""
        if compressor is not None:
            raise RuntimeError("flush takes a compressor with a fixed set of workers; with a manager, pass none")
        # Join first: a worker that has not stepped may have a memory file with updates to send.
        self.join()
        return self.round(uncompressed=True)

    def round(self, *, uncompressed: bool, patience: float | None = None) -> bool:
        """Run a round, repeating it until it is committed; return True if all of its exchanges were applied.

        With `uncompressed`, all pending updates are sent. Raises PeerLostError if no round is committed in `patience`
        seconds, and ConfigError if this worker's arguments differ from those of the others.
        """
        if not self.has_joined:
            self._arguments_hash = hash_of(self._arguments())
        # Measure the time of an inner step, from which `_commit` chooses the steps of the next round.
        arrived = time.monotonic()
        until = float(self.settings.patience) if patience is None else patience
        ahead = self.account.ahead
        seconds = (arrived - self._resumed) / ahead if ahead else 0.0
        # Repeat the round with the remaining workers until it is committed.
        while True:
            try:
                applied = self._once(uncompressed, seconds)
                break
            except LeavingError:
                # The grace period is over. Other processes of the site may not be in this wait, so a collective with
                # them would hang.
                if self._site.size > 1:
                    end_process(0 if self._save() else 1)
                self._exit()
            except RoundFailedError as error:
                reason = " ".join(str(error).split())[:200]
            except BaseException:
                self._roll_back()
                raise
            if self._any(time.monotonic() - arrived > until):
                self._roll_back()
                raise PeerLostError(f"no round has come about in {until:g} s{f': {reason}' if reason else ''}")
            if self._any(self._sigterm.asked) and not self._sends_all:
                self._exit()
            time.sleep(_PAUSE)
        # A worker that had to send its memory before leaving leaves now.
        self._resumed, self.account.ahead, self._exchanged = time.monotonic(), 0, True
        if self._any(self._sigterm.asked) and self._sends_all:
            self._exit()
        return applied

    def _once(self, dense: bool, seconds: float) -> bool:
        """Attempt a round; return True if it was applied, False if it was rejected. Raises RoundFailedError if it was
        not committed."""
        # Wait until torchft has determined the set of workers; a worker that is behind receives another worker's state.
        manager = self.settings.manager
        try:
            with fail_together(self._site), self._sigterm.waiting():
                manager.start_quorum(timeout=timedelta(seconds=self._sigterm.left) if self._sends_all else None)
        except (ConfigError, PeerLostError):
            self._break()
            raise
        except Exception as error:  # torchft raises errors of several types
            # Clear the future: otherwise torchft 0.2.0 raises the same error again at every later quorum.
            manager._quorum_future = None
            self._discard_received()
            raise RoundFailedError(str(error)) from error
        # After an error, abort the group so that no worker waits for this one in a collective; the commit then fails.
        attempt, reason = None, ""
        try:
            with fail_together(self._site):
                if (failure := manager.errored()) is not None:
                    raise RuntimeError(str(failure))
            self._load_received()
            # Roll back the last round, unless `_recover` has committed it because other workers were ahead.
            self._roll_back()
            attempt = self._try(dense, seconds)
        except (ConfigError, PeerLostError):
            self._break()
            raise
        except (RuntimeError, AssertionError) as error:
            # torch's backends raise these errors, also if there is no process group.
            reason = str(error)
            manager.report_error(error)
            self._discard_received()
            self._break()
        # Vote. If this worker's confirmation failed, other workers may still have committed the round. Its fragments
        # are then in `_in_doubt`, and `_recover` commits it or rolls it back at the next quorum.
        if not manager.should_commit():
            if not self._in_doubt:
                self._roll_back()
            raise RoundFailedError("" if attempt is not None else reason or str(manager.errored()))
        assert attempt is not None
        return self._commit(attempt)

    def _break(self) -> None:
        with suppress(RuntimeError):
            self._group.abort()

    def _try(self, dense: bool, seconds: float) -> Attempt:
        """Exchange the updates of one round with the workers of the quorum; return the attempt, on which the workers
        have not voted yet."""
        self._group.renew()
        self.channel.step = max(0, self.steps - 1)
        self.account.attempts += 1
        # Hello: compare arguments before the first collective whose size depends on them.
        mine = self._hello(dense, seconds)
        with fail_together(self._site):
            gathered = self.channel.gather({"hello": mine.packed(self._device)}, fixed_size=True, purpose="members")
        hellos = [Hello.unpacked(parts["hello"]) for parts in gathered]
        self._check(hellos, mine)
        # Exchange: send one fragment, in rotation. If `dense`, send all fragments. If all weights are 0, send none.
        dense = any(hello.dense for hello in hellos)
        weights, parts = [0.0] * len(hellos), list[Fragment]()
        if any(h.weight or (dense and h.idle_weight and h.has_pending) for h in hellos):
            weights = [h.weight or h.idle_weight if dense else h.weight for h in hellos]
            parts = list(self._fragments) if dense else [self._due]
        self._energy = 0.0
        for part in parts:
            flush = Identity() if dense else None
            r = LocalRound.begin(part, self.steps, share(weights, self._group.rank), flush=flush)
            r.agrees = len({hello.frozen for hello in hellos}) == 1
            self._reactions.outcomes.register(r)
            assert r.exchanged is not None
            self._energy += _energy(r.exchanged.v)
            with fail_together(self._site):
                self._exchange(r, hellos, weights)
        # Confirm: this gather completes only if all workers have exchanged. From here on, other workers may commit.
        self._save(parts)
        norm = torch.tensor([self._norm_after()], dtype=wide(self._device), device=self._device)
        self._in_doubt = parts
        with fail_together(self._site):
            confirmed = self.channel.gather({"norm": norm}, fixed_size=True, purpose="members")
        return Attempt(hellos, weights, [float(c["norm"][0]) for c in confirmed], parts)

    def _exchange(self, r: LocalRound, hellos: Sequence[Hello], weights: Sequence[float]) -> None:
        """Exchange the messages of a round with the other workers, and gather the reports of invalid messages."""
        norms = standings = None
        # Gather the norms of v separately: v depends on the Hello messages, so these cannot contain its norm.
        if r.norm is not None:
            norm_of_all = self.channel.gather({"norm": r.norm}, fixed_size=True, purpose="guard")
            norms, r.workers = torch.cat([n["norm"] for n in norm_of_all]), [f"{h.worker:x}" for h in hellos]
            parts_in = [Standing.COUNTED if weight else Standing.ABSENT for weight in weights]
            standings = torch.tensor(parts_in, device=norms.device)
        r.exchange(self.channel.step, norms, standings)
        r.gather_reports()

    def _hello(self, dense: bool, seconds: float) -> Hello:
        every = self._compression.compare_every
        compared = every > 0 and self._rounds % every == 0
        # A worker that has not joined only receives (weight 0). A worker that has not stepped since its last round has
        # weight 0 too, but it may have an error memory, or unsent updates of fragments that were not in that round. If
        # all pending updates are sent, it counts with `idle_weight`, its last weight. If it has no pending updates, its
        # zeros are averaged with the updates of other workers.
        own = self.account
        has_more = len(self._fragments) > 1 and not own.since and self._has_pending()
        checksum = int(torch.stack([fingerprint(p.anchor.flat) for p in self._fragments]).sum()) if compared else 0
        anchor, nanoseconds, memories, more, missing = self._totals(
            *(checksum, round(1e9 * seconds), own.norm > 0, has_more, not self._keeps)
        )
        idle_weight = own.last_weight if self.has_joined and (own.counted or memories) else 0.0
        return Hello(
            worker=self.worker,
            arguments=self._arguments_hash,
            message=hash_of(self._message()),
            history=self.roster.history,
            anchor=anchor,
            run=self.roster.run,
            attempt=self.account.attempts,
            steps=self.account.since,
            dense=int(dense or self._sends_all),
            keeps=int(not missing),
            has_pending=int(bool(memories or more)),
            frozen=hash_of(as_text({"frozen": [part.frozen_next for part in self._fragments]})),
            weight=self._weight() if self.has_joined else 0.0,
            idle_weight=idle_weight,
            seconds=nanoseconds / 1e9,
            lost=self.account.found_lost,
        )

    def _message(self) -> str:
        """Return a text that identifies the messages of the next compressed round: version, compressor, d and round."""
        part = self._due
        compressor = self._compression.at(part.rounds)
        return as_text({"compressor": compressor, "d": part.d, "round": self._rounds})

    @property
    def _due(self) -> Fragment:
        return self._fragments[self._schedule.in_rotation(self._rounds)]

    def _check(self, hellos: Sequence[Hello], mine: Hello) -> None:
        """Check that arguments, anchors and messages match on all workers. The value that most workers have is the
        right one; in a tie, the first is.

        Raises RoundFailedError on a worker with the right values. Raises ConfigError on a worker with other arguments
        or messages, or if workers have different anchors in their first round. In a later round, a worker with another
        anchor loads the right one.
        """
        if len({h.arguments for h in hellos}) > 1:
            text = self._arguments()
            self._compare("be given the same arguments", text, hellos)
            # The arguments are equal now: frozen parameters have changed on all workers after some of them had joined.
            self._arguments_hash = hash_of(text)
        where = [(h.history, h.anchor) for h in hellos]
        if len(set(where)) == 1:
            if len({h.message for h in hellos}) > 1:
                self._compare("send messages of one kind", self._message(), hellos)
            return
        if not self.roster.past:
            ensure = "seed them alike" if self._site.size > 1 else "a Manager with init_sync=True sees to it"
            raise ConfigError(f"workers must begin at the same parameters: {ensure}")
        if (mine.history, mine.anchor) != most(where):
            _log.warning("worker %x has an anchor of its own, and takes that of the others", self.worker)
            self._mark_as_behind()
        raise RoundFailedError("workers have different anchors")

    def _mark_as_behind(self) -> None:
        self.settings.manager.load_state_dict({"step": 0, "batches_committed": 0})

    def _compare(self, must: str, text: str, hellos: Sequence[Hello]) -> None:
        """Raise an error if the workers' texts differ. `text` is this worker's text, and the error names a worker and
        the first line in which its text differs from the most frequent one.

        Raises ConfigError on a worker whose text is not the most frequent one,
        and RoundFailedError on the other workers.
        """
        with fail_together(self._site):
            texts = self.channel.gather_text(text, self._device, "members")
        usual, mine = most(texts), self._group.rank
        if len(set(texts)) == 1:
            return
        other = mine if texts[mine] != usual else next(i for i, found in enumerate(texts) if found != usual)
        pairs = zip_longest(texts[other].split("\n"), usual.split("\n"), fillvalue="nothing more")
        here, there = next(pair for pair in pairs if pair[0] != pair[1])
        error = f"workers must {must}, but worker {hellos[other].worker:x} has {here} and the others have {there}"
        raise ConfigError(error) if other == mine else RoundFailedError(error)

    def _norm_after(self) -> float:
        """Return the norm that this worker's error memory will have if the current round is committed."""
        pairs = [(part, part.current) for part in self._fragments]
        errors = [r.exchanged.v if r and r.exchanged and r.share else f.feedback.memory.vector for f, r in pairs]
        return math.sqrt(sum(map(_energy, errors)))

    def _commit(self, attempt: Attempt) -> bool:
        """Commit a round after the vote; return True if all its exchanges are applied."""
        taken = self._close_exchanges()
        names = {hello.worker for hello in attempt.hellos}
        for worker, member in self.roster.members.items() if self._group.rank == 0 and self._group.leads else ():
            if member.here and member.norm and worker not in names:
                fate = "waits in its file" if member.keeps else "is lost"
                _log.warning(
                    "worker %x is gone after %d rounds: its error memory, of norm %.3g, %s",
                    *(worker, self._rounds, member.norm, fate),
                )
        self.roster.commit(attempt.hellos, attempt.weights, attempt.norms, taken=taken)
        # Update this worker's counts. The norm of its message follows from ||sent||^2 = ||v||^2 - ||e||^2.
        mine, weight = attempt.hellos[self._group.rank], attempt.weights[self._group.rank]
        own = self.account
        own.found_lost -= mine.lost
        kept = sum(_energy(part.feedback.memory.vector) for part in attempt.parts)
        own.norm = self.roster.members[self.worker].norm
        self.has_joined = True
        if weight:
            own.included, own.sent = mine.attempt, math.sqrt(max(0.0, self._energy - kept))
            if taken:
                own.start_count(mine.weight)
        # Let a slower worker make fewer steps before the next round, and a faster one more, so that none waits.
        if self.settings.weight is not None and mine.seconds:
            times = {h.worker: max(1, round(1e9 * h.seconds)) for h in attempt.hellos if h.seconds}
            steps = paces(list(times.values()), len(times) * self._schedule.period)
            self.paces = [dict(zip(times, steps, strict=True))[self.worker]]
        applied, is_saved, reports = True, True, 0
        for part in attempt.parts:
            r = part.apply_round(None if self._outer is None else self._outer.optimizer)
            self._reactions(r)
            applied &= bool(r.applied)
            is_saved &= bool(r.applied) and r.flush is None and r.agrees
            reports = max(reports, sum(e.kind == "message" and e.worker == self._group.rank for e in r.reports))
        # Save the memory, unless `_try` has already written it as it is now.
        if not (is_saved and self._keeps):
            self._save()
        # Stop if most other workers could not decode this worker's message; they continue without it.
        if 2 * reports > self._group.size - 1:
            raise GuardError(
                f"{reports} of the {self._group.size - 1} other workers received an invalid message from this one "
                f"({self._reactions.outcomes.skips.list[-1].message}): check its memory and its network, and restart it"
            )
        return applied

    def _close_exchanges(self) -> bool:
        parts, self._in_doubt = self._in_doubt, ()
        # Close every exchange first, since `all` would stop at the first rejected one.
        applied = [part.current.close() for part in parts if part.current is not None]
        return all(applied)

    def _roll_back(self) -> None:
        self._in_doubt = ()
        for part in self._fragments:
            part.roll_back()

    @property
    def _rounds(self) -> int:
        return sum(part.rounds for part in self._fragments)

    # Workers that join.

    def _shared(self) -> dict[str, Any]:
        """Return the state for a worker that is behind: the anchor, the roster, and
        the states of the outer and inner optimizers."""
        inner = [local_state(o) for o in self._inner] if self.settings.share_optimizer_state else None
        state = {"fragments": [{} for _ in self._fragments], "steps": self.steps, "inner": inner}
        return self._shared_state.save(state)

    def _shared_fields(self) -> list[Vector | Value]:
        found = [field for i, part in enumerate(self._fragments) for field in part.shared_fields(("fragments", i))]
        outer = [] if self._outer is None else [self._outer.field()]
        return [*found, *outer, *self.roster.fields(("roster",))]

    def _receive(self, state: Mapping[str, Any]) -> None:
        """Load the state of a worker that is ahead. In a site, only keep the state: it is loaded once all processes of
        the site have received one. torchft calls this method at a quorum."""
        if self._site.size > 1:
            self._received = state
        else:
            self._recover(state)

    def _load_received(self) -> None:
        """Load the received state, if there is one.

        The processes of a site may have received it from different workers, whose numbers of steps and inner optimizers
        differ. So all processes use the number of steps that process 0 received, or its whole state if each process has
        the whole model.
        """
        if (state := self._received) is not None:
            self._received = None
            shared = state if self._has_replicas else {"steps": state["steps"]}
            self._recover({**state, **self._objects.send(shared, 0)})

    def _discard_received(self) -> None:
        """Discard the received state, if there is one, since other processes of this site may have received none."""
        if self._received is not None:
            self._received = None
            self._mark_as_behind()

    @torch.no_grad()
    def _recover(self, state: Mapping[str, Any]) -> None:
        """Load the state of a worker that is ahead of this one.

        Unsent local updates are kept: the parameters move with the anchor. A worker that has never been in a round, or
        was restored to a state from before its last round, starts at the anchor.
        """
        self._sigterm.hold()  # SIGTERM must not interrupt the loading
        try:
            self._shared_state.validate(state)
        except ValueError as error:  # the arguments, which would explain the error, are only compared later
            raise ConfigError(f"workers must be given the same arguments: {error}") from None
        self._check_run(state)
        # Commit the exchange in doubt if the anchor of the others includes this worker's last attempt; else roll it
        # back.
        own, is_new = self.account, not self.roster.past
        included = state["roster"]["included"].get(self.worker, 0)
        had = bool(self._in_doubt) and included == own.attempts
        was = [(part, part.anchor.copy_starts()) for part in self._fragments]
        sent, taken = set[Fragment](), False
        if had:
            sent, taken, own.included = set(self._in_doubt), self._close_exchanges(), own.attempts
        else:
            self._roll_back()
        # Updates that the anchor includes must not be sent again. Updates that were sent in a round that the other
        # workers do not have are lost.
        stale = included > own.included
        if stale:
            own.found_lost += own.norm
            _log.warning("worker %x has an older memory than it has sent since, of norm %.3g", self.worker, own.norm)
            for part in self._fragments:
                part.feedback.reset()
            own.start_count(self._weight())
        elif included < own.included:
            own.found_lost += own.sent
            _log.warning(
                "worker %x was in a round that the others do not have: what it sent, of norm %.3g, is lost",
                *(self.worker, own.sent),
            )
        # Move x with the anchor: x <- start + (x - before), or x <- start if the anchor includes x - before.
        self._shared_state.load(state)
        for part, before in was:
            part.current = None
            if (part in sent and taken) or stale or is_new:
                part.anchor.move_to_start()
            else:
                part.anchor.move(before)
        if had and taken:
            own.start_count(self._weight())
        # A new worker continues at the sender's number of steps, with the state of its inner optimizers.
        if is_new:
            self.steps = state["steps"]
            # With empty moments the first steps would be too large.
            if state["inner"] is not None and self.settings.share_optimizer_state:
                try:
                    load_states(self._inner, state["inner"])
                except ValueError as error:
                    raise ConfigError(f"workers must be given the same inner optimizer: {error}") from None

    def _check_run(self, state: Mapping[str, Any]) -> None:
        """Raise ConfigError, with nothing changed, if this worker would lose rounds by loading the state of another
        worker: a state from another run, or one with fewer rounds of this run.

        torchft lets newcomers begin a run of their own if the other workers do not answer in time.
        """
        mine, theirs = self._rounds, sum(part["rounds"] for part in state["fragments"])
        run = state["roster"]["run"]
        # A worker may be one round ahead, which the others have rolled back. It has as many exchanges as there are
        # fragments if it was uncompressed.
        if mine and (run != self.roster.run or theirs < mine - len(self._fragments)):
            raise ConfigError(
                f"the state of the others has {theirs} rounds of run {run:x}, and would replace {mine} rounds of run "
                f"{self.roster.run:x} of this worker, which keeps its state and its memory file. Restart the workers "
                f"of the run that must end, and set the lighthouse's --join_timeout_ms above connect(timeout=); load "
                f"manager.state_dict() with a checkpoint"
            )

    def fields(self) -> list[Value]:
        """Return the saved-state fields: this worker's name and counts (`Account`), and the `Roster`."""
        path = ("membership",)
        own = attribute((*path, "worker"), self, "worker", int), attribute((*path, "account"), self, "account", Account)
        share = Value(("share",), float, lambda: 1.0, skip)
        return [share, *own, *self.roster.fields((*path, "roster"))]

    # Methods that have no function for elastic workers.

    def check_fixed(self, call: str) -> None:
        """Raise RuntimeError for a call that only a fixed set of workers supports."""
        raise RuntimeError(_FIXED[call])

    def mean(self, vectors: Sequence[Tensor], steps: int) -> NoReturn:
        raise RuntimeError(_FIXED["error"])

    def average(self, tensors: Iterable[Tensor], steps: int) -> NoReturn:
        raise RuntimeError(_FIXED["average"])

    def check_call(self, call: str, steps: int) -> None:
        """No-op: elastic workers may make different numbers of calls."""

    def exchanging(self, steps: int) -> bool:
        """Return True if a round followed the last inner step."""
        return self._exchanged

    def sampled(self, steps: int) -> bool:
        return True

    def position(self, steps: int) -> int:
        """Return the number of inner steps of all workers that the anchor includes."""
        return self.roster.position

    def identity(self) -> dict[str, Any]:
        return {"elastic": True}

    # Memory files, and workers that leave.

    @property
    def _keeps(self) -> bool:
        """True if this worker's file contains its error memory after its last round."""
        return self._file is not None and self._file.holds(self.account.included)

    def _save(self, exchanged: Sequence[Fragment] = ()) -> bool:
        """Write the pending updates to this worker's memory file; return False if there is no file, or if writing
        fails.

        `exchanged` are the fragments of the round in progress. If there are any, the updates that will be pending once
        the round is committed are written too.
        """
        if self._file is None:
            return False
        if self._in_doubt:  # nothing has changed since the file was written
            return self._keeps
        now = [part.unapplied() for part in self._fragments]
        memory = MemoryFile(self.roster.run, self.worker, self.account.included, by_parameter(self._fragments, now))
        if exchanged:
            pairs = zip(self._fragments, now, strict=True)
            later = by_parameter(self._fragments, [p.unapplied_after() if p in exchanged else e for p, e in pairs])
            memory = replace(memory, next_attempt=self.account.attempts, next_error=later)
        return self._file.save(memory)

    def _may_leave(self) -> bool:
        """Save the error memory to its file after SIGTERM; return False if the memory must be sent in the next round
        instead, or if the processes of a site must leave together."""
        if self._site.size > 1:
            self._save()
        elif not self._sends_all:
            self._handed = self._save() or not self._has_pending()
            self._sends_all = not self._handed
        return self._handed

    def leave(self) -> bool:
        """Leave the run, after saving the error memory to its file, or sending it in one more round that must be
        committed within `grace` seconds.

        Returns False, with an error in the log, if updates are lost. Collective over the processes of a site.
        """
        handed = self._handed or not self._any(not self._save()) or self._send_all()
        self._roll_back()
        if self._file is not None:
            self._file.close()
        self.settings.manager.shutdown(wait=False)
        return handed

    def _send_all(self) -> bool:
        """Send all pending updates in one more round, uncompressed; return False if they are lost."""
        self._sends_all = True
        until, reason = time.monotonic() + self._sigterm.left, "its grace is over"
        while self._any(self._has_pending()) and not self._any((left := until - time.monotonic()) <= 0):
            try:
                if not self.round(uncompressed=True, patience=left):
                    reason = "the last round was not taken"
            except (PeerLostError, ConfigError, GuardError) as error:
                reason = str(error)
                break
        if not self._has_pending():
            if self._file is not None:
                self._file.remove()
            return True
        # Count the error memory as lost unless it is in the file.
        own, kept = self.account, self._keeps
        self.roster.gone += 0.0 if kept else own.norm
        memory = "waits in its file" if kept else "is lost"
        _log.error(
            "worker %x leaves: its error memory, of norm %.3g, %s, and its last %d inner steps are lost: %s",
            *(self.worker, own.norm, memory, own.since, reason),
        )
        return False

    def _has_pending(self) -> bool:
        """Return True if this worker has updates that a round would send. Updates of frozen parameters are not sent, so
        they do not count."""
        pending = [part.unapplied() for part in self._fragments]
        for part, vector in zip(self._fragments, pending, strict=True):
            for name, view in part.by_name(vector).items():
                view.mul_(name not in part.frozen_next)
        return self.has_joined and any(bool(vector.any()) for vector in pending)

    def _exit(self) -> NoReturn:
        end_process(0 if self.leave() else 1)


_FIXED = {
    "error": "error is of workers that are all there; with a manager, pending() is this worker's own",
    "average": "average is for a fixed set of workers; with a manager, evaluate the anchor",
    "sit_out": "sit_out is for a fixed set of workers; with a manager, an absent one is left out",
}


def _energy(vector: Tensor) -> float:
    return float(widened(vector).square().sum())
