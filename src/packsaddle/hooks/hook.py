"""A backward pass as one transaction: the base class of the hooks of DistributedDataParallel and FSDP.

Gradients arrive in slices (DDP's buckets or FSDP's modules), and an `ErrorFeedback` exchanges each slice. The exchanges
of a backward pass are all committed, or all rolled back. Error memories are in units of a gradient. They are saved by
parameter or module, since DistributedDataParallel may rebuild its buckets.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.communicator import Communicator, ring_all_reduce
from packsaddle.comm.ledger import Bytes, Ledger, Totals
from packsaddle.compressors import Compressor, Identity, describe
from packsaddle.errors import check_integers
from packsaddle.feedback.checks import Contraction, DriftGuard, StepRates
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.guard import THE_MEAN, THE_SUM, Guard, Records, Skip, Skips
from packsaddle.feedback.memory import ErrorMemory, Update
from packsaddle.feedback.noise import GaussianNoise, Noise
from packsaddle.feedback.report import Report
from packsaddle.feedback.round import Applied, ErrorFeedback, Round
from packsaddle.feedback.slices import Shaped, Slice
from packsaddle.feedback.state import ANY, Rule, State, Value, Vector, attribute
from packsaddle.hooks.budget import Allocation
from packsaddle.hooks.unused import Usage, clear_unused
from packsaddle.numerics.finite import is_finite
from packsaddle.numerics.transfers import Readback
from packsaddle.options.agreement import Option

Scope = Literal["bucket", "model"]


@dataclass(frozen=True)
class HookOptions(Option):
    """The settings of a hook; see `register_ddp_hook`. Raises ValueError for an invalid argument."""

    compression: Compression
    noise: Noise
    scope: Scope
    start_step: int
    seed: int

    def __post_init__(self) -> None:
        self.compression.check_gradients()
        self.noise.check_eager()
        check_integers(0, start_step=self.start_step)
        if self.scope not in get_args(Scope):
            raise ValueError(f'scope must be "bucket" or "model", got {self.scope!r}')
        # memory="ef21" and the repair of drift need the step of CompressedSGD.
        for name, only in (("memory", "buffer"), ("on_drift", "stop")):
            if (given := getattr(self.compression, name)) != only:
                raise ValueError(f'{name} must be "{only}" in a hook, got "{given}", which is for CompressedSGD')

    def at(self, step: int) -> Compressor:
        """Return the compressor of a step. Before `start_step` it is `Identity`, which is lossless."""
        return Identity() if step < self.start_step else self.compression.at(step)


@dataclass(frozen=True)
class BucketUpdate(Update):
    """The gradients g and the noise xi that are added to the error memory e of a slice (parameters exchanged together).
    The vector to send is v = decay * e + g / scale + xi. `scale` is the factor by which a GradScaler has multiplied
    g."""

    of: Slice
    gradients: Mapping[str, Tensor]
    noise: GaussianNoise | None
    scale: float
    decay: float = 1.0

    def add(self, base: Shaped, out: Shaped) -> None:
        """Set out to decay * base + g / scale + xi, where base is the error memory, g are the gradients and xi is the
        noise. base and out are float[n] and must not overlap."""
        for place, e, v in zip(self.of.places, base.views, out.views, strict=True):
            g = self.gradients[place.name]
            if self.scale == 1.0:
                torch.add(g, e, alpha=self.decay, out=v)
            else:
                torch.mul(e, self.decay, out=v).add_(g, alpha=1 / self.scale)
        if self.noise is not None:
            self.of.add_noise(out.flat, self.noise)


@dataclass(frozen=True)
class BucketTarget:
    """Writes the mean update of an exchange to the gradients of a slice, i.e. of parameters exchanged together. The
    user's optimizer then applies these gradients to the parameters (line 11 of Algorithm 1).

    `used`, bool[p], is False for parameters whose mean update is replaced with zeros; if it is None, none is replaced.
    """

    of: Slice
    gradients: Mapping[str, Tensor]
    scale: float
    used: Tensor | None = None
    defers = True

    def apply(self, g: Averaged, magnitude: Tensor | float) -> Applied:
        """Overwrite the gradients with the mean update g, multiplied by `scale`, the factor of the GradScaler, since
        the scaler will divide by it. Only 16-bit gradients cause a rounding error."""
        total = self.of.zeros()
        g.write_to(total.flat)
        clear_unused(total.views, self.used)
        outs = [self.gradients[place.name] for place in self.of.places]
        exact = all(out.element_size() >= total.flat.element_size() for out in outs)
        for view, out in zip(total.views, outs, strict=True):
            torch.mul(view, self.scale, out=out)
            if not exact:
                view.sub_(out, alpha=1 / self.scale)
        # The scaled mean must not overflow. The precision that 16-bit gradients lose is in the rounding error.
        dtypes = {torch.promote_types(out.dtype, torch.float32) for out in outs}
        fits = torch.as_tensor(magnitude) * self.scale <= min((torch.finfo(t).max for t in dtypes), default=0.0)
        return Applied(fits) if exact else Applied(fits & is_finite(total.flat), total.flat)


RULES = [
    Rule(("error", ANY), "error"),
    *(Rule(("identity", name), "constant") for name in ("rank", "workers")),
    *(Rule((name,), "own") for name in ("allocation", "ledger")),
    *(Rule((name,), "shared") for name in ("format", "identity", "steps", "skips", "aggregator")),
]


class GradientHook(Records, ABC):
    """Base class of gradient hooks: the exchanges of a backward pass are all applied, or all rejected. The host reads
    the outcome on demand or in the next pass, so that it does not wait for a GPU in each pass. `d` is the number of
    compressed coordinates."""

    saved_state: State  # set by subclasses

    def __init__(self, channel: Communicator, rules: HookOptions, d: int) -> None:
        self.channel, self.rules, self._allocation = channel, rules, Allocation(d)
        self._guard = Guard("extra", unnamed=THE_SUM)
        self._contraction = Contraction(rules.compression.monitor_every)
        self._drift = DriftGuard(rules.compression.compare_every, rules.compression.on_drift, channel)
        self._step_rates = StepRates()
        self._lock = RLock()  # a background thread runs the exchanges of a pass
        self._skips = Skips(rules.compression.max_skipped, channel.group.rank, protected=False)
        self._steps = 0
        # The `ErrorFeedback` of each slice (bucket or module), made when the slice's gradients first arrive.
        self._slices: dict[Any, ErrorFeedback] = {}
        self._sizes: dict[str, int] = {}  # bytes of each parameter's or module's gradient
        self._loose: dict[str, Tensor] = {}  # error memory of parameters or modules without a slice, by name
        # State of the running backward pass, or of the last one.
        self._noise: GaussianNoise | None = None  # noise xi of the next exchange; None: 0
        self._scale = 1.0  # the factor by which a GradScaler has multiplied the gradients
        self._pass: list[Round] = []
        self._codes: list[Tensor] = []  # `Verdict.code` of each exchange
        self._outcome: Readback | None = None  # copy of the codes to the host; None: the pass is incomplete
        self._protected: list[Optimizer] = []
        self._rejected: list[Optimizer] = []  # protected optimizers whose gradients have NaNs of a rejected pass
        self._fresh = True  # False if p.grad also has gradients of earlier passes
        self.may_be_unused = False  # True if a backward pass may use only some parameters (see `Usage`)

    def __repr__(self) -> str:
        # Use `_steps`, since `steps` may wait for the device.
        compressor, workers = describe(self.rules.at(self._steps)), self.channel.group.size
        return f"{type(self).__name__}({compressor}, scope={self.rules.scope}, {workers=}, steps={self._steps})"

    @property
    def ledger(self) -> Ledger:
        """The bytes this worker sent and received, by step and purpose."""
        return self.channel.ledger

    @property
    def steps(self) -> int:
        """The number of backward passes whose exchanges were applied. Rejected passes are counted by `skipped`."""
        self._settle()
        return self._steps

    @property
    def uncompressed(self) -> Bytes:
        """The bytes that ring all-reduces of the same gradients, without compression, would have sent."""
        exchanges = self.steps + self.skipped
        return ring_all_reduce(exchanges * sum(self._sizes.values()), self.channel.group.size)

    @property
    def contraction(self) -> float | None:
        """The contraction 1 - ||v - C(v)||^2 / ||v||^2 at the last measurement, where this worker's vector v was
        compressed to C(v). It is None if there was no measurement (see `Compression.monitor_every`)."""
        self._settle()
        return self._contraction.whole

    def protect(self, optimizer: Optimizer) -> None:
        """Make `optimizer` skip its step after a rejected exchange, as scalers do.

        Gradients are set to None for that step, so parameters and optimizer state do not change. The step may have a
        closure, which it must call once to compute the gradients.
        """
        if self._skips.most is not None:
            optimizer.register_step_pre_hook(self._clear_rejected_gradients)
            self._protected.append(optimizer)
            self._skips.protected = True

    def _clear_rejected_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Clear the gradients of a rejected exchange, before the optimizer's step or after the step's closure."""
        named = kwargs.get("closure")
        closure = named or (args[1] if len(args) > 1 and callable(args[1]) else None)  # args[0] is the optimizer
        if closure is None:
            self._clear_gradients(optimizer)
            return None

        def guarded() -> Any:
            found = closure()
            self._clear_gradients(optimizer)
            return found

        return (args, {**kwargs, "closure": guarded}) if named else ((args[0], guarded, *args[2:]), kwargs)

    def _clear_gradients(self, optimizer: Optimizer) -> None:
        self._settle()
        if optimizer in self._rejected:
            self._rejected.remove(optimizer)
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = None

    def _open(self) -> None:
        """Commit or roll back the exchanges of the last backward pass, and prepare the exchanges of a new pass.

        Raises NonFiniteError after too many consecutive skipped steps.
        """
        self._settle(interrupted=True)
        self._skips.check(self._skips.in_a_row)
        self.channel.step = self._steps
        self._allocation.begin(self.rules.at(self._steps))

    def _feedback(self, of: Slice, seed: int) -> ErrorFeedback:
        """Return a new `ErrorFeedback` for a slice (parameters exchanged together). The error memories of its
        parameters are moved to it from `_loose`, which has the error memories of parameters that are in no slice."""
        memory = ErrorMemory(of, spare=True)
        for place, view in of.named(memory.vector):
            if (error := self._loose.pop(place.name, None)) is not None:
                view.copy_(error)
        parts = (memory, self.channel, self._guard, self._contraction)
        return ErrorFeedback(*parts, seed=seed, back=self.rules.compression.back, whole=self._allocation.d)

    def _use(self, part: ErrorFeedback) -> Compressor:
        """Set the compressor of `part`, a slice (parameters exchanged together), for this step. If the model's budget
        of coordinates is divided among slices, the slice's compressor has only the slice's part of the budget. Returns
        the step's compressor for the whole model."""
        compressor = self.rules.at(self._steps)
        allotted = self._allocation.of(tuple(part.slice.names), compressor)
        part.use(compressor, self.rules.compression.exchange_of(compressor), allotted=allotted)
        return compressor

    def _exchange(
        self, part: ErrorFeedback, gradients: Mapping[str, Tensor], identity: Sequence[Tensor] = ()
    ) -> Tensor:
        """Replace the gradients of a slice (parameters exchanged together) with their mean over workers; return
        `Verdict.code`, float[3], which is 0 if the exchange is applied.

        These are lines 10-12 of Algorithm 1, uncommitted until the pass ends. The tensors of `identity`, [b] each,
        contain bits of 0 or 1 that identify the slice. They are compared between workers.
        """
        decay, compressor = self.rules.compression.decay, self._use(part)
        r = part.round(self._steps)
        with self._lock:
            self._pass.append(r)
        # Line 10 of Algorithm 1: v is the sum of error memory, gradient and noise. The mean of C(v) is computed below.
        v = r.correct(BucketUpdate(part.slice, gradients, self._noise, self._scale, decay))
        usage = Usage(part, gradients) if self.may_be_unused else None
        flags = [] if usage is None else [usage.here]
        clear_unused(part.slice.views(v), None if usage is None else usage.here)
        self._allocation.observe(tuple(part.slice.names), v[: part.slice.compressed_d], compressor)
        r.exchange([bits.to(v) for bits in (*identity, *flags)])
        # Lines 11 and 12 of Algorithm 1. The user's optimizer then applies the gradients to the parameters x.
        by_any = None if usage is None else r.extras.pop() > 0
        r.apply(BucketTarget(part.slice, gradients, self._scale, by_any))
        if usage is not None and by_any is not None:
            usage.restore(by_any)
        # Without error feedback, the residual is discarded.
        if not decay:
            v.zero_()
        is_unlike: Tensor | bool = False
        # If the bits are equal on all workers, their mean is 0 or 1, up to rounding.
        for mean in r.extras:
            is_unlike = (mean * (1 - mean) > 1e-6).any() | is_unlike
        self._codes.append(r.verdict.code(is_unlike))
        return self._codes[-1]

    def _complete(self) -> None:
        """End the exchanges of a backward pass: start to copy their outcomes to the host, without waiting for the
        copy."""
        self._outcome = Readback(torch.stack(self._codes))

    def _settle(self, *, interrupted: bool = False) -> None:
        """Commit the last backward pass, or roll it back if it was interrupted or a worker's gradient was invalid.

        No-op during a backward pass. Raises RuntimeError if workers exchanged different modules with each other.
        """
        with self._lock:
            if not self._pass or not (self._outcome or interrupted):
                return
            # All workers read the same codes, so all commit every slice, or none does.
            codes = self._outcome.tolist() if self._outcome else []
            rejected = [code for code in codes if any(number != 0 for number in code)]  # NaN != 0 is True
            applied = self._outcome is not None and not rejected
            unlike = [r.feedback.slice.names[0] for r, code in zip(self._pass, codes, strict=False) if code[2]]
            self._allocation.close(apply=applied)
            for part in self._pass:
                part.close(apply=applied)
            self._contraction.close(self._steps, apply=applied)
            # A rejected pass leaves NaNs in the gradients, which protected optimizers clear before their step.
            if applied:
                self._skips.reset_streak()
                self._rejected = [] if self._fresh else self._rejected
            elif self._outcome and not unlike:
                self._rejected = list(self._protected)
                others = "a gradient of another worker" if any(code[0] for code in rejected) else THE_MEAN
                reports = (report for r in self._pass if (report := r.full_report()))  # only the first report is used
                skip = Skip.of(self._steps, {self.channel.group.rank: next(reports, Report())}, others)
                if not skip.workers and any(math.isnan(code[0]) for code in rejected):
                    skip = replace(skip, message="another worker has received an invalid message")
                self._skips.record(skip)
            self._steps += applied
            self._pass, self._codes, self._outcome = [], [], None
            if unlike:
                raise RuntimeError(
                    f"replicas must use the same modules in a backward pass, in one order, but while this one reduced "
                    f"{unlike[0] or 'the root module'}, another reduced another module of its size"
                )

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device on which gradients are averaged."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Return a dict of the settings, such as the seed, that must be equal when a state is saved and when it is
        loaded."""

    def _saved_fields(self) -> list[Vector | Value]:
        """Return the fields of the saved state, in the order in which they are loaded. A field comes after the fields
        on which it depends."""
        return [
            attribute(("steps",), self, "_steps", int),
            *self._skips.fields(),
            self._allocation.field(lambda: self.device),
            Value(("ledger",), Totals, self.ledger.state_dict, self.ledger.load_state_dict),
        ]

    def _load_errors(self, saved: Mapping[str, Tensor]) -> None:
        """Store loaded error memories, given by name of the parameter or module, in `_loose`. `_feedback` moves each to
        its slice when the slice's next gradients arrive."""
        self._slices, self._loose = {}, {name: error.to(self.device, copy=True) for name, error in saved.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state, such as error memory and counts, as tensors and plain types. It differs between
        workers."""
        self._settle()
        return self.saved_state.save()

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if `load_state_dict` would reject `state`. The error names the first entry that does not
        fit."""
        self.saved_state.validate(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, this worker's `state_dict`. Raises ValueError, with nothing changed, if the state does not
        match this hook."""
        self.saved_state.validate(state)
        self._settle(interrupted=True)
        self._step_rates.clear()
        self.saved_state.load(state)
        self._drift.resume(max(0, self._steps - 1))  # parameters are compared when the next step begins
