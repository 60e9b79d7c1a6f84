"""The start and the vote of a round with workers that join and leave.

A torchft Manager determines the set of workers (`Quorum`) and collects their errors and votes. A worker that is behind,
i.e. that misses committed rounds, loads another worker's state (`Recovery`). Then all workers check that they have the
same arguments, anchors and compressors (`Greeting`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, as_text, hash_of
from packsaddle.comm.failures import PeerLostError
from packsaddle.comm.managed import ManagedGroup
from packsaddle.errors import ConfigError
from packsaddle.feedback.checks import fingerprint
from packsaddle.feedback.optimizers import load_states, local_state
from packsaddle.feedback.state import Rule, State, Value, Vector
from packsaddle.local.anchor import OuterOptimizer
from packsaddle.local.elastic.membership import Hello, Membership, Site, most
from packsaddle.local.elastic.sigterm import Sigterm
from packsaddle.local.fragment import Fragment

_log = logging.getLogger("packsaddle")


class RoundFailedError(RuntimeError):
    """Raised if an attempt at a round was not committed; `ElasticWorkers.round` then repeats the round. The message is
    empty if this worker's attempt succeeded, but the vote of all workers was against the round."""


class Quorum:
    """The quorum of each round, and the vote of its workers.

    Args:
        group: the group of the workers, which the Manager reconfigures at each quorum.
        site: the processes of this worker, each of which has a Manager of its own.
        sigterm: the handler of SIGTERM, which may interrupt the wait for a quorum.
    """

    def __init__(self, group: ManagedGroup, site: Site, sigterm: Sigterm) -> None:
        self._manager, self._group, self._site, self._sigterm = group.manager, group, site, sigterm

    def form(self, *, is_last: bool) -> None:
        """Wait until torchft has determined the set of workers. If this worker is behind the other workers, it receives
        the state of another worker within this call. If this worker leaves after the round (`is_last`), the call waits
        at most until the end of the grace period.

        Raises RoundFailedError if torchft has formed no quorum in time, or has raised another error.
        """
        timeout = timedelta(seconds=self._sigterm.left) if is_last else None
        try:
            with self._site.fails_together(), self._sigterm.waiting():
                self._manager.start_quorum(timeout=timeout)
        except (ConfigError, PeerLostError):
            self.abort()
            raise
        except Exception as error:  # torchft raises errors of several types
            # Clear the future of the failed quorum, since torchft 0.2.0 would raise its error again at every later
            # quorum.
            self._manager._quorum_future = None
            raise RoundFailedError(str(error)) from error

    def check(self) -> None:
        """Raise RuntimeError if torchft has reported an error since the quorum was formed; collective over the
        processes of this worker."""
        with self._site.fails_together():
            if (failure := self._manager.errored()) is not None:
                raise RuntimeError(str(failure))

    def report(self, error: Exception) -> None:
        """Report an error of this worker to torchft, so that this worker votes against the round. Also close the
        connections, so that no other worker waits for this one."""
        self._manager.report_error(error)
        self.abort()

    def abort(self) -> None:
        """Close the connections to the other workers, so that none waits for this one in a collective."""
        with suppress(RuntimeError):
            self._group.abort()

    def vote(self, reason: str | None) -> None:
        """Vote on the round with all workers. Raises RoundFailedError if the round is not committed. `reason` is the
        error of this worker's attempt, which becomes the message of the RoundFailedError; None: the attempt
        succeeded."""
        if not self._manager.should_commit():
            raise RoundFailedError("" if reason is None else reason or str(self._manager.errored()))

    def mark_as_behind(self) -> None:
        """Mark this worker as behind, so that it receives the state of another worker at the next quorum."""
        self._manager.load_state_dict({"step": 0, "batches_committed": 0})


