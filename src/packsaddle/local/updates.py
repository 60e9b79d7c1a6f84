"""LocalUpdates: workers train separately with any optimizer, and exchange compressed local updates at intervals.

Read `LocalUpdates._attempted` first, which runs after each inner step. The exchange is in `fragment`; every `every`
inner steps

    v = decay e + (a - x) + xi              a: the anchor, the parameters last agreed on; x: this worker's parameters
    e <- v - C(v)                           the residual
    a <- outer step along mean_i C(v_i)     identical on all workers
    x <- a - e                              or a without `keep_unsent`; with a `delay` later, plus the steps until then

With every=1, x <- a, inner SGD and no outer optimizer, this is Algorithm 1. The design is that of DiLoCo
(Douillard et al. 2023) and its streaming form (2025), with the error feedback of Qsparse-local-SGD (Basu et al. 2019,
Algorithm 1).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, as_text, check_agreement, ring_all_reduce
from packsaddle.comm.group import training_group
from packsaddle.comm.ledger import Bytes, Ledger, Totals
from packsaddle.comm.managed import ManagedGroup
from packsaddle.comm.select_aggregator import warn_if_nothing_compressed
from packsaddle.comm.sharding import local_part
from packsaddle.compressors import Compressor, Sign, describe
from packsaddle.feedback.background import Background
from packsaddle.feedback.checks import Drift, DriftGuard
from packsaddle.feedback.compression import Compression, Schedule
from packsaddle.feedback.escape import Escape, Reset
from packsaddle.feedback.guard import Skip
from packsaddle.feedback.noise import Noise
from packsaddle.feedback.optimizers import Attempts, as_optimizers
from packsaddle.feedback.state import ANY, Rule, State, Value, Vector, attribute
from packsaddle.local.elastic.membership import Membership
from packsaddle.local.escape import AnchorEscape
from packsaddle.local.fragment import Fragment, by_parameter, partition
from packsaddle.local.inner import (
    OtherOptimizers,
    Shards,
    check_covers,
    check_no_others,
    check_parameters,
    follow,
    named_parameters,
    names_of,
)
from packsaddle.local.lockstep import Call, Lockstep
from packsaddle.local.options import Elastic, LocalOptions, Outer, Overlap, Workers
from packsaddle.local.outcomes import Outcomes
from packsaddle.local.participation import Participation
from packsaddle.local.start import check_first_step, share_start, untrained_tensors
from packsaddle.numerics.kernels import compiler
from packsaddle.numerics.seeds import as_seed


class LocalUpdates:
    """Local updates of any torch optimizers, averaged over workers with compression and error feedback.

    The training loop does not change: hooks on `optimizer.step()` count steps, and exchange after every `every`-th one.
    Gradients must not be exchanged as well: no DistributedDataParallel between workers (if a framework wraps the model
    in it, see `keep_gradients_local`).

    Args:
        optimizer: the inner optimizer, which steps on each worker separately, or a list, such as [muon, adamw]: any
            torch optimizers of floating-point parameters on one device, including DTensors of FSDP2 and tensor
            parallelism, of which each process exchanges its shard. A step counts when all of them have stepped.
        compressor: C, or a function of the round that returns it, or a `Compression` with all settings of the exchange.
        every: H, inner steps between two exchanges of a fragment.
        outer: the outer optimizer, such as `OuterSGD()`, DiLoCo's: a function that returns a torch optimizer of the
            anchor's tensors, float32 or wider. Its gradient is the mean update. None subtracts it from the anchor.
        overlap: inner steps during which an exchange runs, below `every`, or an `Overlap` with more settings.
        workers: the process group of the workers, or `Workers` with weights or a sample of them; or a torchft Manager
            or `Elastic`, for workers that join and leave. None: the default group, or this process alone without one.
        noise: standard deviation of each coordinate of xi in units of the parameters, identical on all workers, added
            in each round; or a function of the round that returns it.
        escape: the escape check of lines 4-8 of Algorithm 1, run on the anchor after each round; its interval and
            `every` count rounds. It needs one fragment and no delay.
        keep_unsent: x restarts not at a, as in Algorithm 1 and DiLoCo, but at a - e, so that the unsent part of this
            worker's update stays in its own x, as in CSER (Xie et al. 2020). It trains better.
        offload: keep anchor and error memory, and so the outer optimizer's state, on the CPU.
        seed: seed of all shared randomness; identical on all workers.
        scaler: the GradScaler that steps the optimizer, so that steps which it skips on one worker are counted too.
        model: the module that the optimizers train. Its frozen parameters and persistent buffers are also set to
            rank 0's, and ValueError is raised if it has a trainable parameter that is in none of the optimizers.
            Without it, RuntimeError is raised once another optimizer has stepped with parameters of the same module.

    A round in which a worker's x is not finite is rejected on all workers, and recorded in `skips`. That worker resets
    x to its start point, and clears non-finite state of the torch optimizers of its parameters and, if necessary, of
    their `state_dict`. The others keep their local updates for the next round. All workers raise NonFiniteError after
    more than `max_skipped` consecutive such rounds, and if an optimizer cannot be reset.

    Construction is collective: every worker starts from rank 0's parameters. Weights may be loaded until the first
    step, on every worker. With a manager it is not collective: the first step, or `join`, waits for the others, and a
    worker that joins later receives their anchor. Raises ValueError or TypeError for invalid arguments, also if they
    differ between workers; and RuntimeError at the first step if gradients are identical on all workers, so exchanged
    already, and if workers make different calls, for example a round and `flush`, after unequal numbers of steps.

    >>> import torch
    >>> from packsaddle import LocalUpdates, Sign
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> local = LocalUpdates(optimizer, every=2, compressor=Sign(per_tensor=True))
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
        optimizer: Optimizer | Sequence[Optimizer],
        compressor: Compressor | Schedule | Compression = Sign(per_tensor=True),  # noqa: B008 -- immutable
        *,
        every: int = 8,
        outer: Outer | None = None,
        overlap: int | Overlap = 0,
        workers: Any = None,
        noise: float | Callable[[int], float] | Noise = 0.0,
        escape: Escape | None = None,
        keep_unsent: bool = True,
        offload: bool = False,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        model: torch.nn.Module | None = None,
    ) -> None:
        self.optimizers = as_optimizers(optimizer)
        for each in self.optimizers:
            if hasattr(each, "channel"):
                name = type(each).__name__
                raise TypeError(f"optimizer must step on this worker alone, and {name} exchanges by itself")
        self.options = options = LocalOptions.of(
            *(compressor, overlap, workers, noise),
            every=every,
            outer=outer,
            escape=escape,
            keep_unsent=keep_unsent,
            offload=offload,
            seed=as_seed(seed),
        )
        spec = options.compression
        spec.at(0)

        # x, and the tensors of the model that are not in it.
        self._parameters = {name: p for name, p in named_parameters(self.optimizers).items() if p.requires_grad}
        check_parameters(self._parameters)
        if model is not None:
            check_covers(self._parameters.values(), model)
        untrained = untrained_tensors(self.optimizers, model)
        self.steps = 0  # n: attempted inner steps
        self._has_begun = False  # the first inner step has begun, or was skipped by a scaler
        self._at_anchor = 0  # number of open `at_anchor` contexts, which may be nested

        # Workers, and exchanges in the background if they have a delay and the group supports it.
        elastic, fixed = _by_kind(options.workers)
        group = training_group(fixed.group) if elastic is None else elastic.group or ManagedGroup(elastic.manager)
        home = local_part(next(iter(self._parameters.values()))).device
        device = torch.device("cpu") if offload else home
        apart = group.background(device) if options.overlap.delay and group.size > 1 else None
        self.ledger = Ledger()
        self._channel = Communicator(apart or group, self.ledger)
        self._lockstep = Lockstep(self._channel, device, Background(device) if apart is not None else None)
        self._participation = Participation(fixed.weight, fixed.sample, group.size, group.rank, options.seed)

        # The fragments of x, and the compressor of each.
        agree = Shards(self._parameters.values())
        with torch.no_grad():
            self._fragments = partition(self._parameters, options, self._channel, device, agree)
        d = sum(part.compressed_d for part in self._fragments)
        warn_if_nothing_compressed(spec.at(0), d, spec.dense_below, stacklevel=2)
        spec.at(0).validate(d)
        for part in self._fragments:
            part.use(spec.at(0))
        sharded = any(hasattr(p, "device_mesh") for p in self._parameters.values())
        options.check_aggregators([part.feedback.choice.aggregator for part in self._fragments], sharded=sharded)

        # After an exchange: the outer step, a reset of the inner optimizer, a comparison, the escape check.
        self.outer = None if outer is None else self._make_outer(outer)
        self._outcomes = Outcomes(self.optimizers, self._fragments, agree, spec.max_skipped, group.rank)
        self._drift = DriftGuard(0 if elastic else spec.compare_every, spec.on_drift, self._channel)
        where = (self._fragments, self._channel, options.seed)
        self._escape = AnchorEscape(escape, *where, delay=options.overlap.delay) if escape else None
        self._resets: list[Reset] = []

        rules = _rules(keep_unsent=keep_unsent)
        self.saved_state = State("LocalUpdates", rules, self._identity, self._saved_fields)

        # Arguments must be equal on all workers, and all start from the same x.
        same = self._agreement(untrained)
        self.membership: Membership | None = None  # the rounds of workers that join and leave; None: no manager
        if elastic is None:
            check_agreement(self._channel, same, device)
            self._participation.exchange(self._channel, device)
            share_start(self._channel, [*self._parameters.values(), *(tensor for _, tensor in untrained)], device)
            self._set_anchors()
        else:
            inner_and_outer = (self.optimizers, self.outer)
            self.membership = Membership(
                options, self._fragments, self._channel, *inner_and_outer, self._outcomes, as_text(same)
            )

        # Hooks that count the optimizers' steps.
        watches = model is None and (group.size > 1 or elastic is not None)
        self._others = OtherOptimizers(list(self._parameters.values()), group) if watches else None
        for each in self.optimizers:
            follow(each, self)
        self._attempts = Attempts(self.optimizers, scaler, self._before_step, self._attempted)

    def __repr__(self) -> str:
        compressor = describe(self.options.compression.at(self.rounds))
        outer = type(self.outer).__name__ if self.outer else "mean"
        return (
            f"LocalUpdates({names_of(self.optimizers)}, every={self.options.every}, {compressor}, outer={outer}, "
            f"fragments={len(self._fragments)}, workers={self._channel.group.size}, steps={self.steps}, "
            f"rounds={self.rounds})"
        )

    def _make_outer(self, make: Outer) -> Optimizer:
        """Return the outer optimizer of the anchor's tensors, which are in the inner optimizer's order."""
        by_name = {
            p.name: leaf for part in self._fragments for p, leaf in zip(part.places, part.anchor.leaves, strict=True)
        }
        outer = make([by_name[name] for name in self._parameters])
        if not isinstance(outer, Optimizer):
            raise TypeError(f"outer must be a function that returns a torch optimizer, got {type(outer).__name__}")
        follow(outer, self)
        return outer

    def _agreement(self, untrained: Iterable[tuple[str, Tensor]]) -> dict[str, object]:
        """Return the values that must be equal on all workers, by name."""
        outer = None if self.outer is None else (type(self.outer).__name__, self.outer.defaults)
        same = self.options.agreement()
        same |= {"kernels": compiler(self._fragments[0].anchor.flat.device), "outer": outer}
        for kind, tensors in (("params", self._parameters.items()), ("untrained", untrained)):
            for i, (name, p) in enumerate(tensors):
                same[f"{kind}[{i}]"] = f"{name} {list(p.shape)} {p.dtype}"
        return same

    # Inner steps, and the rounds that follow them.

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        """Run checks before each optimizer's step. A worker that joins here discards its gradient, of an old x."""
        self._check_here("optimizer.step()")
        check_no_others(optimizer, self._parameters.values())
        self._set_anchor_before_first_step()
        self._has_begun = True
        if self.membership is not None and not self.membership.joined:
            self.join()
            for p in self._parameters.values():
                p.grad = None

    @torch.no_grad()
    def _attempted(self) -> None:
        """Count an inner step, applied or skipped by a scaler; finish the rounds that are due, then begin new ones."""
        if self._others is not None:
            self._others.check()
        self._set_anchor_before_first_step()
        self._has_begun = True
        self.steps += 1
        self._outcomes.check_step()
        if self.membership is not None:  # when a round is due depends on the present workers
            self.membership.stepped(self.steps)
        else:
            if self.steps == 1:
                self._check_first_step()
            # First finish exchanges whose delay is over, then begin new ones, which without a delay also finish.
            for part in self._fragments:
                if part.current is not None and part.current.due == self.steps:
                    self._finish_round(part)
            for part in self._fragments:
                if part.is_due(self.steps):
                    share = self._participation.share_after(self.steps)
                    self._begin_round("exchanges a round", part, share, delay=self.options.overlap.delay)

    def _check_first_step(self) -> None:
        anchors = [part.anchor.flat for part in self._fragments]
        gradients = [local_part(p.grad) for p in self._parameters.values() if p.grad is not None]
        run = partial(self._lockstep.run, "checks its first step", self.steps)
        check_first_step(self._channel, anchors, gradients, run)

    def _begin_round(self, call: Call, part: Fragment, share: float, *, delay: int, uncompressed: bool = False) -> bool:
        """Begin a round of a fragment; without a delay finish it too. Return False if it is rejected already."""
        p = part.begin(self.steps + delay, share, later=delay > 0, uncompressed=uncompressed)
        self._outcomes.register(part, p)
        as_vector = delay > 0 or self.outer is not None
        exchange = partial(part.exchange, p, self.steps - 1, as_vector=as_vector)
        if delay:
            assert p.round is not None
            p.wait = self._lockstep.start(call, self.steps, exchange, p.round.v)
            return True
        self._lockstep.run(call, self.steps, exchange)
        return self._finish_round(part)

    def _finish_round(self, part: Fragment) -> bool:
        """Apply the current exchange of a fragment; return False if it is rejected."""
        t, p = part.rounds, part.apply_exchange(self.outer)
        if not self._outcomes.record(part, t, p):
            return False
        if self._drift.due(t) and part is self._fragments[-1]:
            self._lockstep.run("compares anchors", p.due - self.options.overlap.delay, partial(self._compare, t))
        if self._escape is not None and (reset := self._escape.run()) is not None:
            self._resets.append(reset)
        return True

    def _compare(self, t: int) -> None:
        """Compare the anchors of all fragments, which must be equal on all workers."""

        def named() -> list[tuple[str, Tensor]]:
            return [(f"anchor of {p.name}", view) for f in self._fragments for p, view in f.named(f.anchor.flat)]

        self._drift.compare(t, [part.anchor.flat for part in self._fragments], named)

    def _set_anchor_before_first_step(self) -> None:
        """Set the anchor to x if no step has moved x yet, since weights may have been loaded."""
        joined = self.membership is not None and self.membership.joined
        if self.steps == 0 and not self._has_begun and not joined:
            self._set_anchors()

    @torch.no_grad()
    def _set_anchors(self) -> None:
        for part in self._fragments:
            part.anchor.set_from_parameters()
        if self._escape is not None:
            self._escape.begin()

    def _check_here(self, call: str) -> None:
        """Raise RuntimeError within `at_anchor`, where the parameters are not this worker's x."""
        if self._at_anchor:
            raise RuntimeError(f"{call} within at_anchor(), which puts parameters back at its end")

    def _check_between_steps(self, call: str) -> None:
        """Raise RuntimeError if some optimizers have made the current step and others have not."""
        if missing := self._attempts.missing():
            raise RuntimeError(f"{call} must come between two steps, and {missing} has still to take its own")

    # Workers that skip a round, join and leave.

    @property
    def sampled(self) -> bool:
        """True if this worker is in the next exchange (see `Workers.sample`); else it may train or call `sit_out`."""
        next_round = self.steps + min(part.until_due(self.steps) for part in self._fragments)
        return self._participation.share_after(next_round) > 0

    def sit_out(self) -> None:
        """Count the inner steps up to the next exchange without training, and run that exchange; collective.

        Raises RuntimeError with a manager.
        """
        self._check_here("sit_out()")
        self._check_between_steps("sit_out()")
        if self.membership is not None:
            raise RuntimeError(
                "sit_out is for a fixed set of workers; with a manager, a worker that is away is left out"
            )
        self._attempted()
        while not self.exchanging:
            self._attempted()

    @torch.no_grad()
    def join(self) -> None:
        """Wait for the other workers' next round, and continue at their anchor. Call with a manager, before training.

        Otherwise the first step joins, and discards its gradient, which was computed at another x. A worker that
        returns loads the error memory from its file. Raises RuntimeError without a manager.
        """
        membership = self._elastic("join")
        if not membership.joined:
            self._set_anchor_before_first_step()
            membership.join()
            self.steps = max(self.steps, membership.steps)

    @torch.no_grad()
    def leave(self) -> bool:
        """Save or send this worker's pending updates, and leave. Call with a manager, before the process ends early.

        They are saved to `Elastic.memory_file` or, if that is None or cannot be written, sent uncompressed in one more
        round. Returns False, with an error in the log, if both are impossible and updates are lost. Raises RuntimeError
        without a manager.
        """
        return self._elastic("leave").leave()

    def _elastic(self, call: str) -> Membership:
        if self.membership is None:
            raise RuntimeError(f"{call} is for workers that come and go: LocalUpdates(..., workers=Elastic(...))")
        self._check_here(f"{call}()")
        return self.membership

    # Counts and records.

    @property
    def rounds(self) -> int:
        """The number of applied exchanges of fragments."""
        return sum(part.rounds for part in self._fragments)

    @property
    def skips(self) -> list[Skip]:
        """The rounds that were rejected since construction or `load_state_dict`."""
        return self._outcomes.skips.list

    @property
    def skipped(self) -> int:
        """The number of rejected rounds in total."""
        return self._outcomes.skips.count

    @property
    def drifts(self) -> list[Drift]:
        """The comparisons that found different anchors on workers, with their rounds (`Compression.compare_every`)."""
        return self._drift.found

    @property
    def resets(self) -> list[Reset]:
        """The firings of the escape check."""
        return self._resets

    @property
    def lost(self) -> float:
        """The sum of the norms of error memories that workers lost; 0 without a manager."""
        return 0.0 if self.membership is None else self.membership.lost

    @property
    def position(self) -> int:
        """The number of inner steps in the anchor, summed over all workers, including workers that have left."""
        return self.steps * self._channel.group.size if self.membership is None else self.membership.roster.position

    @property
    def contraction(self) -> float | None:
        """This worker's last measured 1 - ||v - C(v)||^2 / ||v||^2, None before (see `Compression.monitor_every`)."""
        found = [part.contraction.whole for part in self._fragments if part.contraction.whole is not None]
        return sum(found) / len(found) if found else None

    @property
    def uncompressed(self) -> Bytes:
        """The bytes that all-reduces of the gradients at every step so far would have sent (ring algorithm)."""
        size = sum(local_part(p).nbytes for p in self._parameters.values())
        return ring_all_reduce(self.steps * size, self._channel.group.size)

    @property
    def exchanging(self) -> bool:
        """True if an exchange began after the last inner step; identical on all workers."""
        if self.membership is not None:
            return self.membership.exchanged
        return any(part.is_due(self.steps) for part in self._fragments)

    def reset_skip_streak(self) -> None:
        """Reset the count of consecutive rejected rounds, after the cause of a NonFiniteError was corrected."""
        self._outcomes.skips.reset_streak()

    # The anchor, and updates that it does not include.

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for running exchanges, so that the ledger has their bytes; each is still applied at its due step."""
        for part in self._fragments:
            if part.current is not None:
                part.close()

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return the mean of `pending` over workers, by `weight` if set, float[d]; collective.

        Without an outer optimizer y = a - error() moves as in training without compression. d counts this process's
        shards only. Raises RuntimeError with a manager: use `pending`.
        """
        if self.membership is not None:
            raise RuntimeError("error is of workers that are all there; with a manager, pending() is this worker's own")
        found = self._unapplied("error()")
        for vector in found:
            vector.mul_(self._participation.share())
            self._lockstep.run("calls error()", self.steps, partial(self._channel.mean, vector, "inspection"))
        return self._joined(found)

    @torch.no_grad()
    def pending(self) -> Tensor:
        """Return this worker's updates still to be subtracted from the anchor, float[d], in the optimizer's order.

        They are e, the local update since the last exchange, and a running exchange, for which it waits.
        """
        return self._joined(self._unapplied("pending()"))

    def _unapplied(self, call: str) -> list[Tensor]:
        """Return this worker's unapplied updates, float[n] per fragment; waits for running exchanges."""
        self._check_here(call)
        self._set_anchor_before_first_step()
        self.wait()
        return [part.unapplied() for part in self._fragments]

    def _joined(self, vectors: Iterable[Tensor]) -> Tensor:
        """Concatenate one vector per fragment to one, float[d], in the optimizer's order."""
        found = by_parameter(self._fragments, vectors)
        return torch.cat([found[name].reshape(-1) for name in self._parameters])

    def anchor(self) -> dict[str, Tensor]:
        """Return copies of the anchor a by parameter, at least float32, shaped as this process's shard.

        The anchor is identical on all workers.
        """
        self._set_anchor_before_first_step()
        found = by_parameter(self._fragments, [part.anchor.flat for part in self._fragments])
        return {name: found[name].clone() for name in self._parameters}

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Set the parameters to the anchor within a context, to evaluate, certify or save one model for all workers.

        Inside, optimizer steps and calls that read this worker's changes, such as `flush`, raise RuntimeError.
        """
        self._set_anchor_before_first_step()
        before = [x.clone() for part in self._fragments for x in part.anchor.tensors()]
        with torch.no_grad():
            for part in self._fragments:
                part.anchor.set_parameters(part.anchor.views)
        self._at_anchor += 1
        try:
            yield
        finally:
            self._at_anchor -= 1
            xs = [x for part in self._fragments for x in part.anchor.tensors()]
            for x, old in zip(xs, before, strict=True):
                x.copy_(old)

    def state_dict_of(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Return a copy of the model's `state_dict` at the anchor: one model for all workers, to save on rank 0.

        `model.state_dict()` returns this worker's x instead. Tensors that `LocalUpdates` does not exchange, such as
        buffers, are this worker's. Not collective.

        >>> import torch
        >>> from packsaddle import LocalUpdates
        >>> model = torch.nn.Linear(64, 64)
        >>> local = LocalUpdates(torch.optim.AdamW(model.parameters()))
        >>> list(local.state_dict_of(model))
        ['weight', 'bias']
        """
        with self.at_anchor():
            return {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in model.state_dict().items()
            }

    @torch.no_grad()
    def flush(self) -> bool:
        """Exchange all pending updates uncompressed, so that x = a and e = 0 on all workers; collective.

        Call at the end of training. Running exchanges are applied first; then each fragment has a round with C(v) = v,
        without noise. Returns True if all of them were applied. With a manager, all present workers are in that round,
        even if they continue training.
        """
        self._check_here("flush()")
        self._check_between_steps("flush()")
        self._set_anchor_before_first_step()
        if self._others is not None:
            self._others.check()
        if self.membership is not None:
            return self.membership.round(uncompressed=True)
        applied = [self._finish_round(part) for part in self._fragments if part.current is not None]
        share = self._participation.share()
        for part in self._fragments:
            applied.append(self._begin_round("calls flush()", part, share, delay=0, uncompressed=True))
        return all(applied)

    @torch.no_grad()
    def average(self, tensors: torch.nn.Module | Iterable[Tensor]) -> None:
        """Replace tensors by their means over workers, by `Workers.weight`, in place; collective, uncompressed.

        For tensors computed from each worker's x, which differ between workers even after `flush`: a module such as
        torch's AveragedModel, whose parameters and buffers are averaged, or tensors such as z of a schedule-free
        optimizer. A mean of moving averages is the moving average of the workers' mean. Tensors that are not floating
        point are set to worker 0's. Raises RuntimeError with a manager.

        >>> import torch
        >>> from packsaddle import LocalUpdates
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> model = torch.nn.Linear(64, 64)
        >>> local = LocalUpdates(torch.optim.AdamW(model.parameters()))
        >>> ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # update_parameters after each step
        >>> local.flush()
        True
        >>> local.average(ema)
        """
        if self.membership is not None:
            raise RuntimeError("average is for a fixed set of workers; with a manager, evaluate the anchor")
        if isinstance(tensors, torch.nn.Module):
            tensors = [*tensors.parameters(), *tensors.buffers()]
        parts = [local_part(t) for t in tensors]
        means = [part for part in parts if part.is_floating_point()]

        def exchange() -> None:
            self._channel.average(means, "average", weight=self._participation.share())
            for part in parts:
                if not part.is_floating_point():
                    self._channel.broadcast(part, "average")

        self._lockstep.run("calls average()", self.steps, exchange)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state, tensors and plain types; collective during an exchange.

        It has anchors, error memories, running exchanges, the outer optimizer's state and the counts. Parameters and
        inner optimizers' states differ between workers, and must be saved separately, on every worker. Raises
        RuntimeError if one optimizer has made the current step and another has not.
        """
        self._check_between_steps("state_dict()")
        self._set_anchor_before_first_step()
        self.wait()
        return self.saved_state.save({"fragments": [{} for _ in self._fragments]})

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first difference, unless `load_state_dict` accepts `state`."""
        self.saved_state.validate(state)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, this worker's `state_dict`. Raises ValueError, with nothing changed, if it is invalid."""
        self.saved_state.load(state)
        self._attempts.restart()
        for part, saved in zip(self._fragments, state["fragments"], strict=True):
            part.resume(saved)
        self._drift.resume(self._fragments[-1].rounds)
        if self.membership is not None:
            self.membership.steps = self.steps

    def _saved_fields(self) -> list[Vector | Value]:
        """Return the fields of the saved state; the outer optimizer first, since loading it may raise ValueError."""
        outer = self.outer
        fields: list[Vector | Value] = []
        if outer is not None:
            fields.append(Value(("outer",), dict[str, Any], outer.state_dict, outer.load_state_dict))
        return [
            *fields,
            attribute(("steps",), self, "steps", int),
            *(field for i, part in enumerate(self._fragments) for field in part.fields(("fragments", i))),
            *(() if self._escape is None else self._escape.fields()),
            *self._outcomes.skips.fields(),
            attribute(("resets",), self, "_resets", list[Reset]),
            attribute(("drifts",), self._drift, "found", list[Drift]),
            Value(("ledger",), Totals, self.ledger.state_dict, self.ledger.load_state_dict),
            *(() if self.membership is None else self.membership.fields()),
        ]

    def _identity(self) -> dict[str, Any]:
        """Return the values that must be equal at saving and loading, by name."""
        options, group = self.options, self._channel.group
        same: dict[str, Any] = {"seed": options.seed, "every": options.every, "delay": options.overlap.delay}
        same |= {"fragments": len(self._fragments), "keep_unsent": options.keep_unsent}
        same |= {"outer": self.outer is not None, "escape": self._escape is not None}
        if isinstance(options.workers, Elastic):
            return same | {"elastic": True}
        if self._participation.samples:
            same["sample"] = options.workers.sample
        return same | {"rank": group.rank, "workers": group.size}

    trains_apart = True  # between rounds, parameters and inner optimizers' states differ between workers

    def __getstate__(self) -> dict[str, Any]:
        """Raise TypeError: optimizer, anchor and group belong together. Use `state_dict`."""
        raise TypeError("LocalUpdates cannot be copied or pickled; use state_dict() and load_state_dict()")


