"""With whom a worker exchanges its local updates: `WorkerSet` is what `LocalUpdates` needs of a set of workers, and
`FixedWorkers` is the set of workers that do not change. (`ElasticWorkers` join and leave, see `local.elastic`.)

Fixed workers run the same collectives at the same points of a schedule. `Lockstep` checks before each collective that
all of them make the same call at the same step.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import partial
from itertools import groupby
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, as_text, check_agreement, hash_of
from packsaddle.comm.failures import PeerLostError, names_call
from packsaddle.comm.group import Group
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.sharding import local_part
from packsaddle.comm.sites import SiteGroup, group_of_workers
from packsaddle.compressors import Compressor, describe, identify
from packsaddle.feedback.background import Background
from packsaddle.feedback.checks import DriftGuard, fingerprint
from packsaddle.feedback.state import Value, attribute, skip
from packsaddle.local.after import Reactions
from packsaddle.local.anchor import OuterOptimizer
from packsaddle.local.fragment import Fragment
from packsaddle.local.options import LocalOptions, Workers
from packsaddle.local.round import (
    Begun,
    Ended,
    SavedExchange,
    Sent,
    apply,
    begin,
    check_saved,
    close,
    exchange,
    loaded,
    roll_back,
    saved,
    share_of,
    unapplied,
)
from packsaddle.local.schedule import Pacing, Progress, Schedule, StepClock
from packsaddle.local.watch import check_first_step
from packsaddle.numerics.devices import Readback, to_device, wide

T = TypeVar("T")
_log = logging.getLogger("packsaddle")
# Advice for the error that an argument differs between workers, by the first characters of the argument's name.
_HINTS = {
    "every=": "For workers of different speeds, keep `every` equal and set workers=Workers(weight='steps'), with which "
    "a slow worker makes fewer steps in a round, or give the faster workers larger batches and "
    "workers=Workers(weight=examples in a batch)",
    "optimizer[": "If they should differ, set workers=Workers(compare_optimizers=False) on all workers",
}
Call = Literal[
    "exchanges a round",
    "calls flush()",
    "calls error()",
    "compares anchors",
    "checks its first step",
    "calls average()",
    "calls flush(compressor)",
    "saves a checkpoint",
    "loads a checkpoint",
]
_CALLS = get_args(Call)
_EQUAL_LENGTHS = "make the data equally long (drop_last=True, DistributedSampler)"
_LOST = (
    "If worker {rank} alone made this call (`if rank == 0:`), or alone made LocalUpdates, do it on every worker; "
    "if the others ended after fewer steps, {advice}"
)


@dataclass(frozen=True)
class Connection:
    """A worker's connection to the other workers: their process group, and the communicator of exchanges."""

    group: Group  # the process group of the workers
    within: Group | None  # the processes of this worker if it has several (a site); None: the worker is one process
    # The communicator of exchanges. If exchanges have a delay, it has a process group of its own, which only the
    # background thread uses.
    channel: Communicator
    behind: Background | None  # runs the exchanges that overlap with inner steps; None: no exchange overlaps