class Recovery:
    """Sends this worker's state to workers that are behind, and loads the state of another worker if this worker is
    behind. Its methods are registered with torchft's Manager, which calls them at a quorum.

    Args:
        own: this worker's membership.
        quorum: the quorum. If a received state is discarded, the worker receives a state again at the next quorum.
        sigterm: the handler of SIGTERM, which must not interrupt the loading of a state.
        inner: the inner optimizers, i.e. those of the parameters.
        outer: the outer optimizer of the anchor, or None.
    """

    def __init__(
        self,
        own: Membership,
        quorum: Quorum,
        sigterm: Sigterm,
        inner: Sequence[Optimizer],
        outer: OuterOptimizer | None,
    ) -> None:
        self._own, self._quorum, self._sigterm, self._inner, self._outer = own, quorum, sigterm, inner, outer
        # The state that was received from another worker and is not loaded yet; None: there is none.
        self._received: Mapping[str, Any] | None = None
        same = {"fragments": len(own.fragments), "outer": outer is not None}
        self._state = State("LocalUpdates", [Rule((), "shared")], lambda: same, self._fields)
        own.settings.manager.register_state_dict_fn("packsaddle", self._receive, self._shared)

    def _shared(self) -> dict[str, Any]:
        """Return the state for a worker that is behind: the anchor (the parameters on which all workers last agreed),
        the records of all workers (`Roster`), the number of steps, and the states of the outer optimizer and, with
        `Elastic.compare_optimizers`, the inner optimizers."""
        own = self._own
        inner = [local_state(o) for o in self._inner] if own.settings.compare_optimizers else []
        return self._state.save({"fragments": [{} for _ in own.fragments], "steps": own.steps, "inner": inner})

    def _fields(self) -> list[Vector | Value]:
        found = [field for i, part in enumerate(self._own.fragments) for field in part.shared_fields(("fragments", i))]
        outer = [] if self._outer is None else [self._outer.field()]
        return [*found, *outer, *self._own.roster.fields(("roster",))]

    def _receive(self, state: Mapping[str, Any]) -> None:
        """Receive `state`, the state of a worker that is ahead of this one. It is loaded immediately, unless this
        worker is a site, i.e. has several processes. In a site the state is stored, and loaded once every process of
        the site has received a state."""
        if self._own.site.size > 1:
            self._received = state
        else:
            self._load(state)

    def load_received(self) -> None:
        """Load the received state, if there is one.

        The processes of a site may have received states from different workers, which differ in their numbers of steps
        and in the states of their inner optimizers. So all processes use the number of steps that process 0 has
        received. If each process has the whole model, all processes use the whole state that process 0 has received.
        """
        if (state := self._received) is not None:
            self._received = None
            site = self._own.site
            shared = state if site.has_replicas else {"steps": state["steps"]}
            self._load({**state, **site.send(shared, 0)})

    def discard_received(self) -> None:
        """Discard the received state, if there is one, since other processes of this site may have received none. This
        worker receives a state again at the next quorum."""
        if self._received is not None:
            self._received = None
            self._quorum.mark_as_behind()

    @torch.no_grad()
    def _load(self, state: Mapping[str, Any]) -> None:
        """Load the state of a worker that is ahead of this one.

        Unsent local updates are kept: the parameters move by as much as the anchor. In three cases the parameters are
        set to the start point instead: if the worker has never been in a round, if it was restored to a state from
        before its last round, or if the received anchor includes its local updates.
        """
        self._sigterm.hold()  # SIGTERM must not interrupt the loading
        self._check(state)
        own, account, is_new = self._own, self._own.account, not self._own.roster.past
        was = [(part, part.anchor.copy_starts()) for part in own.fragments]
        # Commit the exchanges in doubt if the other workers have committed this worker's last attempt at a round.
        # Otherwise roll these exchanges back.
        included = state["roster"]["included"].get(own.worker, 0)
        sent, applied = set[Fragment](), False
        if own.in_doubt is not None and included == account.attempts:
            ended = own.end(own.in_doubt)
            sent, applied = {each.part for each in ended}, all(each.applied for each in ended)
            account.included = account.attempts
        else:
            own.roll_back()
        is_stale = self._compare_attempts(included)
        # Move the parameters x with the anchor: x <- start + (x - before), where `before` is the start point before the
        # state is loaded, and `start` the one after that. If the new anchor includes the local update of this worker,
        # or if there is no local update to keep, x <- start.
        self._state.load(state)
        for part, before in was:
            if (part in sent and applied) or is_stale or is_new:
                part.anchor.move_to_start()
            else:
                part.anchor.move(before)
        if applied:
            account.start_count(own.weight())
        if is_new:
            self._begin_at(state)

    def _check(self, state: Mapping[str, Any]) -> None:
        """Raise ConfigError, with nothing changed, if the received state does not match this worker's arguments, or if
        this worker would lose rounds by loading it. Rounds would be lost if the state is from another run, or has fewer
        rounds of this run.

        A state of another run may arrive because torchft lets new workers begin a run of their own if the existing
        workers do not answer in time.
        """
        try:
            self._state.validate(state)
        except ValueError as error:  # a difference of arguments is the likely cause; they are compared only after this
            raise ConfigError(f"workers must be given the same arguments: {error}") from None
        mine, theirs = self._own.rounds, sum(part["rounds"] for part in state["fragments"])
        own_run, run = self._own.roster.run, state["roster"]["run"]
        # This worker may have committed one round that the other workers have rolled back. If that round was
        # uncompressed, it counts as one exchange for each fragment.
        if mine and (run != own_run or theirs < mine - len(self._own.fragments)):
            raise ConfigError(
                f"the state of the other workers (rounds: {theirs}, run: {run:x}) would replace that of this worker "
                f"(rounds: {mine}, run: {own_run:x}), which keeps its state. Restart the workers of the run that must "
                f"end, and set the lighthouse's --join_timeout_ms above connect(timeout=). With a checkpoint, load "
                f"manager.state_dict() too"
            )

    def _compare_attempts(self, included: int) -> bool:
        """Compare the numbers of two attempts at rounds by this worker. One is the last attempt at a round that was
        committed with its update, as this worker has recorded it. The other, `included`, is the same attempt as the
        other workers have recorded it.

        Returns True if `included` is later, as after a restore from a checkpoint. The updates in this worker's error
        memory were then sent before, so the memory is cleared. Returns False otherwise. If `included` is earlier, the
        updates that this worker has sent since `included` are lost.
        """
        own, account = self._own, self._own.account
        if included > account.included:
            _log.warning("worker %x has restored an error memory that it has sent since, and clears it", own.worker)
            for part in own.fragments:
                part.forget()
            account.start_count(own.weight())
            return True
        if included < account.included:
            _log.warning("worker %x was in a round that the others do not have: its update is lost", own.worker)
        return False

    def _begin_at(self, state: Mapping[str, Any]) -> None:
        """Set a new worker's number of steps to that in `state`, the received state, and load the states of the
        sender's inner optimizers, unless workers may have different optimizers."""
        self._own.steps = state["steps"]
        # Load the optimizers' states, since the first steps with the empty moments of a new optimizer would be too
        # large.
        if self._own.settings.compare_optimizers:
            try:
                load_states(self._inner, state["inner"])
            except ValueError as error:
                raise ConfigError(f"workers must be given the same inner optimizer: {error}") from None