def _rules(*, keep_unsent: bool) -> list[Rule]:
    """Return the kinds of the saved state's entries.

    With `keep_unsent`, an owner error added to e moves the start point without x, so it is owed as well.
    """
    part = ("fragments", ANY)
    error, owed = (*part, "error", ANY), (*part, "owed", ANY)
    return [
        Rule(error, "error"),
        Rule(owed, "error", like=error),
        Rule((*part, "owner_error", ANY), "owner", into=[error, owed] if keep_unsent else [error]),
        Rule((*part, "exchange", "start", ANY), "error"),
        Rule((*part, "exchange", "invalid"), "constant", value=False),  # the mean of x is validated in the next round
        *(Rule((*part, name), "own") for name in ("owner_error", "owed", "aggregator", "contraction")),
        *(Rule((*part, name), "shared") for name in ("rounds", "anchor", "exchange")),
        *(Rule(("identity", name), "constant") for name in ("rank", "workers")),
        *(Rule((name,), "own") for name in ("skips", "ledger", "membership")),
        *(Rule((name,), "shared") for name in ("format", "identity", "steps", "outer", "escape")),
        *(Rule((name,), "shared") for name in ("resets", "drifts")),
    ]


def _by_kind(workers: Workers | Elastic) -> tuple[Elastic | None, Workers]:
    """Return the settings of elastic workers, or None, and of a fixed set, or the defaults."""
    return (workers, Workers()) if isinstance(workers, Elastic) else (None, workers)
