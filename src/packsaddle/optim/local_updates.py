"""LocalUpdates: workers step separately with any optimizer, and exchange their changes, compressed, at intervals.

Read `LocalUpdates._attempted` first. A fragment's exchange is in `fragment`: every `every` inner steps

    v = decay e + (a - x) + xi              a: the anchor, where workers last agreed to be; x: this worker's parameters
    e <- v - C(v)                           what is not sent waits
    a <- outer step along mean_i C(v_i)     the same on all workers
    x <- a - e                              or a (`keep_unsent`); with a `delay` later, and what was moved meanwhile

With every=1, x <- a, plain SGD inside and no outer optimizer that is Algorithm 1. The design is that of DiLoCo
(Douillard et al. 2023) and its streaming form (2025), with the error feedback of Qsparse-local-SGD (Basu et al. 2019,
Algorithm 1).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, as_text, check_agreement, ring_all_reduce
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.comm.managed import ManagedGroup
from packsaddle.comm.select_aggregator import warn_of_nothing
from packsaddle.compressors import Compressor, Identity, TopK, describe
from packsaddle.numerics.kernels import compiler
from packsaddle.numerics.seeds import as_seed
from packsaddle.optim.background import Background
from packsaddle.optim.compression import Compression, Schedule
from packsaddle.optim.elastic import Elastic
from packsaddle.optim.fragment import Flight, Fragment, Reduction
from packsaddle.optim.inner_optimizer import (
    Shards,
    balanced,
    check_parameters,
    forget_nonfinite,
    innermost,
    is_replicated,
    local_part,
    trained_parameters,
)
from packsaddle.optim.layout import places
from packsaddle.optim.local_rules import LocalRules
from packsaddle.optim.membership import Membership
from packsaddle.optim.participation import Participation
from packsaddle.optim.saved_state import check_identity, check_shape
from packsaddle.optim.stages.drift import Drift, DriftGuard, fingerprint
from packsaddle.optim.stages.escape import Escape, EscapeCheck, Reset
from packsaddle.optim.stages.noise import Perturbation
from packsaddle.optim.stages.nonfinite import THE_MEAN, Skip, Skips

Outer = Callable[[list[Any]], Optimizer]
FORMAT = 1  # of saved states


class LocalUpdates:
    """Local updates of any torch optimizer, averaged over workers with compression and error feedback.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        local = packsaddle.LocalUpdates(optimizer, every=30, compressor=packsaddle.TopK(1 / 32, values="int2"))

    The training loop stays as it is: each `optimizer.step()` is counted, and the steps after which an exchange is due
    do it. Gradients must not be exchanged as well: no DistributedDataParallel between workers (where a framework wraps
    the model in one, see `keep_gradients_local`).

    Args:
        optimizer: what steps on each worker: any torch optimizer of floating-point parameters on one device, DTensors
            of FSDP2 and tensor parallelism among them, of which each process exchanges its own shard.
        every: H, inner steps between two exchanges of a fragment.
        compressor: C, or a function of the round that gives it, or a `Compression` with more about the exchange.
        outer: makes the optimizer of the anchor out of its tensors, float32 or wider, such as
            `lambda anchors: torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True)`; its gradient is the mean of
            what workers sent. None moves the anchor by that mean.
        decay: what the error memory is multiplied by in each round, in (0, 1]; below 1 errors are forgotten in time.
        fragments: P, parts of the model, cut by the order of the parameters and balanced by bytes, that are exchanged
            at different steps, every / P apart.
        delay: inner steps during which an exchange runs, below `every`. It needs a copy of the fragment.
        blend: with a delay, x becomes (1 - blend) a + blend x where an exchange lands, as Streaming DiLoCo has it;
            None has it become a and what was moved meanwhile.
        noise: standard deviation of each coordinate of xi in the units of parameters, the same on every worker, added
            in each round; or a function of the round that gives it.
        escape: the escape check of lines 4-8 of Algorithm 1, made on the anchor after each round; its interval and
            `every` count rounds. One fragment and no delay.
        reduction: "mean" over workers, which error feedback rests on; or "senders": over the workers that sent a
            coordinate, as SparseLoCo's reference has it, which breaks y = a - mean e.
        keep_unsent: x begins again not at a, as in Algorithm 1 and DiLoCo, but at a - e, so that what this worker has
            moved and not sent yet stays in its own x, as in CSER (Xie et al. 2020). It trains better.
        offload: keep anchor and error memory, and so the outer optimizer's state, on the CPU.
        weight: w_i of this worker in the mean, which is sum_i w_i C(v_i) / sum_i w_i: its number of examples, say. None
            on all workers has them count alike.
        sample: the share of the workers that are in a round, drawn anew for each, as in federated averaging. A worker
            that is not in it keeps what it has moved, or sits the round out (see `sampled`). No delay, and exchanges
            that average messages directly.
        seed: of all shared randomness; the same on every worker.
        scaler: the GradScaler that steps the optimizer, so that a step which it leaves out on one worker is counted
            there too.
        process_group: the workers that exchange; None is the default group if there is one, else this process alone.
        manager: a torchft Manager, or an `Elastic` with more about it: workers come and go, and a round is committed by
            those that are there. No delay, escape, "senders" or DTensors; exchanges that average messages directly.

    A round in which a worker's x is not finite is left out by all: that worker goes back to the anchor, and forgets
    the inner optimizer's state of tensors of which it is not finite; the others keep what they have moved for the next
    round. It is entered in `skips`.

    Construction is collective: every worker starts from rank 0's parameters. Weights may be loaded until the first
    step, on every worker. With a manager it is not: the first step, or `join`, waits for the others, and gives a worker
    that comes later their anchor. Raises ValueError or TypeError for bad arguments, also if workers differ in them, and
    RuntimeError at the first step if gradients are equal on all workers, since then they have been exchanged.

    >>> import torch
    >>> from packsaddle import LocalUpdates
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> local = LocalUpdates(optimizer, every=2)
    >>> for batch in torch.rand(4, 8, 64):
    ...     optimizer.zero_grad()
    ...     (model(batch) - batch).square().mean().backward()
    ...     optimizer.step()
    >>> local.rounds
    2
    >>> local.flush()
    True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        every: int = 30,
        compressor: Compressor | Schedule | Compression = TopK(1 / 32, values="int2"),  # noqa: B008 -- immutable
        outer: Outer | None = None,
        decay: float = 1.0,
        fragments: int = 1,
        delay: int = 0,
        blend: float | None = None,
        noise: float | Callable[[int], float] = 0.0,
        escape: Escape | None = None,
        reduction: Reduction = "mean",
        keep_unsent: bool = True,
        offload: bool = False,
        weight: float | None = None,
        sample: float = 1.0,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        process_group: Any = None,
        manager: Any = None,
    ) -> None:
        self.optimizer = innermost(optimizer)
        if hasattr(self.optimizer, "channel"):
            name = type(self.optimizer).__name__
            raise TypeError(f"optimizer must step on this worker alone, and {name} exchanges by itself")
        self._compression = Compression.of(compressor)
        self.every, self.delay, self.decay, self.blend = every, delay, decay, blend
        self.reduction, self.keep_unsent, self.seed = reduction, keep_unsent, as_seed(seed)
        self._rules = LocalRules(every, fragments, delay, decay, blend, reduction)
        if self._compression.memory != "buffer":
            raise ValueError(f'memory must be "buffer" for local updates, got {self._compression.memory!r}')
        self._compression.at(0)
        self._parameters = trained_parameters(self.optimizer)
        check_parameters(self._parameters)
        self._bytes = sum(local_part(p).nbytes for p in self._parameters.values())
        self._agree = Shards(self._parameters.values())
        self.steps = 0  # n: attempted inner steps
        self.resets: list[Reset] = []

        # Workers, and the place of exchanges: in the background if they have a delay and the group can.
        elastic = None if manager is None else Elastic.of(manager)
        group = resolve(process_group) if elastic is None else _managed(elastic, process_group)
        home = local_part(next(iter(self._parameters.values()))).device
        device = torch.device("cpu") if offload else home
        background = group.background(device) if delay and group.size > 1 else None
        self.ledger = Ledger()
        self._channel = Communicator(background or group, self.ledger)
        self._background = Background(device) if background is not None else None

        self._participation = Participation(weight, sample, group.size, group.rank, self.seed)
        self._sample = sample

        # x, the same on all workers; its fragments.
        with torch.no_grad():
            for p in self._parameters.values() if elastic is None else ():
                self._channel.broadcast(local_part(p), "start")
            self._fragments = self._cut(fragments, device)
        d = sum(part.compressed_d for part in self._fragments)
        warn_of_nothing(self._compression.at(0), d, self._compression.dense_below, stacklevel=2)
        self._compression.at(0).validate(d)
        for part in self._fragments:
            part.feedback.prepare(self._compression.at(0))

        # Stages of a round.
        self.outer = outer(self._leaves()) if outer is not None else None
        if self.outer is not None and not isinstance(self.outer, Optimizer):
            raise TypeError(f"outer must be a function that returns a torch optimizer, got {type(self.outer).__name__}")
        self._noise = Perturbation(noise)
        self._skips = Skips(self._compression.max_skipped, self._channel.group.rank)
        compared = self._compression.compare_every
        self._drift = DriftGuard(0 if elastic else compared, self._compression.on_drift, self._channel)
        self._escape = self._escape_check(escape)
        averaged = [part.feedback.aggregator for part in self._fragments]
        escapes = escape is not None
        self._rules.check_participation(self._participation, averaged, escapes=escapes, managed=elastic is not None)
        same = self._same(noise, escape, fragments) | {"weight": "given" if weight is not None else None}
        same |= {"sample": sample}
        self.membership: Membership | None = None  # with a manager: who is there, and this worker's part
        if elastic is None:
            check_agreement(self._channel, same, device)
            self._participation.exchange(self._channel, device)
        else:
            self.membership = self._member(elastic, as_text(same), compared)

        # The optimizer's steps; nothing of this belongs in the graph of one that is compiled.
        outside: Any = torch.compiler.disable
        self.optimizer.register_step_pre_hook(outside(self._before_step))
        if scaler is None:
            self.optimizer.register_step_post_hook(outside(self._after_step))
        else:
            self._count_attempts_of(scaler)

    def __repr__(self) -> str:
        compressor = describe(self._compression.at(self.rounds))
        outer = type(self.outer).__name__ if self.outer else "mean"
        return (
            f"LocalUpdates({type(self.optimizer).__name__}, every={self.every}, {compressor}, outer={outer}, fragments="
            f"{len(self._fragments)}, workers={self._channel.group.size}, steps={self.steps}, rounds={self.rounds})"
        )

    def _cut(self, fragments: int, device: torch.device) -> list[Fragment]:
        """Cut the parameters in fragments by their order; replicated DTensors are compressed apart from sharded ones.

        What is replicated over shards must come out alike on all of them, so its choice of coordinates must not depend
        on what only one shard has.
        """
        by_name = {p.name: p for p in places(self._parameters.items(), self._compression.dense_below, local_part)}
        names = list(self._parameters)
        make = partial(
            Fragment,
            parameters=self._parameters,
            device=device,
            every=self.every,
            compression=self._compression,
            channel=self._channel,
            d=sum(place.size for place in by_name.values() if not place.dense),
            seed=self.seed,
            keep=self.keep_unsent,
        )
        found = []
        for i, members in enumerate(balanced(names, [by_name[name].size for name in names], fragments)):
            for replicated in (False, True):
                mine = [by_name[n] for n in members if is_replicated(self._parameters[n]) == replicated]
                if mine:
                    found.append(make(mine, offset=i * self.every // fragments))
        return found

    def _leaves(self) -> list[Any]:
        """The anchor's tensors, in the optimizer's order."""
        by_name = {p.name: leaf for part in self._fragments for p, leaf in zip(part.places, part.leaves, strict=True)}
        return [by_name[name] for name in self._parameters]

    def _escape_check(self, rule: Escape | None) -> EscapeCheck | None:
        if rule is None:
            return None
        if len(self._fragments) > 1 or self.delay:
            raise ValueError("escape needs fragments=1, delay=0 and no tensor parallelism: it compares whole anchors")
        (whole,) = self._fragments

        def objective() -> float | Tensor:
            whole.go_to(whole.anchor.views)
            return rule.objective()

        x = _Anchor(whole.anchor.flat, whole.compressed_d)
        return EscapeCheck(replace(rule, objective=objective), x, self._channel, self.seed)

    def _member(self, elastic: Elastic, arguments: str, compare_every: int) -> Membership:
        self._rules.check_elastic(
            [part.feedback.aggregator for part in self._fragments],
            escapes=self._escape is not None,
            sharded=any(hasattr(p, "device_mesh") for p in self._parameters.values()),
        )
        return Membership(
            elastic,
            self._channel,
            self._fragments,
            self.optimizer,
            self.outer,
            every=self.every,
            compare_every=compare_every,
            arguments=arguments,
            send=self._send_to_members,
            land=self._land,
        )

    def _same(self, noise: object, escape: object, fragments: int) -> dict[str, object]:
        """Return what must be equal on all workers."""
        same: dict[str, object] = {"every": self.every, "compressor": self._compression, "decay": self.decay}
        same |= {"fragments": fragments, "delay": self.delay, "blend": self.blend, "noise": noise, "escape": escape}
        same |= {
            "reduction": self.reduction,
            "seed": self.seed,
            "kernels": compiler(self._fragments[0].anchor.flat.device),
        }
        same |= {"outer": None if self.outer is None else (type(self.outer).__name__, self.outer.defaults)}
        same |= {
            f"params[{i}]": f"{name} {list(p.shape)} {p.dtype}" for i, (name, p) in enumerate(self._parameters.items())
        }
        return same

    def _count_attempts_of(self, scaler: torch.amp.GradScaler) -> None:
        """Count what a GradScaler is asked to do, so that workers stay in step when one of them leaves a step out."""
        if not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        step = scaler.step

        def counted(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            result = step(optimizer, *args, **kwargs)
            if innermost(optimizer) is self.optimizer:
                self._attempted()
            return result

        scaler.step = counted  # type: ignore[method-assign]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before the first step weights may have been loaded; a worker that comes then has no gradient at its x."""
        if self.steps == 0 and (self.membership is None or not self.membership.joined):
            for part in self._fragments:
                part.meet()
        if self.membership is not None and not self.membership.joined:
            self.join()
            for p in self._parameters.values():
                p.grad = None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._attempted()

    @torch.no_grad()
    def _attempted(self) -> None:
        """Count an inner step, taken or left out by a scaler, and do what is due after it."""
        self.steps += 1
        if self.membership is not None:
            self.membership.stepped(self.steps)
            return
        if self.steps == 1:
            self._check_start()
        for part in self._fragments:
            if part.flight is not None and part.flight.due == self.steps:
                self._land(part)
        for part in self._fragments:
            if part.is_due(self.steps):
                self._start(part)

    def _start(self, part: Fragment) -> None:
        """Begin a round of a fragment; without a delay it ends at once."""
        noise = self._noise.at(seed=self.seed, step=part.rounds)
        due, compressor = self.steps + self.delay, self._compression.at(part.rounds)
        self._depart(part, compressor, noise, due, self._share(self.steps))
        if not self.delay:
            self._land(part)

    def _share(self, step: int) -> float:
        """Return the weight of this worker's update in an exchange after inner step n; 0: it takes no part."""
        who = self._participation
        return who.share(who.members(step)) if who.samples else who.share()

    @property
    def sampled(self) -> bool:
        """True if this worker is in the next exchange (see `sample`); one that is not may train, or `sit_out`."""
        return self._share(self.steps + min(part.until_due(self.steps) for part in self._fragments)) > 0

    def sit_out(self) -> None:
        """Stand in for the inner steps up to the next exchange, and take part in it without an update; collective.

        Raises RuntimeError with a manager.
        """
        if self.membership is not None:
            raise RuntimeError(
                "sit_out is for a fixed set of workers; with a manager, a worker that is away is left out"
            )
        self._attempted()
        while not self.exchanging:
            self._attempted()

    def _send_to_members(self, part: Fragment, dense: bool, share: float) -> float:
        """Make a fragment's update and exchange it, for a round that is not committed yet; return ||v||^2."""
        t = part.rounds
        compressor, noise = (
            (Identity(), None) if dense else (self._compression.at(t), self._noise.at(seed=self.seed, step=t))
        )
        flight = part.start(compressor, noise, self.decay, self.steps, self._agree, share=share)
        energy = float(flight.v.double().square().sum())
        part.send(flight, max(0, self.steps - 1), reduction=self.reduction, dense=self.outer is not None)
        part.name_bad(flight)
        return energy

    @torch.no_grad()
    def join(self) -> None:
        """Wait for the other workers' next round, and have their anchor after it; with a manager, before training.

        The first step does it otherwise, and its gradient, which was taken elsewhere, is dropped. A worker that was
        here before continues with the memory in its file. Raises RuntimeError without a manager.
        """
        if self.membership is None:
            raise RuntimeError("join is for workers that come and go: LocalUpdates(..., manager=)")
        if self.membership.joined:
            return
        if self.steps == 0:
            for part in self._fragments:
                part.meet()
        self.membership.join()
        self.steps = max(self.steps, self.membership.steps)

    def leave(self) -> None:
        """Hand this worker's memory over and take no part any more; with a manager, before the process ends early.

        It goes to the file that `Elastic` names, or with one more round, uncompressed. Raises RuntimeError without a
        manager.
        """
        if self.membership is None:
            raise RuntimeError("leave is for workers that come and go: LocalUpdates(..., manager=)")
        with torch.no_grad():
            self.membership.leave()

    def _depart(self, part: Fragment, compressor: Compressor, noise: Any, due: int, share: float) -> None:
        later = due > self.steps
        flight = part.start(compressor, noise, self.decay, due, self._agree, later=later, share=share)
        send = partial(
            part.send, flight, self.steps - 1, reduction=self.reduction, dense=later or self.outer is not None
        )
        if self._background is None or not later:
            self._beside(send)
        else:
            flight.promise = self._background.promise()
            self._background.submit(send, [(flight.promise, flight.v)])

    def _beside(self, work: Callable[[], object]) -> None:
        """Do what is collective, after all that was begun in the background."""
        if self._background is None:
            work()
            return
        promise = self._background.promise()
        self._background.submit(work, [(promise, torch.zeros(0))])
        promise.future.wait()

    def _finish(self, part: Fragment) -> bool:
        """Wait for a fragment's exchange; whether it is taken."""
        flight = part.flight
        assert flight is not None
        if flight.promise is not None:
            flight.promise.future.wait()
            flight.promise = None
        return part.finish(flight)

    def _land(self, part: Fragment) -> bool:
        """End a round of a fragment; whether it was taken."""
        self._finish(part)
        t, flight = part.rounds, part.land(self.outer, self.blend)
        if not flight.taken:
            self._leave_out(t, flight)
            return False
        self._skips.took()
        if self._drift.due(t) and part is self._fragments[-1]:
            self._beside(partial(self._compare, t))
        self._check_escape(part)
        return True

    def _leave_out(self, t: int, flight: Flight) -> None:
        """Enter a round that was not taken."""
        workers = tuple(worker for worker, name in enumerate(flight.names) if name)
        name = flight.names[workers[0]] if workers else THE_MEAN
        if bool(flight.bad):
            forget_nonfinite(self.optimizer)
        self._skips.enter(Skip(t, workers, f"the local update of {name}" if workers else name))
        self._skips.check(self._skips.in_a_row)

    def _compare(self, t: int) -> None:
        """Compare anchors of all fragments, which must be equal on all workers."""

        def named() -> list[tuple[str, Tensor]]:
            return [(f"anchor of {p.name}", view) for f in self._fragments for p, view in f.named(f.anchor.flat)]

        self._drift.compare(t, [part.anchor.flat for part in self._fragments], named)

    def _check_escape(self, part: Fragment) -> None:
        """Lines 4-8, on the anchor."""
        if self._escape is None:
            return
        try:
            reset, lost = self._escape.run(part.rounds, part.feedback.pending())
            if reset is not None:
                part.feedback.reset(lost)
                self.resets.append(reset)
        finally:
            part.restart()

    def _check_start(self) -> None:
        """Check that workers began at one x, and that nothing else exchanges gradients."""
        if self._channel.group.size == 1:
            return
        anchors = torch.stack([fingerprint(part.anchor.flat) for part in self._fragments]).sum().cpu()
        grads = [local_part(p.grad) for p in self._parameters.values() if p.grad is not None]
        whole = torch.stack([fingerprint(g) for g in grads]).sum().cpu() if grads else anchors.new_zeros(())
        device, gathered = self._fragments[0].anchor.flat.device, list[Any]()
        mine = {"prints": torch.stack([anchors, whole]).to(device)}
        self._beside(lambda: gathered.extend(self._channel.gather(mine, fixed_size=True, purpose="start")))
        prints = [parts["prints"].tolist() for parts in gathered]
        others = [worker for worker, (anchor, _) in enumerate(prints) if anchor != prints[0][0]]
        if others:
            raise RuntimeError(
                f"workers must begin at the same parameters, but worker {others[0]} differs from worker 0: load "
                f"weights on all workers, or before LocalUpdates is made"
            )
        if grads and any(bool(g.any()) for g in grads) and all(grad == prints[0][1] for _, grad in prints):
            raise RuntimeError(
                f"gradients are equal bit for bit on all {len(prints)} workers at the first step: either they are "
                f"exchanged as well (by DistributedDataParallel, say; see packsaddle.keep_gradients_local), or all "
                f"workers have the same batch: give each its own, by a DistributedSampler or as data[rank::workers]"
            )

    @property
    def rounds(self) -> int:
        """Exchanges of fragments that have landed and were taken."""
        return sum(part.rounds for part in self._fragments)

    @property
    def skips(self) -> list[Skip]:
        """The rounds that were left out since this was made or loaded."""
        return self._skips.list

    @property
    def skipped(self) -> int:
        """The number of skipped rounds in total."""
        return self._skips.count

    @property
    def drifts(self) -> list[Drift]:
        """The comparisons at which workers' anchors differed (see `Compression.compare_every`)."""
        return self._drift.found

    @property
    def lost(self) -> float:
        """The sum of the norms of lost error memories; with a manager, else 0."""
        return 0.0 if self.membership is None else self.membership.lost

    @property
    def position(self) -> int:
        """The inner steps of the anchor, of all workers together, including workers that have left."""
        return self.steps * self._channel.group.size if self.membership is None else self.membership.roster.position

    @property
    def contraction(self) -> float | None:
        """The share of its energy that this worker's v kept when last measured (see `Compression.monitor_every`)."""
        found = [part.monitor.whole for part in self._fragments if part.monitor.whole is not None]
        return sum(found) / len(found) if found else None

    @property
    def uncompressed(self) -> Bytes:
        """The bytes of an exchange of gradients at every step so far: ring all-reduces."""
        return ring_all_reduce(self.steps * self._bytes, self._channel.group.size)

    @property
    def exchanging(self) -> bool:
        """True if an exchange began after the last inner step; the same on all workers."""
        if self.membership is not None:
            return self.membership.exchanged
        return any(part.is_due(self.steps) for part in self._fragments)

    def forgive(self) -> None:
        """Count skipped rounds in a row from 0: a caller that continues after NonFiniteError may have mended it."""
        self._skips.took()

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for running exchanges, so that the ledger has their bytes; they land when they are due."""
        for part in self._fragments:
            if part.flight is not None:
                self._finish(part)

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return the mean over workers of what the anchor has not received yet, float[d], in the optimizer's order.

        A mean by `weight`, if there is one.

        That is e, the changes since the last exchange, and those in a running exchange: without an outer optimizer
        y = a - error() moves as in training without compression. Collective; waits for running exchanges. d counts
        this process's shards. Raises RuntimeError with a manager, whose workers meet in rounds only: see `pending`.
        """
        if self.membership is not None:
            raise RuntimeError("error is of workers that are all there; with a manager, pending() is this worker's own")
        found: dict[str, Tensor] = {}
        self.wait()
        for part in self._fragments:
            pending = part.unapplied().mul_(self._participation.share())
            self._beside(partial(self._channel.mean, pending, "inspection"))
            found |= {place.name: view for place, view in part.named(pending)}
        return torch.cat([found[name].reshape(-1) for name in self._parameters])

    @torch.no_grad()
    def pending(self) -> Tensor:
        """Return what the anchor has not received of this worker, float[d], in the optimizer's order."""
        self.wait()
        found = {place.name: view for part in self._fragments for place, view in part.named(part.unapplied())}
        return torch.cat([found[name].reshape(-1) for name in self._parameters])

    def anchor(self) -> dict[str, Tensor]:
        """Return copies of the anchor a by parameter, float32 or wider and shaped as this process's shard of it.

        The anchor is the same on all workers.
        """
        found = {place.name: v.clone() for part in self._fragments for place, v in part.named(part.anchor.flat)}
        return {name: found[name] for name in self._parameters}

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Have the parameters at the anchor for a while: to evaluate, certify or save one model for all workers."""
        with torch.no_grad():
            before = [[x.clone() for x in part.tensors()] for part in self._fragments]
            for part in self._fragments:
                part.go_to(part.anchor.views)
        try:
            yield
        finally:
            with torch.no_grad():
                for part, kept in zip(self._fragments, before, strict=True):
                    for x, old in zip(part.tensors(), kept, strict=True):
                        x.copy_(old)

    @torch.no_grad()
    def flush(self) -> bool:
        """Exchange all that is pending, uncompressed, so that all workers have the anchor and no errors; collective.

        For the end of training. Running exchanges land first; then each fragment has a round with C(v) = v, without
        noise. Returns whether all of it was taken. With a manager the round is one of all that are there, whether or
        not they have come to their end.
        """
        if self.membership is not None:
            return self.membership.round(dense=True)
        taken = True
        for part in self._fragments:
            if part.flight is not None:
                taken &= self._land(part)
        for part in self._fragments:
            self._depart(part, Identity(), None, self.steps, self._participation.share())
            taken &= self._land(part)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state, tensors and plain types; collective during an exchange.

        It has anchors, error memories, running exchanges, the outer optimizer's state and the counts. The parameters
        and the inner optimizer's state are each worker's own, and are saved separately, on every worker.
        """
        self.wait()
        return {
            "format": FORMAT,
            "identity": self._identity(),
            "steps": self.steps,
            "fragments": [part.state_dict() for part in self._fragments],
            "outer": None if self.outer is None else self.outer.state_dict(),
            "escape": None if self._escape is None else self._escape_state(),
            "skips": self._skips.state_dict(),
            "ledger": self.ledger.state_dict(),
            "resets": [asdict(reset) for reset in self.resets],
            "drifts": [asdict(drift) for drift in self.drifts],
            **({} if self.membership is None else {"membership": self.membership.state_dict()}),
        }

    def _escape_state(self) -> dict[str, Any]:
        assert self._escape is not None
        (whole,) = self._fragments
        anchor = {place.name: view.clone() for place, view in whole.named(self._escape.anchor)}
        return {"anchor": anchor, "anchor_step": self._escape.anchor_step}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first difference, if `load_state_dict` would not take `state`."""
        if state.get("format") != FORMAT:
            raise ValueError(f"the state must have format {FORMAT} of LocalUpdates, found {state.get('format')!r}")
        check_identity(state["identity"], self._identity())
        for part, saved in zip(self._fragments, state["fragments"], strict=True):
            for place in part.places:
                for key in ("anchor", "pending"):
                    check_shape(f"{key} of {place.name}", saved[key].get(place.name), place.parameter.shape)
        for name, here in (("outer", self.outer), ("escape", self._escape)):
            if (state[name] is None) != (here is None):
                have = ["none", "one"]
                raise ValueError(
                    f"{name}: there is {have[here is not None]} here, and {have[here is None]} in the state"
                )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this worker's `state_dict`, `state`; raises ValueError, changing nothing, if it does not fit."""
        self.check_state_dict(state)
        for part, saved in zip(self._fragments, state["fragments"], strict=True):
            part.load_state_dict(saved, self._compression.at(max(0, saved["rounds"] - 1)))
        if self.outer is not None:
            self.outer.load_state_dict(state["outer"])
        if self._escape is not None:
            (whole,) = self._fragments
            for place, view in whole.named(self._escape.anchor):
                view.copy_(state["escape"]["anchor"][place.name])
            self._escape.anchor_step = state["escape"]["anchor_step"]
        self.steps = state["steps"]
        self._skips.load_state_dict(state["skips"])
        self.ledger.load_state_dict(state["ledger"])
        self.resets = [Reset(**reset) for reset in state["resets"]]
        self._drift.found = [Drift(**drift) for drift in state["drifts"]]
        if self.membership is not None:
            self.membership.load_state_dict(state["membership"], self.steps)

    def _identity(self) -> dict[str, Any]:
        """Return what must be equal at loading and at saving."""
        group = self._channel.group
        same: dict[str, Any] = {"seed": self.seed, "every": self.every, "delay": self.delay}
        same["fragments"] = len(self._fragments)
        if self._participation.samples:
            same["sample"] = self._sample
        if self.membership is not None:
            return same | {"elastic": True}
        return same | {"rank": group.rank, "workers": group.size}

    trains_apart = True  # between rounds each worker has parameters and an inner optimizer's state of its own

    def split_state(
        self, state: Mapping[str, Any], workers: int
    ) -> tuple[dict[tuple[Any, ...], Tensor], dict[str, Any]]:
        """Return what of a `state` of `workers` others get the mean of, by place, and what they all get.

        What an owner of a two-way exchange holds back is an error of the mean, so it counts once for every worker.
        """
        means: dict[tuple[Any, ...], Tensor] = {}
        rest = {k: v for k, v in state.items() if k not in ("fragments", "ledger", "skips")}
        rest["identity"] = {k: v for k, v in state["identity"].items() if k != "rank"}
        rest["fragments"] = []
        for i, (part, saved) in enumerate(zip(self._fragments, state["fragments"], strict=True)):
            pending = {name: error.double() for name, error in saved["pending"].items()}
            for vector in saved["held"].get("vectors", {}).values():
                padded = torch.nn.functional.pad(vector.double(), (0, part.d - part.compressed_d))
                for place, view in part.named(padded):
                    pending[place.name] = pending[place.name] + workers * view
            means |= {("fragments", i, "pending", name): error for name, error in pending.items()}
            flight = saved["flight"]
            if flight is not None:
                means |= {("fragments", i, "flight", "before", name): x for name, x in flight["before"].items()}
                flight = {k: v for k, v in flight.items() if k != "before"}
            equal = {k: v for k, v in saved.items() if k not in ("pending", "held", "monitor")}
            rest["fragments"].append(equal | {"flight": flight})
        return means, rest

    def put_means(self, state: dict[str, Any], means: Mapping[tuple[Any, ...], Tensor]) -> None:
        """Put means in a state, in place, and make it this worker's."""
        for (*path, name), mean in means.items():
            place: Any = state
            for key in path:
                place = place[key]
            place[name] = mean.to(place[name].dtype)
        for saved in state["fragments"]:
            for vector in saved["held"].get("vectors", {}).values():  # the means of the memories have it
                vector.zero_()
        here = self._identity()
        state["identity"] |= {name: here[name] for name in ("rank", "workers")}

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copying and pickling: optimizer, anchor and group belong together. Use `state_dict`."""
        raise TypeError("LocalUpdates cannot be copied or pickled; use state_dict() and load_state_dict()")


class _Anchor:
    """The anchor as the escape check sees it: a flat vector, float[d], its first coordinates compressed."""

    def __init__(self, x: Tensor, compressed_d: int) -> None:
        self.x, self.compressed_d = x, compressed_d


def _managed(elastic: Elastic, process_group: Any) -> ManagedGroup:
    """The group of a Manager's workers."""
    if process_group is not None and not isinstance(process_group, ManagedGroup):
        raise ValueError("process_group is the manager's own where there is a manager: leave it out")
    return process_group or ManagedGroup(elastic.manager)
