"""Local updates of a fixed set of workers, all of which run the same collectives at the same points of a schedule."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, check_agreement
from packsaddle.comm.failures import names_call
from packsaddle.comm.group import Group
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.managed import ManagedGroup
from packsaddle.comm.sharding import local_part
from packsaddle.comm.sites import SiteGroup, group_of_workers
from packsaddle.compressors import Compressor, describe
from packsaddle.feedback.background import Background
from packsaddle.feedback.state import Value, attribute, skip
from packsaddle.local.after import Reactions
from packsaddle.local.fragment import Fragment
from packsaddle.local.lockstep import Call, Lockstep
from packsaddle.local.options import Elastic, LocalOptions, Workers
from packsaddle.local.pace import Pacing, StepClock
from packsaddle.local.round import LocalRound, share_of
from packsaddle.local.schedule import Schedule
from packsaddle.local.start import check_first_step, share_start
from packsaddle.numerics.devices import to_device, wide

_log = logging.getLogger("packsaddle")
# Advice for the error that an argument differs between workers, by the first characters of the argument's name.
_HINTS = {
    "every=": "For workers of different speeds, keep `every` equal and set workers=Workers(weight='steps'), with which "
    "a slow worker makes fewer steps in a round, or give the faster workers larger batches and "
    "workers=Workers(weight=examples in a batch)",
    "optimizer[": "If they should differ, set workers=Workers(compare_optimizers=False) on all workers",
}


@dataclass(frozen=True)
class Connection:
    """A worker's connection to the other workers: their process group, and the communicator of exchanges."""

    group: Group  # the process group of the workers
    within: Group | None  # the processes of this worker if it has several (a site); None: the worker is one process
    # The communicator of exchanges. If exchanges have a delay, it has a process group of its own, which only the
    # background thread uses.
    channel: Communicator
    behind: Background | None  # runs the exchanges that overlap with inner steps; None: no exchange overlaps

    @classmethod
    def of(cls, options: LocalOptions, device: torch.device, *, is_split: bool) -> "Connection":
        """Return this worker's connection to the other workers, as set by `options`. `device` is the device of the
        exchanged tensors. `is_split` is True if each process of the worker has only a part of the parameters."""
        workers = options.workers
        group: Group
        if isinstance(workers, Elastic):
            group = managed = workers.group or ManagedGroup(workers.manager)
            within = managed.site if managed.site.size > 1 else None
            if within is not None and not is_split:
                group = SiteGroup(within, managed)
            return cls(group, within, Communicator(group, Ledger()), None)
        group, within = group_of_workers(workers.group), None
        if isinstance(group, SiteGroup):
            within = group.within
            group = group.peers if is_split else group
        # With `offload` the exchanged tensors are on the CPU, where NCCL cannot exchange them.
        if not group.accepts(device):
            group = group.background(device) or group
        apart = group.background(device) if options.overlap.delay and group.size > 1 else None
        behind = None if apart is None else Background(device, blocks=apart.stages(device))
        return cls(group, within, Communicator(apart or group, Ledger()), behind)


