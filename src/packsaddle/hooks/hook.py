"""Gradient hooks: what those of DistributedDataParallel and FSDP have in common.

Gradients come in slices, buckets or modules, each with an `ErrorFeedback` of its own (`GradientSlice`), and the slices
of a backward pass are one transaction (`GradientHook`). DistributedDataParallel makes its buckets anew after the first
step or two, so what has not been sent yet belongs to a parameter, never to a bucket. The memory is in units of a
gradient, so it must follow the learning rate of plain SGD (see `stages.learning_rates`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.ledger import Ledger
from packsaddle.compressors import Compressor, Identity, describe
from packsaddle.errors import is_below
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.contraction import SlicedMonitor
from packsaddle.feedback.drift import DriftGuard, StepRates
from packsaddle.feedback.guard import THE_MEAN, THE_SUM, Skip, Skips
from packsaddle.feedback.noise import GaussianNoise
from packsaddle.feedback.round import Round, SliceFeedback
from packsaddle.feedback.slices import Place, Shaped, Slice
from packsaddle.hooks.budget import Allocation
from packsaddle.numerics.finite import first_bad, is_finite, is_usable, spoil
from packsaddle.options.agreement import Option, agreement

Scope = Literal["bucket", "model"]


@dataclass(frozen=True)
class HookOptions(Option):
    """The settings of a hook; see `register_ddp_hook`. Raises ValueError for bad arguments."""

    compression: Compression
    scope: Scope
    start_step: int
    seed: int

    def __post_init__(self) -> None:
        self.compression.check_gradients()
        if is_below(self.start_step, 0):
            raise ValueError(f"start_step must be 0 or more steps, got {self.start_step}")
        if self.scope not in get_args(Scope):
            raise ValueError(f'scope must be "bucket" or "model", got {self.scope!r}')
        for name, only in {
            "memory": "buffer",
            "on_drift": "stop",
        }.items():  # another optimizer steps, by its own state
            if (given := getattr(self.compression, name)) != only:
                raise ValueError(f'{name} must be "{only}" in a hook, got "{given}", which is for CompressedSGD')

    def at(self, step: int) -> Compressor:
        """Return the compressor of a step."""
        return Identity() if step < self.start_step else self.compression.at(step)

    def agreement(self) -> dict[str, object]:
        """Return what all workers must be given, by name."""
        return {name.removeprefix("compression."): value for name, value in agreement(self).items()}


@dataclass(frozen=True)
class Gradients:
    """A slice's gradients by parameter: the update of its memory, and where the mean is to be.

    As an update they are g / scale + xi; e is multiplied by `decay` and by `factors`, 1 where none is given, first.
    """

    of: Slice
    grads: Mapping[str, Tensor]
    noise: GaussianNoise | None
    scale: float
    factors: Mapping[str, float]
    decay: float = 1.0

    def add(self, base: Shaped, out: Shaped) -> None:
        """Set out to factor base + g / scale + xi, both float[n]."""
        for place, e, v in zip(self.of.places, base.views, out.views, strict=True):
            g, factor = self.grads[place.name], self.decay * self.factors.get(place.name, 1.0)
            if self.scale == 1.0:
                torch.add(g, e, alpha=factor, out=v)
            else:
                torch.mul(e, factor, out=v).add_(g, alpha=1 / self.scale)
        self.perturb(out.flat)

    def perturb(self, out: Tensor) -> None:
        """Add xi to out, float[n]; its coordinates are those of the whole vector."""
        if self.noise is not None:
            for first, last, start in self.of.stretches():
                self.noise.add_to(out[first:last], 1.0, start)

    def replace(self, g: Averaged) -> Tensor | None:
        """Write mean_i g^(i), times the scale, over the gradients (line 11).

        Returns what 16-bit gradients could not take of it, the same on every worker, float[n]; else None.
        """
        total = self.of.zeros()
        for term in g.mean:
            term.add_to(total.flat[: self.of.compressed_d], 1.0)
        total.flat[self.of.compressed_d :] = g.dense
        exact = all(out.element_size() >= total.flat.element_size() for out in self.grads.values())
        for place, view in zip(self.of.places, total.views, strict=True):
            out = self.grads[place.name]
            torch.mul(view, self.scale, out=out)
            if not exact:
                view.sub_(out, alpha=1 / self.scale)
        return None if exact else total.flat

    def fit(self, g: Averaged) -> Tensor:
        """Tell if gradients can hold the mean times the scale, bool[]; the same on all workers."""
        dtypes = {torch.promote_types(out.dtype, torch.float32) for out in self.grads.values()}  # 16 bits: `replace`
        return g.magnitude() * self.scale <= min((torch.finfo(dtype).max for dtype in dtypes), default=0.0)


_NO_FACTORS: Mapping[str, float] = {}
UNLIKE = 4.0  # the outcome of an exchange in which workers had different slices


class GradientSlice:
    """Error feedback on a slice of the gradient, by a compressor that may change from step to step.

    The aggregator follows the compressor, and the allocation of its budget. `pending` has what these parameters have
    gathered elsewhere, by name; what is taken from it is removed.
    """

    def __init__(
        self,
        of: Slice,
        pending: dict[str, Tensor],
        channel: Communicator,
        rules: HookOptions,
        allocation: Allocation,
    ) -> None:
        self.of, self._rules, self._allocation = of, rules, allocation
        self._names = tuple(place.name for place in of.places)
        self.feedback = SliceFeedback(of, rules.compression, channel, rules.seed, allocation.d)
        self._round: Round | None = None  # the exchange that is being tried
        for place, view in self.views():
            if (known := pending.pop(place.name, None)) is not None:
                view.copy_(known)

    def exchange(
        self,
        gradients: Mapping[str, Tensor],
        noise: GaussianNoise | None,
        step: int,
        *,
        scale: float = 1.0,
        factors: Mapping[str, float] = _NO_FACTORS,
        bits: Tensor | None = None,
        watch: Callable[[Tensor], None] = lambda vector: None,
        report: Callable[[str], None] = lambda name: None,
    ) -> Tensor:
        """Lines 10-12 of Algorithm 1: replace the gradients by their mean, and try what that leaves of the error.

        A worker whose vector is not finite sends zeros and says so. Returns 0 if all is well, at most 1 if there was
        such a worker, and more if there was none but the mean is not finite or not for gradients to hold.
        `bits` of 0 or 1, float[b], identify the slice; if they differ between workers, returns `UNLIKE` or more.
        `factors` are what errors are to be multiplied by first, by parameter (see `Rates`); those of 0 stand still.
        `watch` sees this worker's vector, float[n], before and after; `report` the name of the first parameter of which
        it is not finite, on a CPU, since on a GPU to look would be to wait.
        """
        # While an error stands still, no exchange may hold a part of it.
        still = [i for i, place in enumerate(self.of.places) if factors.get(place.name) == 0]
        dense = bool(still) and self._rules.compression.exchange != "direct"
        compressor = Identity() if dense else self._rules.at(step)
        self.feedback.prepare(compressor, self._allocation.of(self._names, compressor))

        # Line 10: v = e^(i) + grad F_i(x_t) + xi_t, of which C(v) is averaged, with a number that says if v is of use.
        update = Gradients(self.of, gradients, noise, scale, factors, self._rules.compression.decay)
        self._round = r = self.feedback.round(step)
        v = r.correct(update)
        bad = self._blank(v, report)
        self._allocation.observe(self._names, v[: self.of.compressed_d], compressor)
        watch(v)
        self._rescale_held(factors)
        g, (share, means) = r.exchange(v, [bad.reshape(1).to(v), v.new_empty(0) if bits is None else bits.to(v)])

        # Line 11, by way of the optimizer that has the gradients. 16-bit ones may overflow.
        lost = update.replace(g)
        fits = update.fit(g) if lost is None else update.fit(g) & is_finite(lost)

        # Line 12: e^(i) <- v - g^(i), except where an error is to stand still, or none is wanted.
        r.absorb(g, lost)
        watch(v)
        self.feedback.memory.leave(still)
        if not self._rules.compression.decay:
            self._release(v)
        differs = (means * (1 - means) > 1e-6).any()  # a mean of equal bits is 0 or 1, to rounding
        return share[0] + 2 * (~fits).to(share) + UNLIKE * differs.to(share)

    def settle(self, *, taken: bool) -> None:
        """Make the step that was tried the state, or forget it."""
        if self._round is not None:
            self._round.settle(taken=taken)
            self._round = None

    def _blank(self, v: Tensor, report: Callable[[str], None]) -> Tensor:
        """Make v zeros if it cannot be used; return whether, bool[]."""
        bad = ~is_usable(v)
        if v.device.type == "cpu" and bad:
            named = [(place.name, view) for place, view in self.of.named(v)]
            report(first_bad(named) or THE_SUM)
        spoil(v, bad, 0.0)
        return bad

    def _rescale_held(self, factors: Mapping[str, float]) -> None:
        """Bring what the aggregator holds back to the units of the present rates; 0 only where it holds nothing."""
        if factors:
            for held in self.feedback.held().values():
                for place, view in self.of.named(held):
                    view.mul_(factors.get(place.name, 1.0))

    def _release(self, v: Tensor) -> None:
        """Keep no error, where none is to be fed back."""
        v.zero_()
        for held in self.feedback.held().values():
            held.zero_()

    def views(self) -> list[tuple[Place, Tensor]]:
        """Return e^(i) by parameter, without what the aggregator holds back; not copies."""
        return list(zip(self.of.places, self.feedback.memory.views, strict=True))

    def pending(self) -> Tensor:
        """Return a copy of e^(i), float[n], with this worker's share of what the aggregator holds back."""
        return self.feedback.pending().clone()

    def fold(self) -> None:
        """Move what the aggregator holds back into the error memory, so that nothing is lost when it goes."""
        self.feedback.fold()

    def reset(self) -> None:
        """Clear all errors (line 7)."""
        self.feedback.reset()

    def held(self) -> dict[str, Any]:
        """Return what the aggregator holds and for which compressor, tensors and plain types; {} if there is none."""
        return self.feedback.held_state()

    def restore(self, held: Mapping[str, Any], step: int) -> None:
        """Have the step's aggregator hold what was saved; if another compressor's did, the error memory has it."""
        self.feedback.restore(held, self._rules.at(step))


