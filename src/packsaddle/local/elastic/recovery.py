"""The state that a worker sends to a worker that is behind, i.e. that misses committed rounds, and the loading of a
received state."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from packsaddle.errors import ConfigError
from packsaddle.feedback.optimizers import load_states, local_state
from packsaddle.feedback.state import Rule, State, Value, Vector
from packsaddle.local.elastic.membership import Membership
from packsaddle.local.elastic.quorum import Quorum
from packsaddle.local.elastic.sigterm import Sigterm
from packsaddle.local.fragment import Fragment
from packsaddle.local.outer import OuterOptimizer

_log = logging.getLogger("packsaddle")


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
        if own.in_doubt and included == account.attempts:
            sent, applied = set(own.in_doubt), own.close_exchanges()
            account.included = account.attempts
        else:
            own.roll_back()
        is_stale = self._compare_attempts(included)
        # Move the parameters x with the anchor: x <- start + (x - before), where `before` is the start point before the
        # state is loaded, and `start` the one after that. If the new anchor includes the local update of this worker,
        # or if there is no local update to keep, x <- start.
        self._state.load(state)
        for part, before in was:
            part.current = None
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
                part.feedback.reset()
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