class Greeting:
    """Exchanges the workers' `Hello` messages. From the hashes in these messages, it checks that the workers'
    arguments, their anchors (the parameters last agreed on) and the kind of their compressed messages are equal.

    Args:
        own: this worker's membership.
        quorum: forms the set of workers. A worker whose anchor differs from the anchor of most workers receives another
            worker's state at the next quorum.
        channel: the communicator of the workers.
    """

    def __init__(self, own: Membership, quorum: Quorum, channel: Communicator) -> None:
        self._own, self._quorum, self._channel = own, quorum, channel
        # The device of small messages, such as `Hello`: the CPU if the group copies all messages to the CPU anyway, and
        # otherwise the device of the anchor.
        device = own.fragments[0].anchor.flat.device
        self.device = torch.device("cpu") if channel.group.stages(device) else device
        # A function that returns, as text, the arguments of this worker that must be equal on all workers.
        self.arguments: Callable[[], str] = str
        self._arguments_hash = 0  # hash of the text of `arguments` when the worker joined

    def exchange(self, *, dense: bool, seconds: float) -> list[Hello]:
        """Exchange the Hello messages, and check that they match (see `_check`); collective. Returns the messages by
        rank.

        Args:
            dense: True if this worker requests a round in which all workers send all pending updates.
            seconds: this process's mean time of an inner step, in seconds; 0: unknown.
        """
        if not self._own.has_joined:
            self._arguments_hash = hash_of(self.arguments())
        mine = self._hello(dense=dense, seconds=seconds)
        with self._own.site.fails_together():
            gathered = self._channel.gather({"hello": mine.packed(self.device)}, fixed_size=True, purpose="members")
        hellos = [Hello.unpacked(parts["hello"]) for parts in gathered]
        self._check(hellos, mine)
        return hellos

    def _hello(self, *, dense: bool, seconds: float) -> Hello:
        own, account, every = self._own, self._own.account, self._own.due.options.compression.compare_every
        compared = every > 0 and own.rounds % every == 0
        # A worker that has not joined has weight 0: it only receives the mean. A worker that has not stepped since its
        # last round has weight 0 too, although it may have an error memory, or unsent updates of fragments that were
        # not in that round. In a round that sends all pending updates, such a worker has its last weight instead
        # (`idle_weight`), also if it has no pending updates and sends zeros.
        weight = own.weight() if own.has_joined else 0.0
        idle_weight = account.last_weight if own.has_joined and account.counted else 0.0
        checksum = int(torch.stack([fingerprint(p.anchor.flat) for p in own.fragments]).sum()) if compared else 0
        anchor, nanoseconds, pending = own.site.totals(
            *(checksum, round(1e9 * seconds), not weight and own.has_pending())
        )
        return Hello(
            worker=own.worker,
            arguments=self._arguments_hash,
            message=hash_of(self._message()),
            history=own.roster.history,
            anchor=anchor,
            run=own.roster.run,
            attempt=account.attempts,
            steps=account.since,
            dense=int(dense),
            has_pending=int(pending > 0),
            frozen=hash_of(as_text({"frozen": [part.frozen_next for part in own.fragments]})),
            weight=weight,
            idle_weight=idle_weight,
            seconds=nanoseconds / 1e9,
        )

    def _message(self) -> str:
        """Return a text that describes the message that this worker sends in the next compressed round. It contains
        packsaddle's version, the compressor, the number of coordinates d and the number of the round, and must be equal
        on all workers."""
        part = self._own.due
        compressor = part.options.compression.at(part.rounds)
        return as_text({"compressor": compressor, "d": part.d, "round": self._own.rounds})

    def _check(self, hellos: Sequence[Hello], mine: Hello) -> None:
        """Check that arguments, anchors and messages match on all workers. If they do not match, the right value is the
        one that most workers have or, in a tie, the one of the lowest rank. Messages are compared only if the anchors
        match.

        If arguments or messages differ, ConfigError is raised on the workers that do not have the right value, and
        RoundFailedError on the workers that have it. If anchors differ, RoundFailedError is raised on all workers. A
        worker that does not have the right anchor then loads another worker's state at the next quorum. In the first
        round of a worker, different anchors raise ConfigError on this worker instead.

        If two workers have one name, because both have loaded one checkpoint, ConfigError is raised on those of the two
        that have not joined, and RoundFailedError on all other workers.
        """
        names = [h.worker for h in hellos]
        if len(set(names)) < len(names):
            if names.count(mine.worker) > 1 and not self._own.has_joined:
                raise ConfigError(
                    f"another worker has loaded the checkpoint of worker {mine.worker:x}, whose updates would be sent "
                    f"twice: load it on one worker, and give each worker a checkpoint folder of its own"
                )
            raise RoundFailedError("two workers have loaded one checkpoint")
        if len({h.arguments for h in hellos}) > 1:
            text = self.arguments()
            self._compare("be given the same arguments", text, hellos)
            # No error was raised, so the current arguments are equal. The hashes are those at joining, and frozen
            # parameters have changed since some workers joined. So replace the hash.
            self._arguments_hash = hash_of(text)
        where = [(h.history, h.anchor) for h in hellos]
        if len(set(where)) == 1:
            if len({h.message for h in hellos}) > 1:
                self._compare("send messages of one kind", self._message(), hellos)
            return
        own = self._own
        if not own.roster.past:
            ensure = "set the same seed on all" if own.site.size > 1 else "use a Manager with init_sync=True"
            raise ConfigError(f"workers must begin at the same parameters: {ensure}")
        if (mine.history, mine.anchor) != most(where):
            _log.warning("worker %x replaces its anchor, which differs from the other workers' anchors", own.worker)
            self._quorum.mark_as_behind()
        raise RoundFailedError("workers have different anchors")

    def _compare(self, must: str, text: str, hellos: Sequence[Hello]) -> None:
        """Compare `text`, such as this worker's arguments, with the other workers' texts, and raise an error unless all
        texts are equal. `must` completes the message "workers must ...". Collective.

        The error names a worker whose text is not the most frequent one, and the first line in which its text differs
        from the most frequent one. It is a ConfigError on every worker whose text is not the most frequent one, and a
        RoundFailedError on all other workers.
        """
        with self._own.site.fails_together():
            texts = self._channel.gather_text(text, self.device, "members")
        usual, mine = most(texts), self._channel.group.rank
        if len(set(texts)) == 1:
            return
        other = mine if texts[mine] != usual else next(i for i, found in enumerate(texts) if found != usual)
        pairs = zip_longest(texts[other].split("\n"), usual.split("\n"), fillvalue="nothing more")
        here, there = next(pair for pair in pairs if pair[0] != pair[1])
        error = f"workers must {must}, but worker {hellos[other].worker:x} has {here} and the others have {there}"
        raise ConfigError(error) if other == mine else RoundFailedError(error)