class WorkerSet(Protocol):
    """The workers of a run, as one of them has them."""

    channel: Communicator  # the communicator of exchanges
    steps: int  # the number of inner steps of this worker
    exchanging: bool  # see `LocalUpdates.exchanging`
    is_shared: bool  # True if there are other workers, or may be later
    warns_at_end: bool  # True if this worker warns about steps that are not exchanged when the training ends
    logs_clips: bool  # True if this worker logs the workers' clipped updates

    def start(
        self,
        reactions: Reactions,
        same: Mapping[str, object],
        parameters: Mapping[str, Tensor],
        untrained: Sequence[tuple[str, Tensor]],
    ) -> None:
        """Prepare the workers for training. `reactions` are called at the end of each round. The arguments `same` must
        be equal on all workers, and so must the initial values of the parameters and of the `untrained` tensors."""

    def enter(self) -> bool:
        """Join the run, unless this worker has joined already. Returns True if it joined now. In that case, its
        parameters may have been replaced by those of the other workers."""

    def after_step(self, steps: int, parameters: Iterable[Tensor]) -> None:
        """Run what is due after inner step number `steps`: exchanges that begin or end, and after the first step the
        check of the `parameters`, which have the gradients of that step."""

    def flush(self, compressor: Compressor | None, steps: int) -> bool:
        """Exchange all pending updates (see `LocalUpdates.flush`); collective. Returns True if all exchanges were
        applied, and False if at least one was rejected."""

    def wait(self) -> None:
        """Wait until the exchanges that run in the background have ended. Their results are not applied here, but at
        the steps at which they are due."""

    def unapplied(self) -> list[Tensor]:
        """Return this worker's updates that the anchor, on which all workers last agreed, does not include yet: one
        vector, float[n], for each fragment (part of the model). Waits for running exchanges."""

    def begun_at(self, part: Fragment) -> list[Tensor]:
        """Return the parameters of a fragment at the beginning of its running exchange, if there is one and they are
        valid; otherwise []."""

    def check_call(self, call: "Call", steps: int) -> None:
        """Raise RuntimeError on all workers of a fixed set unless all of them are about to make the same collective
        `call`, such as "saves a checkpoint". The bytes of this check are not recorded in the ledger."""

    @property
    def has_joined(self) -> bool:
        """True if this worker has joined a run that was in progress, so its parameters are those of the run."""

    @property
    def workers(self) -> int:
        """The number of workers."""

    @property
    def paces(self) -> Sequence[int]:
        """See `LocalUpdates.paces`."""

    def position(self, steps: int) -> int:
        """Return the number of inner steps, of all workers, that a run has made when this worker has made `steps`."""

    def identity(self) -> dict[str, Any]:
        """Return the values of the saved state that must be equal when it is saved and when it is loaded."""

    def fields(self) -> list[Value]:
        """Return the fields of the saved state that belong to the workers."""

    def abandon(self) -> None:
        """Roll back the exchanges that run in the background, and ignore their errors."""

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from the saved `state`. Call after its fields are loaded."""


@dataclass(frozen=True)
class Sending:
    """A round that is being exchanged, perhaps in the background."""

    begun: Begun
    call: "PendingCall[Sent]"


class FixedWorkers:
    """Runs the collectives of a fixed set of workers, mainly the rounds in which they average their local updates.

    Args:
        options: options of the local updates.
        to: the connection to the other workers.
        device: device of the anchor, the parameters on which all workers last agreed.
        fragments: the fragments of the model, each of which is exchanged separately.
        part_of: for each fragment, the index of its part of the model (see `partition`).
        inner: not used; elastic workers send the states of the inner optimizers to a newcomer.
        outer: the outer optimizer of the anchor, or None.
    """

    steps = 0
    has_joined = exchanging = False

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
        settings = options.workers
        assert isinstance(settings, Workers)
        self._settings, self._fragments, self._device = settings, fragments, device
        self._outer, self.channel = None if outer is None else outer.optimizer, to.channel
        group, overlap, spec = self.channel.group, options.overlap, options.compression
        self.is_shared, self.logs_clips = group.size > 1, group.rank == 0
        has_processes = getattr(to.group, "process_group", None) is not None
        self.warns_at_end = self.is_shared and to.group.rank == 0 and to.group.leads and has_processes
        # When: the schedule and, with weight="steps", the numbers of steps that workers make in a round. Unless the
        # user has fixed these numbers, a clock measures the time of this worker's steps.
        self._schedule = Schedule(options.every, overlap.delay, part_of, overlap.fragments)
        self._schedule.round_at(1)  # raises ValueError if `every` returns an invalid number
        self._pacing: Pacing | None = None
        if settings.weight == "steps":
            assert isinstance(options.every, int)
            self._pacing = Pacing.of(settings.steps, group.size, options.every)
            self._set_pace(0)
        is_timed = self._pacing is not None and settings.steps is None
        self._clock = StepClock(fragments[0].parameters[0].device if is_timed else None)
        # With whom: the collectives, and the weights of the workers by rank.
        norms, paced = settings.clip is not None, self._pacing is not None
        self._lockstep = Lockstep(self.channel, device, to.behind, norms=norms, paced=paced)
        self._checks = Lockstep(Communicator(group, Ledger()), device, to.behind, norms=norms, paced=paced)
        self._given_weights = [1.0] * group.size  # `Workers.weight` by rank, and 1 if it is not set
        self._has_schedule = not isinstance(spec.compressor, Compressor)
        self._drift = DriftGuard(spec.compare_every, self.channel, fragments[0].shards.digest)
        # The rounds that have begun and are not applied yet, at most one for each fragment.
        self._running: dict[Fragment, Sending | Ended] = {}

    @classmethod
    def connect(cls, options: LocalOptions, device: torch.device, *, is_split: bool) -> Connection:
        """Return this worker's connection to the other workers, as set by `options`. `device` is the device of the
        exchanged tensors. `is_split` is True if each process of the worker has only a part of the parameters."""
        assert isinstance(options.workers, Workers)
        group, within = group_of_workers(options.workers.group), None
        if isinstance(group, SiteGroup):
            within = group.within
            group = group.peers if is_split else group
        # With `offload` the exchanged tensors are on the CPU, where NCCL cannot exchange them.
        if not group.accepts(device):
            group = group.background(device) or group
        apart = group.background(device) if options.overlap.delay and group.size > 1 else None
        behind = None if apart is None else Background(device, blocks=apart.stages(device))
        return Connection(group, within, Communicator(apart or group, Ledger()), behind)

    def start(
        self,
        reactions: Reactions,
        same: Mapping[str, object],
        parameters: Mapping[str, Tensor],
        untrained: Sequence[tuple[str, Tensor]],
    ) -> None:
        """Prepare the workers for training; collective. Compares the arguments `same` between workers, gathers the
        workers' weights, and sets all parameters and untrained tensors to rank 0's values.

        `reactions` are called at the end of each round.
        """
        self._reactions = reactions
        tensors = [*parameters.values(), *(tensor for _, tensor in untrained)]
        with names_call("LocalUpdates(...)"):
            for site in self._fragments[0].shards.groups:
                check_agreement(Communicator(site, Ledger()), same, self._device, _HINTS, of="process")
            check_agreement(self.channel, same, self._device, _HINTS)
            weight = self._settings.weight
            if not (weight is None or weight == "steps"):
                mine = {"weight": torch.tensor([weight], dtype=wide(self._device), device=self._device)}
                gathered = self.channel.gather(mine, fixed_size=True, purpose="start")
                self._given_weights = [float(parts["weight"][0]) for parts in gathered]
            share_start(self.channel, tensors, self._device)

    def enter(self) -> bool:
        """No-op: the workers of a fixed set join at construction. Returns False, since no parameters were loaded."""
        return False

    # Rounds.

    def after_step(self, steps: int, parameters: Iterable[Tensor]) -> None:
        """Run the collectives that are due after inner step number `steps`: the check of the first step, and exchanges
        that begin or end. After the first step, `parameters` must have the gradients of that step."""
        self.steps = steps
        self._clock.steps += 1
        events = self._schedule.after(steps)
        # With weight="steps" only the exchange of the first fragment counts, which begins at the end of a round: the
        # exchanges of two other fragments may follow one step of a slow worker, and two steps of a fast one.
        self.exchanging = any(e.begins and (e.fragment == 0 or self._pacing is None) for e in events)
        if not events and steps > 1:
            return
        with self._clock.paused():
            if steps == 1:
                self._check_start("checks its first step", steps, parameters)
            for tick, due in groupby(events, lambda event: event.tick):
                for event in due:
                    part = self._fragments[event.fragment]
                    if event.begins:
                        self._begin(part, tick)
                    elif part in self._running:  # with a delay, a flush may have applied the exchange already
                        self._end(part)
                if self._pacing is not None and self._schedule.ends_round(tick):
                    self._change_paces(self._pacing)

    def _begin(self, part: Fragment, tick: int, flush: Compressor | None = None) -> None:
        """Begin a round of one fragment (parameters exchanged together) at `tick`, the current time of the schedule,
        and exchange its update. If exchanges have a delay, the exchange runs in the background. `flush` is the
        compressor of a flush, i.e. of an exchange of all pending updates, which has no delay. For an ordinary round
        `flush` is None."""
        call: Call = "calls flush()" if flush else "exchanges a round"
        delay = 0 if flush else self._schedule.delay
        is_timed = self._pacing is not None and not flush and self._schedule.ends_round(tick)
        nanoseconds = self._nanoseconds(part) if is_timed else 0
        begun = begin(part, tick + delay, self._weights, later=delay > 0, flush=flush)
        # If messages have variable sizes, the host reads the sizes before the exchange, and would hang if the workers'
        # calls did not match. So these calls must be compared before the exchange.
        sent = part.feedback.compressor
        try:
            pending = self._lockstep.start(
                *(call, tick, partial(exchange, begun, tick - 1, reports=self._lockstep.waits)),
                *(begun.exchanging.v if delay else None, begun.norm, sent if self._has_schedule else None),
                begun.frozen,
                may_be_late=delay > 0 or (sent is not None and sent.fixed_size),
                nanoseconds=nanoseconds,
            )
        except BaseException:
            roll_back(begun)
            raise
        self._running[part] = Sending(begun, pending)

    def _close(self, part: Fragment) -> Ended:
        """Wait for the exchange of the running round of a fragment, and close the round. Raises the errors of the
        exchange if it ran in the background. Further calls only return the result."""
        running = self._running[part]
        if isinstance(running, Sending):
            sent, call = running.call.wait(), running.call
            self._running[part] = running = close(sent, agrees=call.check(), times=call.times)
        return running

    def _end(self, part: Fragment) -> bool:
        """Close the running round of a fragment, apply it, and run what follows a round. Returns True if it was
        applied."""
        ended = self._close(part)
        del self._running[part]
        apply(ended, self._outer)
        if self._pacing is not None:
            self._pacing.measure(ended.times)
        if ended.applied and part is self._fragments[-1] and self._drift.due(ended.t):
            self._compare_anchors(ended)
        self._reactions(ended)
        return ended.applied

    def flush(self, compressor: Compressor | None, steps: int) -> bool:
        """Apply the running exchanges, then exchange all pending updates (see `LocalUpdates.flush`); collective.
        Returns True if all of these exchanges were applied, and False if at least one was rejected."""
        if steps == 0:
            self._check_start("calls flush()", 0, (), "LocalUpdates has counted no step; call the optimizer's step()")
        tick = self._schedule.tick(steps)
        if compressor is not None:
            self._check_flush(compressor, tick)
        applied = [self._end(part) for part in self._fragments if part in self._running]
        last = [(part, compressor or part.last_compressor()) for part in self._fragments]
        for part, each in last:
            part.use(each)
        for part, each in last:
            self._begin(part, tick, each)
            applied.append(self._end(part))
        for part in self._fragments:
            part.end_flush()
        return all(applied)

    def wait(self) -> None:
        for part in list(self._running):
            self._close(part)

    def begun_at(self, part: Fragment) -> list[Tensor]:
        running = self._running.get(part)
        if isinstance(running, Sending):
            return [] if running.begun.is_invalid else running.begun.before
        return [] if running is None or running.invalid else running.before

    def unapplied(self) -> list[Tensor]:
        """Return this worker's updates that the anchor, on which all workers last agreed, does not include yet: one
        vector, float[n], for each fragment (part of the model). Waits for running exchanges."""
        weight = self._share() / self.workers
        return [
            unapplied(part, self._close(part) if part in self._running else None, weight) for part in self._fragments
        ]

    def abandon(self) -> None:
        for running in self._running.values():
            if isinstance(running, Sending):
                with suppress(Exception):  # an error of the round does not matter, since the round is rolled back
                    running.call.wait()
                roll_back(running.begun)
        self._running.clear()

    # Weights and paces.

    @property
    def _weights(self) -> list[float]:
        """The weights of the workers in the mean, by rank. With weight="steps" they are the workers' paces."""
        return self._given_weights if self._pacing is None else list(map(float, self._pacing.steps))

    def _share(self) -> float:
        """Return the factor W w_i / sum_j w_j of this worker's update in a mean over all W workers."""
        return share_of(self._weights, self.channel.group.rank)

    def _change_paces(self, pacing: Pacing) -> None:
        """Apply the paces that were chosen for the rounds from now on, if they have changed. Call at the end of a
        round."""
        if pacing.steps != pacing.following:
            pacing.steps = pacing.following
            self._set_pace(self.steps)
            if self.channel.group.rank == 0:
                _log.info("after step %d workers make %s inner steps in a round", self.steps, pacing.steps)

    def _set_pace(self, step: int) -> None:
        """Apply the current paces, i.e. the numbers of inner steps that the workers make in a round, to this worker's
        schedule for the inner steps after number `step`."""
        assert self._pacing is not None
        self._schedule = self._schedule.paced(self._pacing.steps[self.channel.group.rank], step)

    def _nanoseconds(self, part: Fragment) -> int:
        """Return the mean time of an inner step of this worker since the last reading of its clock, in nanoseconds. If
        several processes have shards of the worker's model (`part` has their groups), the times of these processes are
        summed, so that all of them return the same number. Returns 0 if the time is unknown."""
        mine = to_device(torch.tensor([self._clock.read()]), self._device)
        return int(part.shards.total(mine))

    # Checks.

    def _check_start(self, call: "Call", steps: int, parameters: Iterable[Tensor], *hint: str) -> None:
        """Check that all workers have started at the same parameters (see `check_first_step`); collective."""
        anchors = [part.anchor.flat for part in self._fragments]
        run = partial(self._lockstep.run, call, steps)
        check_first_step(self.channel, anchors, parameters, run, self._fragments[0].shards.digest, *hint)

    def _compare_anchors(self, ended: Ended) -> None:
        """Compare the workers' anchors (the parameters on which all workers last agreed) with each other, after the
        applied round `ended`; collective. Raises DriftError if they differ."""

        def named() -> list[tuple[str, Tensor]]:
            return [(f"anchor of {p.name}", view) for f in self._fragments for p, view in f.named(f.anchor.flat)]

        anchors = [f.anchor.flat for f in self._fragments]
        compare = partial(self._drift.compare, ended.t, anchors, named)
        self._lockstep.run("compares anchors", ended.due - self._schedule.delay, compare)

    def _check_flush(self, compressor: Compressor, steps: int) -> None:
        """Raise TypeError or ValueError if the compressor is not valid for a flush, i.e. for an exchange of all pending
        updates, or if workers pass different compressors; collective."""
        is_one = isinstance(compressor, Compressor)
        arguments = {"compressor of flush": describe(compressor) if is_one else repr(compressor)}
        compare = partial(check_agreement, self.channel, arguments, self._device)
        self._lockstep.run("calls flush(compressor)", steps, compare)
        if not is_one:
            raise TypeError(
                f"compressor must be a packsaddle Compressor, such as Rounded(), or None, got {compressor!r}"
            )
        compressor.validate(sum(part.compressed_d for part in self._fragments))

    def mean(self, vectors: Sequence[Tensor], steps: int) -> Sequence[Tensor]:
        """Replace each vector with its mean over workers, weighted by `Workers.weight`, in place, and return the
        vectors; collective. Call after inner step number `steps`."""
        steps = self._schedule.tick(steps)
        for vector in vectors:
            vector.mul_(self._share())
            self._lockstep.run("calls error()", steps, partial(self.channel.mean, vector, "inspection"))
        return vectors

    def average(self, tensors: Iterable[Tensor], steps: int) -> None:
        """Replace each tensor with its mean over workers, in place (see `LocalUpdates.average`); collective. Call after
        inner step number `steps`."""
        tensors = list(tensors)
        for t in tensors:
            if not isinstance(t, Tensor):
                raise TypeError(f"tensors must be a module or tensors, and one is of type {type(t).__name__}")
        parts = [local_part(t) for t in tensors]
        means = [part for part in parts if part.is_floating_point()]
        same: dict[str, object] = {"number of tensors": len(parts)}
        same |= {f"tensors[{i}]": f"{list(part.shape)} {part.dtype}" for i, part in enumerate(parts)}

        def exchange() -> None:
            check_agreement(self.channel, same, self._device)
            self.channel.average(means, "average", weight=self._share())
            for part in parts:
                if not part.is_floating_point():
                    self.channel.broadcast(part, "average")

        self._lockstep.run("calls average()", self._schedule.tick(steps), exchange)

    def check_call(self, call: "Call", steps: int) -> None:
        """Raise RuntimeError on all workers unless all of them are about to make the same collective `call`, such as
        "saves a checkpoint"; collective. The bytes of this check are not recorded in the ledger."""
        self._checks.run(call, self._schedule.tick(steps), lambda: None)

    # Numbers of workers and steps, and the saved state.

    @property
    def workers(self) -> int:
        return self.channel.group.size

    @property
    def paces(self) -> Sequence[int]:
        """The number of inner steps of each worker in a round, by rank."""
        if self._pacing is not None:
            return self._pacing.steps
        return [self._schedule.round_at(self._schedule.tick(self.steps) + 1)[1]] * self.workers

    def position(self, steps: int) -> int:
        """Return the number of inner steps that all workers together have made when this worker has made `steps` steps.
        If workers make different numbers of steps in a round, only the steps of complete rounds count."""
        if self._pacing is None:
            return steps * self.workers
        start, _ = self._schedule.round_at(self._schedule.tick(steps) + 1)
        return start // self._pacing.every * sum(self._pacing.steps)

    def identity(self) -> dict[str, Any]:
        group, is_paced = self.channel.group, self._pacing is not None
        same = {"every": self._schedule.periods(), "delay": self._schedule.delay, "fragments": len(self._fragments)}
        return {**same, "rank": group.rank, "workers": group.size, "weight_by_steps": is_paced}

    def fields(self) -> list[Value]:
        share = Value(("share",), float, self._share, skip)
        pacing = [] if self._pacing is None else [attribute(("pacing",), self, "_pacing", Pacing)]
        schedule = Value(
            *(("schedule",), Progress, lambda: self._schedule.progress(self.steps)),
            *(self._load_progress, self._schedule.check),
        )
        exchanges = [
            Value(
                *(("fragments", i, "exchange"), SavedExchange | None),
                *(partial(self._saved_exchange, part), partial(self._load_exchange, part)),
                partial(_check_exchange, part),
            )
            for i, part in enumerate(self._fragments)
        ]
        return [share, *pacing, schedule, *exchanges]

    def _saved_exchange(self, part: Fragment) -> SavedExchange | None:
        return saved(self._close(part)) if part in self._running else None

    def _load_exchange(self, part: Fragment, found: SavedExchange | None) -> None:
        if found is not None:
            self._running[part] = loaded(part, found)

    def _load_progress(self, found: Progress) -> None:
        """Restore the progress of the schedule of exchanges. If the number of workers has changed since it was saved,
        restart with new paces, i.e. numbers of inner steps of the workers in a round. Call after the saved paces are
        loaded."""
        self.steps, self._schedule = found.step, self._schedule.resumed(found)
        if self._pacing is not None:
            fresh = Pacing.of(self._settings.steps, self.workers, self._pacing.every)
            if len(self._pacing.steps) != self.workers:
                self._pacing = fresh
            elif self._settings.steps is not None:
                self._pacing.following = fresh.steps
            # If the number of workers has changed, the saved pace is another worker's.
            if found.pace != self._pacing.steps[self.channel.group.rank]:
                self._set_pace(self.steps)
        events = self._schedule.after(self.steps)
        self.exchanging = any(e.begins and (e.fragment == 0 or self._pacing is None) for e in events)

    def resume(self, state: Mapping[str, Any]) -> None:
        for part, found in zip(self._fragments, state["fragments"], strict=True):
            running = self._running.get(part)
            part.resume(found, running.frozen if isinstance(running, Ended) and running.applied else None)
        self._drift.resume(self._fragments[-1].rounds)


