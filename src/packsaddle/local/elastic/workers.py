"""Rounds of local updates with workers that join and leave: a torchft Manager commits or rolls back each round.

The workers of torchft's quorum exchange their updates v of one fragment (parameters exchanged together) in five steps:

    quorum     the set of workers is fixed; a worker that is behind loads another worker's state (`Recovery`)
    hello      one all-gather of each worker's name, weight, and hashes of arguments, anchor and message
    exchange   the mean of the compressed, weighted v; fragments alternate; weights are W w_i / sum_j w_j, 1 by default
    confirm    an all-gather, which completes on a worker only if all workers have completed the exchange
    vote       Manager.should_commit: all commit, or all roll back and repeat the round with the remaining workers

A worker whose confirmation fails cannot determine whether another worker has committed the round. So the worker keeps
the exchange until the next quorum. If the other workers are ahead then, they send their state, which records this
worker's last attempt at a round that they committed with its update. From this record the worker determines whether to
commit the exchange or to roll it back. So no update is applied twice, and none is lost.

In its first round a worker has weight w_i = 0: it receives the mean, and sends no update. It also has weight 0 in a
round if it has not stepped since its last round, unless all pending updates are sent in that round.

A worker may be a site of several processes. Each process runs these steps with its peers in the other sites, and after
each step the processes of a site agree whether the step failed on one of them (`Site.fails_together`). All processes of
all sites vote. All values that decide about a round must be equal on the processes of a site. So the processes combine
their names, weights, hashes, step times and received signals.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, as_text, check_agreement
from packsaddle.comm.failures import PeerLostError
from packsaddle.comm.group import Group
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.managed import ManagedGroup
from packsaddle.comm.sharding import local_part
from packsaddle.comm.sites import SiteGroup
from packsaddle.compressors import Compressor, Identity
from packsaddle.errors import ConfigError, GuardError
from packsaddle.feedback.checks import fingerprint
from packsaddle.feedback.state import Value
from packsaddle.local.after import Reactions
from packsaddle.local.anchor import OuterOptimizer
from packsaddle.local.elastic.membership import Attempt, Membership
from packsaddle.local.elastic.quorum import Greeting, Quorum, Recovery, RoundFailedError
from packsaddle.local.elastic.sigterm import LeavingError, Sigterm, end_process
from packsaddle.local.fragment import Fragment
from packsaddle.local.options import Elastic, LocalOptions
from packsaddle.local.round import Begun, Sent, apply, begin, exchange
from packsaddle.local.schedule import Rotation, paces
from packsaddle.local.workers import Connection

_log = logging.getLogger("packsaddle")
_PAUSE = 0.05  # seconds between two attempts at a round


class ElasticWorkers:
    """Runs this worker's rounds in a run whose workers join and leave, coordinated by a torchft Manager.

    Args:
        options: options of the local updates.
        to: the connection to the other workers. Its group is a `ManagedGroup`, or a `SiteGroup` that contains one.
        device: device of the anchor, the parameters on which all workers last agreed.
        fragments: the parts of the model, each of which is exchanged separately.
        part_of: not used, since the fragments are exchanged in rotation.
        inner: the optimizers of the parameters.
        outer: the outer optimizer of the anchor, or None.
    """

    is_shared = logs_clips = True
    # A worker that leaves sends its updates, or logs that they are lost.
    warns_at_end = False

    def __init__(
        self,
        options: LocalOptions,
        to: Connection,
        device: torch.device,
        fragments: Sequence[Fragment],
        part_of: tuple[int, ...],
        inner: Sequence[Optimizer],
        outer: OuterOptimizer | None,
    ) -> None:
        settings, self.channel = options.workers, to.channel
        group = self.channel.group.peers if isinstance(self.channel.group, SiteGroup) else self.channel.group
        assert isinstance(settings, Elastic)
        assert isinstance(options.every, int)
        assert isinstance(group, ManagedGroup)
        self._settings, self._group, self._outer = settings, group, outer
        self.member = Membership(settings, to.within, fragments, Rotation(options.every, len(fragments)))
        self._site = self.member.site
        self.exchanging = False  # True if a round followed the last inner step
        self._resumed = time.monotonic()  # time at the end of the last round
        # True if this worker is leaving and has pending updates, which it sends uncompressed in the next round.
        self._sends_all = False
        # The workers that asked in the last round to send all pending updates, as a worker does before it leaves.
        self._have_sent_all = set[int]()

        # The objects that run parts of a round.
        self._sigterm = Sigterm(self._may_leave, float(settings.grace))
        self._quorum = Quorum(group, self._site, self._sigterm)
        self._recovery = Recovery(self.member, self._quorum, self._sigterm, inner, outer)
        self._greeting = Greeting(self.member, self._quorum, self.channel)
        if settings.leave_on_sigterm:
            self._sigterm.listen()

    @classmethod
    def connect(cls, options: LocalOptions, device: torch.device, *, is_split: bool) -> Connection:
        """Return this worker's connection to the other workers, as set by `options`. `is_split` is True if each process
        of the worker has only a part of the parameters."""
        assert isinstance(options.workers, Elastic)
        group: Group
        group = managed = options.workers.group or ManagedGroup(options.workers.manager)
        within = managed.site if managed.site.size > 1 else None
        if within is not None and not is_split:
            group = SiteGroup(within, managed)
        return Connection(group, within, Communicator(group, Ledger()), None)

    def start(
        self,
        reactions: Reactions,
        same: Mapping[str, object],
        parameters: Mapping[str, Tensor],
        untrained: Sequence[tuple[str, Tensor]],
    ) -> None:
        """Set the reactions to the end of a round, and the values that are compared with the other workers' when this
        worker joins. These values are the arguments `same`, and checksums of the frozen parameters among the
        `untrained` tensors. Collective over the processes of this worker."""
        self._reactions = reactions
        frozen = {name: t for name, t in untrained if isinstance(t, torch.nn.Parameter)}

        def arguments() -> str:
            checksums = self._site.totals(*(int(fingerprint(local_part(t))) for t in frozen.values()))
            named = zip(frozen, checksums, strict=True)
            return as_text({**same, **{f"checksum of {name}": checksum for name, checksum in named}})

        self._greeting.arguments = arguments
        check_agreement(Communicator(self._site.group, Ledger()), same, torch.device("cpu"), of="process")

    # Methods that join the run, and run rounds.

    def enter(self) -> bool:
        """Join the run, unless this worker has joined already. Returns True if it joined now. In that case the other
        workers' parameters may have replaced its own."""
        if self.has_joined:
            return False
        self.join()
        return True

    def join(self) -> None:
        """Run a round in which this worker sends no update, and loads another worker's state if it is behind. No-op if
        this worker has joined."""
        if self.has_joined:
            return
        self.round(uncompressed=False)
        # Set the number of inner steps since the last round. It is above 0 only if this worker was restored from a
        # checkpoint.
        self.member.account.ahead = self.member.account.since
        member = self.member
        _log.info("worker %x joins at round %d, with %d others", member.worker, member.rounds, self.workers - 1)

    def after_step(self, steps: int, parameters: Iterable[Tensor]) -> None:
        """Count an inner step, the `steps`-th; then leave if SIGTERM was received, or run a round if one is due."""
        self.steps, self.exchanging = steps, False
        self.member.account.since += 1
        self.member.account.ahead += 1
        if self._settings.leave_on_sigterm and self._site.any(self._sigterm.asked):
            self._exit()
        if self.member.rotation.is_due(self.member.account.ahead):
            self.round(uncompressed=False)

    def flush(self, compressor: Compressor | None, steps: int) -> bool:
        """Run an uncompressed round of all present workers, in which all pending updates are sent. Returns True if all
        of its exchanges were applied. Raises RuntimeError if a compressor is given."""
        if compressor is not None:
            raise RuntimeError("flush takes a compressor with a fixed set of workers; with a manager, pass none")
        # Join first: a worker that was restored from a checkpoint has updates, and sends none in the round of joining.
        self.join()
        return self.round(uncompressed=True)

    def round(self, *, uncompressed: bool, patience: float | None = None) -> bool:
        """Run a round, repeating it until it is committed; return True if all of its exchanges were applied.

        If `uncompressed` is True, all workers send all of their pending updates, uncompressed. Raises PeerLostError if
        no attempt at the round is committed within `patience` seconds (by default `Elastic.patience`), and ConfigError
        if this worker's arguments differ from those of the other workers.
        """
        # Compute the mean time of an inner step since the last round, from which `_commit` chooses the number of steps
        # until the next round.
        arrived = time.monotonic()
        until = float(self._settings.patience) if patience is None else patience
        ahead = self.member.account.ahead
        seconds = (arrived - self._resumed) / ahead if ahead else 0.0
        # Repeat the round with the remaining workers until it is committed.
        while True:
            try:
                applied = self._once(uncompressed, seconds)
                break
            except LeavingError:
                # If this worker is a site of several processes, this error means that the grace period after SIGTERM is
                # over. The other processes of the site may not be in this wait, and a collective with them would hang.
                # So end this process without a collective.
                if self._site.size > 1:
                    end_process(int(self.member.has_pending()))
                self._exit()
            except RoundFailedError as error:
                reason = " ".join(str(error).split())[:200]
            except BaseException:
                self.member.roll_back()
                raise
            if self._site.any(time.monotonic() - arrived > until):
                self.member.roll_back()
                raise PeerLostError(f"no round was completed in {until:g} s{f': {reason}' if reason else ''}")
            if self._site.any(self._sigterm.asked) and not self._sends_all:
                self._exit()
            time.sleep(_PAUSE)
        # Reset the count of steps. A worker that had to send its pending updates before leaving leaves now.
        self._resumed, self.member.account.ahead, self.exchanging = time.monotonic(), 0, True
        if self._site.any(self._sigterm.asked) and self._sends_all:
            self._exit()
        return applied

    def _once(self, dense: bool, seconds: float) -> bool:
        """Attempt a round once: quorum, exchange and vote. Returns True if all exchanges of the round were applied, and
        False if one was rejected. Raises RoundFailedError if the round was not committed. `dense` and `seconds` are
        those of `Greeting.exchange`."""
        try:
            self._quorum.form(is_last=self._sends_all)
        except RoundFailedError:
            self._recovery.discard_received()
            raise
        # After an error, close the connections, so that no worker waits for this one in a collective. The vote is then
        # against the round.
        attempt, reason = None, ""
        try:
            self._quorum.check()
            self._recovery.load_received()
            # Roll back an exchange in doubt, unless `load_received` has committed it because the other workers had
            # committed it.
            self.member.roll_back()
            attempt = self._try(dense, seconds)
        except (ConfigError, PeerLostError):
            self._quorum.abort()
            raise
        except (RuntimeError, AssertionError) as error:
            # Collectives of torch raise errors of these types, also if the process group no longer exists.
            reason = str(error)
            self._quorum.report(error)
            self._recovery.discard_received()
        # Vote. If this worker's confirmation failed, other workers may still have committed the round. The exchanges of
        # the round are then in doubt, and `Recovery` commits them or rolls them back at the next quorum.
        try:
            self._quorum.vote(reason if attempt is None else None)
        except RoundFailedError:
            if self.member.in_doubt is None:
                self.member.roll_back()
            raise
        assert attempt is not None
        return self._commit(attempt)

    def _try(self, dense: bool, seconds: float) -> Attempt:
        """Exchange the updates of one round with the workers of the quorum: the steps hello, exchange and confirm of
        the module's docstring. Returns the attempt at the round, on which the workers have not voted yet. `dense` and
        `seconds` are those of `Greeting.exchange`."""
        member = self.member
        self._group.renew()
        self.channel.step = max(0, self.steps - 1)
        member.account.attempts += 1
        # Hello: compare arguments before the first collective whose size depends on them.
        hellos = self._greeting.exchange(dense=dense or self._sends_all, seconds=seconds)
        # Exchange: send one fragment, in rotation, or all fragments if a worker has requested that (`dense`). If all
        # weights are 0, send none.
        dense = any(hello.dense for hello in hellos)
        weights, parts = [0.0] * len(hellos), list[Fragment]()
        if any(h.weight or (dense and h.idle_weight and h.has_pending) for h in hellos):
            weights = [h.weight or h.idle_weight if dense else h.weight for h in hellos]
            parts = list(member.fragments) if dense else [member.due]
        sent = list[Sent]()
        for part in parts:
            member.running.append(begun := begin(part, self.steps, weights, flush=Identity() if dense else None))
            with self._site.fails_together():
                sent.append(exchange(begun, self.channel.step, self._norms(begun, weights), reports=True))
        # Confirm: the gather below completes only if all workers have exchanged their updates. From here on, other
        # workers may commit the round.
        member.in_doubt = attempt = Attempt(hellos, weights, sent)
        confirmation = torch.ones(1, device=self._greeting.device)
        with self._site.fails_together():
            self.channel.gather({"confirmed": confirmation}, fixed_size=True, purpose="members")
        return attempt

    def _norms(self, begun: Begun, weights: Sequence[float]) -> Tensor | None:
        """Return the norms of the workers' updates v, float32[W], by which they are clipped; collective. A worker with
        weight 0 has the norm NaN. None: updates are not clipped. The Hello messages cannot contain the norms, since v
        is computed after them."""
        if begun.norm is None:
            return None
        found = self.channel.gather({"norm": begun.norm}, fixed_size=True, purpose="guard")
        norms = torch.cat([each["norm"] for each in found])
        norms[torch.tensor(weights) == 0] = torch.nan
        return norms

    def _commit(self, attempt: Attempt) -> bool:
        """Commit the round after the vote, and apply its means to the anchor. Returns True if all of its exchanges are
        applied, and False if one is rejected."""
        member = self.member
        ended = member.end(attempt)
        is_applied = all(each.applied for each in ended)
        before = set(member.roster.present)
        member.roster.commit(attempt.hellos, attempt.weights, applied=is_applied)
        if self._group.rank == 0 and self._group.leads:
            self._log_gone(before - set(member.roster.present))
        self._have_sent_all = {hello.worker for hello in attempt.hellos if hello.dense} if is_applied else set()
        # Update this worker's counts.
        mine = attempt.hellos[self._group.rank]
        member.has_joined = True
        if attempt.weights[self._group.rank]:
            member.account.included = mine.attempt
            if is_applied:
                member.account.start_count(mine.weight)
        # Choose this worker's number of steps before the next round: fewer for a slower worker and more for a faster
        # one, so that no worker waits for another.
        if self._settings.weight is not None and mine.seconds:
            times = {h.worker: max(1, round(1e9 * h.seconds)) for h in attempt.hellos if h.seconds}
            steps = paces(list(times.values()), len(times) * member.rotation.period)
            member.rotation = replace(member.rotation, own=dict(zip(times, steps, strict=True))[member.worker])
        reports = 0
        for each in ended:
            apply(each, None if self._outer is None else self._outer.optimizer)
            self._reactions(each)
            reports = max(reports, sum(e.kind == "message" and e.worker == self._group.rank for e in each.reports))
        # Stop if most of the other workers received an invalid message from this worker. They continue without this
        # worker.
        if 2 * reports > self._group.size - 1:
            raise GuardError(
                f"{reports} of the {self._group.size - 1} other workers received an invalid message from this one "
                f"({self._reactions.outcomes.skips.list[-1].error}): check its memory and its network, and restart it"
            )
        return is_applied

    def _log_gone(self, gone: Iterable[int]) -> None:
        """Log which workers of the last round are not in this one. A worker that had sent all of its updates in the
        last round, as it does before it leaves, loses nothing."""
        for worker in gone:
            if worker in self._have_sent_all:
                _log.info("worker %x has left after %d rounds", worker, self.member.rounds)
            else:
                _log.warning(
                    "worker %x is gone after %d rounds, and its updates since the last round are lost unless it comes "
                    "back",
                    *(worker, self.member.rounds),
                )

    # What `LocalUpdates` needs of a set of workers.

    def wait(self) -> None:
        """No-op: no exchange of elastic workers runs in the background."""

    def abandon(self) -> None:
        """No-op: no exchange of elastic workers runs in the background."""

    def begun_at(self, part: Fragment) -> list[Tensor]:
        return []

    def unapplied(self) -> list[Tensor]:
        return [part.unapplied() for part in self.member.fragments]

    def check_call(self, call: str, steps: int) -> None:
        """No-op: workers that join and leave may make different numbers of collective calls, such as those that save a
        checkpoint."""

    @property
    def steps(self) -> int:
        return self.member.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.member.steps = steps

    @property
    def has_joined(self) -> bool:
        return self.member.has_joined

    @property
    def workers(self) -> int:
        """The number of workers in the last round."""
        return len(self.member.roster.present)

    @property
    def paces(self) -> Sequence[int]:
        """One number: the inner steps of this worker from one round to the next."""
        return [self.member.rotation.pace]

    def position(self, steps: int) -> int:
        """Return the number of inner steps, of all workers, whose updates are included in the anchor, i.e. in the
        parameters on which all workers last agreed."""
        return self.member.roster.position

    def identity(self) -> dict[str, Any]:
        rotation = self.member.rotation
        return {"every": rotation.every, "delay": 0, "fragments": rotation.fragments, "elastic": True}

    def fields(self) -> list[Value]:
        return self.member.fields()

    def resume(self, state: Mapping[str, Any]) -> None:
        for part, saved in zip(self.member.fragments, state["fragments"], strict=True):
            part.resume(saved)

    # Methods for leaving the run.

    def _may_leave(self) -> bool:
        """Return True if this worker may leave now, after SIGTERM in a wait for other workers: if it has no pending
        updates. Returns False if they must be sent in the next round, or if the worker is a site, whose processes must
        leave together."""
        if self._site.size > 1:
            return False
        self._sends_all = self.member.has_pending()
        return not self._sends_all

    def leave(self) -> bool:
        """Leave the run, after sending all pending updates in one more round, uncompressed. The round must be committed
        within `Elastic.grace` seconds.

        Returns True if the updates are sent, or if there are none. If updates are lost, the method logs an error and
        returns False. Collective over the processes of a site.
        """
        self._sends_all = True
        until, reason = time.monotonic() + self._sigterm.left, "the grace period is over"
        while self._site.any(self.member.has_pending()) and not self._site.any((left := until - time.monotonic()) <= 0):
            try:
                if not self.round(uncompressed=True, patience=left):
                    reason = "the last round was rejected"
            except (PeerLostError, ConfigError, GuardError) as error:
                reason = str(error)
                break
        is_sent = not self.member.has_pending()
        if not is_sent:
            _log.error("worker %x leaves, and its unsent updates are lost: %s", self.member.worker, reason)
        self.member.roll_back()
        self._settings.manager.shutdown(wait=False)
        return is_sent

    def _exit(self) -> NoReturn:
        end_process(0 if self.leave() else 1)