class GradientHook:
    """The slices exchanged in the running or last pass, and the count of applied passes.

    A pass's outcome is read on demand or when the next one begins, so that a pass waits for no GPU. `d` is the
    number of coordinates that all slices compress together.
    """

    def __init__(self, channel: Communicator, rules: HookOptions, d: int) -> None:
        self.channel = channel
        self._allocation = Allocation(d)
        self._rules, self._monitor = rules, SlicedMonitor(rules.compression.monitor_every)
        self._drift = DriftGuard(rules.compression.compare_every, rules.compression.on_drift, channel)
        self._step_rates = StepRates()
        self._lock = RLock()  # a backward pass may read what a background thread is making
        self._skips = Skips(rules.compression.max_skipped, channel.group.rank, protected=False)
        self._steps = 0
        self._tried: list[GradientSlice] = []
        self._bad: list[Tensor] = []  # the results of `GradientSlice.exchange`
        self._bad_name = ""  # the first parameter whose part of this worker's vector is invalid
        self._complete = False
        self._protected: list[Optimizer] = []
        self._spoiled: list[Optimizer] = []  # those whose gradients have NaNs of a rejected pass
        self._fresh = True  # the running pass exchanges all that gradients have accumulated

    def __repr__(self) -> str:  # without waiting for a running pass
        compressor, workers = describe(self._rules.at(self._steps)), self.channel.group.size
        return f"{type(self).__name__}({compressor}, scope={self._rules.scope}, {workers=}, steps={self._steps})"

    @property
    def ledger(self) -> Ledger:
        """The bytes this worker sent and received, by step and purpose."""
        return self.channel.ledger

    @property
    def steps(self) -> int:
        """The number of applied exchanges, without those `skipped`."""
        self._settle()
        return self._steps

    @property
    def skipped(self) -> int:
        """The number of steps skipped because a worker's gradient, or the mean, was invalid."""
        self._settle()
        return self._skips.count

    @property
    def skips(self) -> list[Skip]:
        """The skipped steps since construction or loading; each worker names its own invalid parameter."""
        self._settle()
        return self._skips.list

    @property
    def contraction(self) -> float | None:
        """The contraction mu of this worker's vector when last measured (see `monitor_every`)."""
        self._settle()
        return self._monitor.whole

    def protect(self, optimizer: Optimizer) -> None:
        """Make `optimizer` skip its step after a rejected exchange, as scalers do.

        Gradients are set to None for that step, so parameters and optimizer state do not change; also if `step` calls a
        closure for them, once.
        """
        if self._skips.most is not None:
            optimizer.register_step_pre_hook(self._withhold)
            self._protected.append(optimizer)
            self._skips.protected = True

    def trust(self, scaler: torch.amp.GradScaler) -> None:
        """Register a GradScaler, `scaler`. While enabled, it skips steps with non-finite gradients."""
        self._skips.protected |= scaler.is_enabled()

    def _withhold(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Clear the gradients of a rejected exchange, before the optimizer's step or after the step's closure."""
        named = kwargs.get("closure")
        closure = named or (args[1] if len(args) > 1 and callable(args[1]) else None)  # the optimizer is the first
        if closure is None:
            self._take_away(optimizer)
            return None

        def guarded() -> Any:
            found = closure()
            self._take_away(optimizer)
            return found

        return (args, {**kwargs, "closure": guarded}) if named else ((args[0], guarded, *args[2:]), kwargs)

    def _take_away(self, optimizer: Optimizer) -> None:
        self._settle()
        if optimizer in self._spoiled:
            self._spoiled.remove(optimizer)
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = None

    def _open(self) -> None:
        """Begin a pass, once the outcome of the last one is known."""
        self._settle(broken_off=True)
        self._skips.check(self._skips.in_a_row)
        self.channel.step = self._steps
        self._allocation.begin(self._rules.at(self._steps))

    def _try(
        self,
        part: GradientSlice,
        gradients: Mapping[str, Tensor],
        noise: GaussianNoise | None,
        scale: float = 1.0,
        factors: Mapping[str, float] = _NO_FACTORS,
        bits: Tensor | None = None,
    ) -> Tensor:
        """Exchange one slice of the pass; return the outcome of `GradientSlice.exchange`."""
        with self._lock:
            self._tried.append(part)
        watch = partial(self._monitor.measure, self._steps)
        bad = part.exchange(
            gradients, noise, self._steps, scale=scale, factors=factors, bits=bits, watch=watch, report=self._report
        )
        self._bad.append(bad)
        return bad

    def _settle(self, *, broken_off: bool = False) -> None:
        """Commit the last step, or roll it back if it was broken off or a worker's gradient was invalid.

        No-op during a backward pass. Raises RuntimeError if workers exchanged different slices.
        """
        with self._lock:
            if not self._tried or not (self._complete or broken_off):
                return
            # All workers read the same outcomes, so all commit every slice, or none does.
            outcomes = torch.stack(self._bad).tolist() if self._complete else []
            told = [bad for bad in outcomes if bad != 0]
            taken = self._complete and not told
            unlike = [part.of.places[0].name for part, bad in zip(self._tried, outcomes, strict=False) if bad >= UNLIKE]
            self._conclude(taken=taken)
            self._allocation.settle(taken=taken)
            for part in self._tried:
                part.settle(taken=taken)
            self._monitor.settle(self._steps, taken=taken)
            # A rejected pass leaves NaNs in the gradients: `_withhold` clears them for protected optimizers.
            if taken:
                self._skips.took()
                self._spoiled = [] if self._fresh else self._spoiled
            elif self._complete and not unlike:
                self._spoiled = list(self._protected)
                workers = (self.channel.group.rank,) if self._bad_name else ()
                others = "a gradient of another worker" if min(told) <= 1 else THE_MEAN
                self._skips.enter(Skip(self._steps, workers, self._bad_name or others))
            self._steps += taken
            self._tried, self._bad, self._complete, self._bad_name = [], [], False, ""
            if unlike:
                raise RuntimeError(
                    f"replicas must use the same modules in a backward pass, in one order, but while this one reduced "
                    f"{unlike[0] or 'the root module'}, another reduced another module of its size"
                )

    def _conclude(self, *, taken: bool) -> None:
        """Commit or roll back other state of the hook."""

    def _report(self, name: str) -> None:
        self._bad_name = self._bad_name or name