def _check_exchange(part: Fragment, found: SavedExchange | None) -> None:
    if found is not None:
        check_saved(part, found)


@torch.no_grad()
def share_start(channel: Communicator, tensors: Sequence[Tensor], device: torch.device) -> None:
    """Set tensors to rank 0's values, in place; collective. Fingerprints of 8 bytes per tensor are gathered first, as
    tensors on `device`, and only the tensors whose fingerprints differ between workers are broadcast."""
    if channel.group.size == 1:
        return
    parts = [local_part(p) for p in tensors]
    prints = torch.stack([fingerprint(part).cpu() for part in parts]).to(device)
    gathered = [p["prints"] for p in channel.gather({"prints": prints}, fixed_size=True, purpose="start")]
    differs = torch.stack([row != gathered[0] for row in gathered]).any(0).tolist()
    for part, differ in zip(parts, differs, strict=True):
        if differ:
            channel.broadcast(part, "start")


@dataclass(frozen=True)
class Header:
    """The integers that each worker sends before a collective, to check that all workers make the same call."""

    call: int  # index of the call in `Call`
    steps: int  # number of inner steps; with `Workers(weight="steps")` of ticks (see `Schedule`)
    compressor: int  # hash of the compressor; 0: the compressors are not compared
    frozen: int  # hash of the names of the frozen parameters
    nanoseconds: int = 0  # time of an inner step, sent only with `Workers(weight="steps")`; 0: unknown

    def packed(self, device: torch.device, size: int) -> Tensor:
        return to_device(torch.tensor(astuple(self)[:size]), device)