class FixedWorkers:
    """Runs the collectives of a fixed set of workers, mainly the rounds in which they average their local updates.

    Args:
        options: options of the local updates.
        to: the connection to the other workers.
        device: device of the anchor, the parameters on which all workers last agreed.
        fragments: the parts of the model, each of which is exchanged separately.
        schedule: the steps after which each fragment is exchanged.
        outer: the outer optimizer of the anchor, or None.
    """

    steps = 0  # the number of inner steps of this worker
    has_joined = False

    def __init__(
        self,
        options: LocalOptions,
        to: Connection,
        device: torch.device,
        fragments: Sequence[Fragment],
        schedule: Schedule,
        outer: Optimizer | None,
    ) -> None:
        settings = options.workers
        assert isinstance(settings, Workers)
        self._settings, self._fragments, self._schedule, self._outer = settings, fragments, schedule, outer
        self.channel, self._device = to.channel, device
        group = self.channel.group
        has_norms, paced = settings.clip is not None, settings.weight == "steps"
        self.lockstep = Lockstep(self.channel, device, to.behind, norms=has_norms, paced=paced)
        self._checks = Lockstep(Communicator(group, Ledger()), device, to.behind, norms=has_norms, paced=paced)
        self._given_weights = [1.0] * group.size  # `Workers.weight` by rank, and 1 if it is not set
        # With weight="steps", workers make different numbers of steps in a round. Unless the user has fixed these
        # numbers, a clock measures the time of this worker's steps.
        self._is_paced, self._pacing = paced, Pacing.of(settings.steps, group.size, schedule.every)
        self._clock = StepClock(fragments[0].parameters[0].device if paced and settings.steps is None else None)
        self._set_pace(0)
        self._has_schedule = not isinstance(options.compression.compressor, Compressor)

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

    def after_step(self, steps: int, parameters: Iterable[Tensor]) -> None:
        """Run the collectives that are due after inner step number `steps`: the check of the first step, and exchanges
        that begin or end. After the first step, `parameters` must have the gradients of that step."""
        self.steps = steps
        self._clock.steps += 1
        events = self._schedule.after(steps)
        if not events and steps > 1:
            return
        with self._clock.paused():
            if steps == 1:
                self._check_start("checks its first step", steps, parameters)
            for tick, due in groupby(events, lambda event: event.tick):
                self._run(tick, [(self._fragments[e.fragment], e.begins) for e in due])

    def _check_start(self, call: Call, steps: int, parameters: Iterable[Tensor], *hint: str) -> None:
        """Check that all workers have started at the same parameters (see `check_first_step`); collective."""
        anchors = [part.anchor.flat for part in self._fragments]
        run = partial(self.lockstep.run, call, steps)
        check_first_step(self.channel, anchors, parameters, run, self._fragments[0].shards.digest, *hint)

    def _run(self, tick: int, due: Sequence[tuple[Fragment, bool]]) -> None:
        """Begin or end the exchanges that are due at one `tick`, the schedule's unit of time, of which a round has
        `every`. `due` has pairs of a fragment (parameters exchanged together) and a bool, which is True if the exchange
        of the fragment begins and False if the exchange ends."""
        for part, begins in due:
            if begins:
                self._begin(part, tick)
            elif part.current is not None:  # with a delay, a flush may have applied the exchange already
                self._end(part)
        if tick % self._schedule.every == 0 and self._pacing.steps != self._pacing.following:
            self._pacing.steps = self._pacing.following
            self._set_pace(self.steps)
            if self.channel.group.rank == 0:
                _log.info("after step %d workers make %s inner steps in a round", self.steps, self.paces)

    def _set_pace(self, step: int) -> None:
        """Apply the current paces, i.e. the numbers of inner steps that the workers make in a round, to this worker's
        schedule for the inner steps after number `step`."""
        self._schedule = self._schedule.paced(self.paces[self.channel.group.rank], step)

    @property
    def _weights(self) -> list[float]:
        """The weights of the workers in the mean, by rank. With weight="steps" they are the workers' paces."""
        return list(map(float, self.paces)) if self._is_paced else self._given_weights

    def _share(self) -> float:
        """Return the factor W w_i / sum_j w_j of this worker's update in a mean over all W workers."""
        return share_of(self._weights, self.channel.group.rank)

    def _nanoseconds(self, part: Fragment) -> int:
        """Return the mean time of an inner step of this worker since the last reading of its clock, in nanoseconds. If
        several processes have shards of the worker's model (`part` has their groups), the times of these processes are
        summed, so that all of them return the same number. Returns 0 if the time is unknown."""
        mine = to_device(torch.tensor([self._clock.read()]), self._device)
        return int(part.shards.total(mine))

    def _begin(self, part: Fragment, tick: int, flush: Compressor | None = None) -> None:
        """Begin a round of one fragment (parameters exchanged together) at `tick`, the current time of the schedule. If
        exchanges have a delay, the round runs in the background. `flush` is the compressor of a flush, i.e. of an
        exchange of all pending updates. For an ordinary round `flush` is None."""
        # A flush has no delay.
        call: Call = "calls flush()" if flush else "exchanges a round"
        delay = 0 if flush else self._schedule.delay
        is_timed = self._is_paced and not flush and tick % self._schedule.every == 0
        nanoseconds = self._nanoseconds(part) if is_timed else 0
        r = LocalRound.begin(part, tick + delay, self._weights, later=delay > 0, flush=flush)
        assert r.exchanged is not None
        compressor = part.feedback.compressor if self._has_schedule else None
        result = r.exchanged.v if delay else None
        exchange = partial(r.exchange, tick - 1)
        # If messages have variable sizes, the host reads the sizes before the exchange, and would hang if the workers'
        # calls did not match. So these calls must be compared before the exchange.
        sent = part.feedback.compressor
        may_be_late = delay > 0 or (sent is not None and sent.fixed_size)
        r.call = self.lockstep.start(
            *(call, tick, exchange, result, r.norm, compressor, r.frozen),
            may_be_late=may_be_late,
            nanoseconds=nanoseconds,
        )

    def _end(self, part: Fragment) -> bool:
        r = part.apply_round(self._outer)
        self._pacing.measure(r.call.times)
        self._reactions(r)
        return bool(r.applied)

    def flush(self, compressor: Compressor | None, steps: int) -> bool:
        """Apply the running exchanges, then exchange all pending updates (see `LocalUpdates.flush`); collective.
        Returns True if all of these exchanges were applied, and False if at least one was rejected."""
        if steps == 0:
            self._check_start("calls flush()", 0, (), "LocalUpdates has counted no step; call the optimizer's step()")
        steps = self._schedule.tick(steps)
        if compressor is not None:
            self._check_flush(compressor, steps)
        applied = [self._end(part) for part in self._fragments if part.current is not None]
        last = [(part, compressor or part.last_compressor()) for part in self._fragments]
        for part, each in last:
            part.use(each)
        for part, each in last:
            self._begin(part, steps, each)
            applied.append(self._end(part))
        for part in self._fragments:
            part.end_flush()
        return all(applied)

    def _check_flush(self, compressor: Compressor, steps: int) -> None:
        """Raise TypeError or ValueError if the compressor is not valid for a flush, i.e. for an exchange of all pending
        updates, or if workers pass different compressors; collective."""
        is_one = isinstance(compressor, Compressor)
        arguments = {"compressor of flush": describe(compressor) if is_one else repr(compressor)}
        compare = partial(check_agreement, self.channel, arguments, self._device)
        self.lockstep.run("calls flush(compressor)", steps, compare)
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
            self.lockstep.run("calls error()", steps, partial(self.channel.mean, vector, "inspection"))
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

        self.lockstep.run("calls average()", self._schedule.tick(steps), exchange)

    def check_call(self, call: Call, steps: int) -> None:
        """Raise RuntimeError on all workers unless all of them are about to make the same collective `call`, such as
        "saves a checkpoint"; collective. The bytes of this check are not recorded in the ledger."""
        self._checks.run(call, self._schedule.tick(steps), lambda: None)

    def exchanging(self, steps: int) -> bool:
        """Return True if the schedule begins an exchange after this worker's inner step number `steps`. With
        weight="steps" only the exchange of the first fragment counts, which begins at the end of a round: the exchanges
        of two other fragments may follow one step of a slow worker, and two steps of a fast one."""
        return any(e.begins and (e.fragment == 0 or not self._is_paced) for e in self._schedule.after(steps))

    def join(self) -> NoReturn:
        raise RuntimeError(_FOR_ELASTIC.format("join"))

    def leave(self) -> NoReturn:
        raise RuntimeError(_FOR_ELASTIC.format("leave"))

    # Numbers of workers and steps, and the saved state.

    @property
    def workers(self) -> int:
        return self.channel.group.size

    @property
    def paces(self) -> list[int]:
        """The number of inner steps of each worker in a round, by rank."""
        return self._pacing.steps

    def position(self, steps: int) -> int:
        """Return the number of inner steps that all workers together have made when this worker has made `steps` steps.
        If workers make different numbers of steps in a round, only the steps of complete rounds count."""
        schedule = self._schedule
        return schedule.tick(steps) // schedule.every * sum(self.paces) if self._is_paced else steps * self.workers

    def identity(self) -> dict[str, Any]:
        group = self.channel.group
        return {"rank": group.rank, "workers": group.size, "weight_by_steps": self._is_paced}

    def fields(self) -> list[Value]:
        share = Value(("share",), float, self._share, skip)
        schedule = Value(("schedule",), Schedule, lambda: self._schedule, self._load_schedule)
        return [share, attribute(("pacing",), self, "_pacing", Pacing), schedule]

    def _load_schedule(self, saved: Schedule) -> None:
        """Restore the saved schedule of exchanges. If the number of workers has changed since the schedule was saved,
        restart with new paces, i.e. numbers of inner steps of the workers in a round. Call after the saved paces are
        loaded."""
        self._schedule = saved
        fresh = Pacing.of(self._settings.steps, self.workers, saved.every)
        if len(self.paces) != self.workers:
            self._pacing = fresh
        elif self._settings.steps is not None:
            self._pacing.following = fresh.steps
        # If the number of workers has changed, the saved pace is another worker's.
        if saved.pace != self.paces[self.channel.group.rank]:
            self._set_pace(self.steps)


_FOR_ELASTIC = "{} is for workers that come and go: LocalUpdates(..., workers=Elastic(...))"