_SIZE = len(fields(Header)) - 1  # number of integers in a header, not counting the time
HEADER = 8 * _SIZE  # bytes of a header, not counting the time


@dataclass(frozen=True)
class PendingCall(Generic[T]):
    """A collective that was started, and the check, to be made after it, that all workers made the same call."""

    wait: Callable[[], T]  # waits for the collective, and returns its result or raises its error
    # Compares the calls, and returns True if the frozen parameters are identical on all workers. Call after `wait`.
    check: Callable[[], bool]
    # Nanoseconds per inner step of each worker, by rank; 0: unknown. Read the list after `check`, which completes it.
    times: list[int]


class Lockstep:
    """Runs collectives in the order of their calls, each after a check that all workers make the same call at the same
    step; the ledger records the bytes of the check as "guard". Without the check, if workers made different calls,
    collectives of different sizes would be paired: gloo would abort the process, and NCCL would hang. If the compressor
    is a function of the round, the check also compares the compressors that the function returns.

    `behind` runs collectives in a background thread, so that they overlap with inner steps; if it is None, collectives
    run in the calling thread. With `norms`, every check also sends the norm of the worker's update (0 in calls without
    an update), so that the checks of all calls have the same size. With `paced`, every check also sends the time of an
    inner step, and no warning is logged if calls other than exchanges follow different numbers of steps on different
    workers.
    """

    def __init__(
        self, channel: Communicator, device: torch.device, behind: Background | None, *, norms: bool, paced: bool
    ) -> None:
        self._channel, self._device, self._background, self._norms = channel, device, behind, norms
        self._size, self._has_warned = _SIZE + paced, paced
        # True if the host waits within collectives on this device anyway, so that a check before the work adds no wait.
        self.waits = device.type == "cpu" or channel.group.stages(device)

    def run(self, call: Call, steps: int, work: Callable[[], object]) -> None:
        """Run the collective `work` after all collectives that were started before, and raise the errors of `work`.
        `call` is the name of this worker's call, and `steps` its number of steps.

        Raises RuntimeError if `call` differs between workers, or if the call is the exchange of a round and `steps`
        differs.
        """
        started = self.start(call, steps, work)
        started.wait()
        started.check()

    def start(
        self,
        call: Call,
        steps: int,
        work: Callable[..., T],
        result: Tensor | None = None,
        norm: Tensor | None = None,
        compressor: Compressor | None = None,
        frozen: Sequence[str] = (),
        *,
        may_be_late: bool = False,
        nanoseconds: int = 0,
    ) -> PendingCall[T]:
        """Start the collective `work`, in the background if there is a background thread. Returns the pending call,
        which the caller waits for and then checks. `result` is the tensor that `work` computes, or None.

        The methods `wait` and `check` of the returned call raise the errors that `run` would raise. `check` returns
        True if all workers have the same `frozen` parameters. With `may_be_late`, on a GPU over NCCL, the workers'
        calls are compared only in `check`, so that the host does not wait for the GPU in `start`. If a `compressor` is
        given, the calls are always compared before `work`.

        `norm`, float32[1], the norm of this worker's update, is gathered together with the workers' calls. Then `work`
        is called with all workers' norms, float32[W].
        """
        is_late = may_be_late and compressor is None and not self.waits
        unchecked: list[Readback] = []
        agreed, times, results = [True], list[int](), list[T]()

        def checked() -> None:
            if self._channel.group.size == 1:
                results.append(work(*([] if norm is None else [norm])))
                return
            hashed = 0 if compressor is None else hash_of(as_text(identify(compressor)))
            same = hash_of(as_text({"frozen": frozen}))
            mine = Header(_CALLS.index(call), steps, hashed, same, nanoseconds)
            headers, norms = self._gather(mine, norm)
            # If the headers are compared after `work`, start to copy them to the host before it, so that the copy
            # completes even if the workers' calls do not match and `work` hangs.
            if is_late:
                unchecked.append(Readback(headers))
            else:
                agreed.append(self._check(headers.tolist(), compressor, times))
            results.append(work(*norms))  # called without arguments if `norm` is None

        promise = None if self._background is None else self._background.promise()
        if self._background is None or promise is None:
            checked()
        else:
            # The result of the Future must be on the device, since a Future of a CPU tensor has no CUDA event on which
            # the current stream could wait.
            done = torch.zeros(0, device=self._device) if result is None else result
            self._background.submit(checked, [(promise, done)])

        def check() -> bool:
            while unchecked:
                agreed.append(self._check(unchecked.pop().tolist(), compressor, times))
            return all(agreed)

        def wait() -> T:
            if promise is not None:
                promise.future.wait()
            return results[0]

        return PendingCall(wait, check, times)

    def _gather(self, header: Header, norm: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Gather the workers' headers, i.e. their calls and numbers of steps (see `Header`); collective. Returns the
        headers, int64[W, 4], or int64[W, 5] if they include the time of a step, and a list. The list has the workers'
        norms, float32[W], or is empty if `norm` is None."""
        call, steps = _CALLS[header.call], header.steps
        mine = {"header": header.packed(self._device, self._size)}
        if self._norms:
            mine["norm"] = torch.zeros(1, device=self._device) if norm is None else norm
        self._channel.step = max(self._channel.step, steps - 1)
        try:
            gathered = self._channel.gather(mine, fixed_size=True, purpose="guard")
        except PeerLostError as error:
            rank = self._channel.group.rank
            advice = _LOST.format(rank=rank, advice=_EQUAL_LENGTHS)
            raise PeerLostError(f"{error}. It was when worker {rank} {call} after step {steps}. {advice}") from error
        headers = torch.stack([parts["header"] for parts in gathered])
        return headers, [] if norm is None else [torch.cat([parts["norm"] for parts in gathered])]

    def _check(self, headers: list[list[int]], compressor: Compressor | None, times: list[int]) -> bool:
        """Compare the workers' `headers`, i.e. their calls and numbers of steps (see `Header`), and append each
        worker's time of an inner step to `times`. `compressor` is this worker's compressor, for the error message.
        Returns True if all workers have the same frozen parameters. Raises RuntimeError as `run` does.

        In a call other than an exchange, such as `flush`, workers may have made different numbers of steps; rank 0 then
        logs a warning.
        """
        # Find the first worker whose call differs from worker 0's. If there is none, find the first whose number of
        # steps differs, and otherwise the first whose compressor differs.
        first, *_ = rows = [Header(*row) for row in headers]
        times += [row.nanoseconds for row in rows]
        agreed = len({row.frozen for row in rows}) == 1
        compared = ("call", "steps", "compressor")
        unlike = [i for key in compared for i, row in enumerate(rows) if getattr(row, key) != getattr(first, key)]
        if not unlike:
            return agreed
        other = rows[unlike[0]]
        call, their_call = _CALLS[first.call], _CALLS[other.call]
        found = (
            f"worker 0 {call} after step {first.steps}, and worker {unlike[0]} {their_call} after step {other.steps}"
        )
        if call != their_call or (call == "exchanges a round" and first.steps != other.steps):
            raise RuntimeError(
                f"{found}: all workers must make the same calls after the same number of optimizer steps. If their "
                f"data have different lengths, {_EQUAL_LENGTHS}; pass scaler= if a GradScaler skips steps"
            )
        if first.compressor != other.compressor:
            assert compressor is not None
            raise RuntimeError(
                f"workers 0 and {unlike[0]} have different compressors in the exchange after step {first.steps}, on "
                f"worker {self._channel.group.rank} {describe(compressor)}: a schedule must depend on the round alone"
            )
        # If only the steps differ, the collectives still match, so no worker hangs.
        if self._channel.group.rank == 0 and not self._has_warned:
            self._has_warned = True
            _log.warning("%s: their numbers of rounds are equal, but not those of optimizer steps", found)
        return agreed
