"""A backward pass as one transaction: the base class of the hooks of DistributedDataParallel and FSDP.

A backward pass produces gradients in slices, which are DDP's buckets or FSDP's modules. Each slice is exchanged by its
own `ErrorFeedback`. The exchanges of a backward pass are all committed, or all rolled back. Error memories are in units
of a gradient. A saved state has one error memory for each parameter (or module of FSDP) and not for each bucket, since
DistributedDataParallel may form other buckets after loading.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, ring_all_reduce
from packsaddle.comm.ledger import Bytes, Ledger, Totals
from packsaddle.compressors import Compressor, Identity, describe
from packsaddle.errors import check_integers
from packsaddle.feedback.checks import Contraction, DriftGuard, StepRates
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.guard import THE_MEAN, THE_SUM, Guard, Records, Skip, Skips
from packsaddle.feedback.memory import ErrorMemory
from packsaddle.feedback.noise import GaussianNoise, Noise
from packsaddle.feedback.report import Report
from packsaddle.feedback.round import ErrorFeedback, Round
from packsaddle.feedback.slices import Slice
from packsaddle.feedback.state import ANY, Rule, State, Value, Vector, attribute
from packsaddle.hooks.gradients import BucketTarget, BucketUpdate, Usage
from packsaddle.numerics.devices import Readback
from packsaddle.options.agreement import Option

Scope = Literal["bucket", "model"]


@dataclass(frozen=True)
class HookOptions(Option):
    """The settings of a hook, described in `register_ddp_hook`.

    Raises ValueError for an invalid setting.
    """

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

    def at(self, step: int) -> Compressor:
        """Return the compressor of a step. In the first `start_step` steps it is `Identity`, which is lossless."""
        return Identity() if step < self.start_step else self.compression.at(step)


RULES = [
    Rule(("error", ANY), "error"),
    *(Rule(("identity", name), "constant") for name in ("rank", "workers")),
    Rule(("ledger",), "own"),
    *(Rule((name,), "shared") for name in ("format", "identity", "steps", "skips", "aggregator")),
]


class GradientHook(Records, ABC):
    """Base class of the gradient hooks. The exchanges of a backward pass are all applied, or all rejected.

    The host reads their outcome only on demand or in the next pass, so that it does not wait for a GPU in each pass.
    `d` is the number of compressed coordinates of the model.
    """

    saved_state: State  # the saved state of this hook, which the subclass sets

    def __init__(self, channel: Communicator, rules: HookOptions, d: int) -> None:
        self.channel, self.rules, self._d = channel, rules, d
        self._guard = Guard("extra", unnamed=THE_SUM)
        self._contraction = Contraction(rules.compression.monitor_every)
        self._drift = DriftGuard(rules.compression.compare_every, channel)
        self._step_rates = StepRates()
        self._lock = RLock()  # needed since a background thread runs the exchanges of a pass
        self._skips = Skips(rules.compression.max_skipped, channel.group.rank, protected=False)
        self._steps = 0
        # The `ErrorFeedback` of each slice (bucket or module). It is made when the first gradients of the slice are
        # ready.
        self._slices: dict[Any, ErrorFeedback] = {}
        self._sizes: dict[str, int] = {}  # size in bytes of each parameter's or module's gradient, by name
        # Error memories, by name, of parameters or modules that are in no slice of `_slices`
        self._loose: dict[str, Tensor] = {}
        # State of the running backward pass, or of the last one.
        self._noise: GaussianNoise | None = None  # noise xi of the next exchange; None: no noise
        self._scale = 1.0  # factor by which a GradScaler has multiplied the gradients; 1: no scaler
        self._pass: list[Round] = []
        self._codes: list[Tensor] = []  # `Verdict.code` of each exchange in the pass
        # Copy of `_codes` to the host, which may still be in progress; None: the backward pass has not ended.
        self._outcome: Readback | None = None
        self._protected: list[Optimizer] = []
        self._rejected: list[Optimizer] = []  # protected optimizers whose gradients are NaNs, since a pass was rejected
        self._fresh = True  # False if p.grad also has the NaNs of an earlier pass

    def __repr__(self) -> str:
        # Use `_steps`, since `steps` may wait for the device.
        compressor, workers = describe(self.rules.at(self._steps)), self.channel.group.size
        return f"{type(self).__name__}({compressor}, scope={self.rules.scope}, {workers=}, steps={self._steps})"

    @property
    def ledger(self) -> Ledger:
        """The record of the bytes that this worker has sent and received, by step and purpose."""
        return self.channel.ledger

    @property
    def steps(self) -> int:
        """The number of backward passes whose exchanges were applied. Rejected passes are counted by `skipped`."""
        self._settle()
        return self._steps

    @property
    def uncompressed(self) -> Bytes:
        """The number of bytes that this worker would have sent for the same gradients without compression, by ring
        all-reduces."""
        exchanges = self.steps + self.skipped
        return ring_all_reduce(exchanges * sum(self._sizes.values()), self.channel.group.size)

    @property
    def contraction(self) -> float | None:
        """The contraction 1 - ||v - C(v)||^2 / ||v||^2 at the last measurement, where v is the vector that this worker
        compressed to C(v).

        It is None if nothing was measured yet (see `Compression.monitor_every`).
        """
        self._settle()
        return self._contraction.whole

    def protect(self, optimizer: Optimizer) -> None:
        """Make `optimizer` skip its step after a rejected exchange, as a GradScaler does.

        Before that step gradients are set to None, so the step changes neither parameters nor the optimizer's state. If
        the step has a closure, it must call the closure exactly once, to compute the gradients. No-op with
        max_skipped=None.
        """
        if self._skips.most is not None:
            optimizer.register_step_pre_hook(self._clear_rejected_gradients)
            self._protected.append(optimizer)
            self._skips.protected = True

    def _clear_rejected_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Set the gradients of `optimizer` to None if they are those of a rejected exchange. It is a pre-hook of the
        optimizer's step.

        If the step has a closure, the gradients are set to None when the closure returns. Returns the step's arguments
        with a closure that does this, or None if there is no closure.
        """
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
        """Begin a backward pass: commit or roll back the exchanges of the last one.

        If the last pass was interrupted, its exchanges are rolled back. Raises NonFiniteError after too many
        consecutive skipped steps.
        """
        self._settle(interrupted=True)
        self._skips.check(self._skips.in_a_row)
        self.channel.step = self._steps

    def _feedback(self, of: Slice, seed: int) -> ErrorFeedback:
        """Return a new `ErrorFeedback` for the slice `of` (parameters exchanged together).

        The error memories of its parameters are moved to it from `_loose`, if they are there. Those of all other
        parameters are 0.
        """
        memory = ErrorMemory(of, spare=True)
        for place, view in of.named(memory.vector):
            if (error := self._loose.pop(place.name, None)) is not None:
                view.copy_(error)
        return ErrorFeedback(
            memory,
            self.channel,
            self._guard,
            self._contraction,
            seed=seed,
            back=self.rules.compression.back,
            whole=self._d,
        )

    def _use_compressor(self, part: ErrorFeedback) -> None:
        """Set the compressor of the slice `part` (parameters exchanged together) for this step."""
        compressor = self.rules.at(self._steps)
        part.use(compressor, self.rules.compression.exchange_of(compressor))

    def _exchange(
        self,
        part: ErrorFeedback,
        gradients: Mapping[str, Tensor],
        identity: Sequence[Tensor] = (),
        used: Collection[str] | None = None,
    ) -> Tensor:
        """Replace the gradients of the slice `part` (parameters exchanged together) with their means over workers
        (lines 10-12 of Algorithm 1); collective.

        Args:
            part: the `ErrorFeedback` of the slice.
            gradients: the gradients, by name of the parameter.
            identity: tensors of 0s and 1s, [b] each, which identify the slice. They must be equal on all workers, which
                is checked in the exchange.
            used: the names of the parameters that this worker has used since the last exchange (see `Usage`), or None
                if workers use all parameters.

        Returns `Verdict.code`, float[3], which is 0 if the exchange is applied. It is committed or rolled back with the
        whole pass.
        """
        decay = self.rules.compression.decay
        self._use_compressor(part)
        r = part.round(self._steps)
        with self._lock:
            self._pass.append(r)
        # Line 10 of Algorithm 1: v is the sum of error memory, gradient and noise. `r.exchange` then computes the mean
        # of C(v).
        v = r.correct(BucketUpdate(part.slice, gradients, self._noise, self._scale, decay))
        usage = None if used is None else Usage.of([(name, gradients[name]) for name in part.slice.names], used)
        if usage is not None:
            for view, is_sent in zip(part.slice.views(v), usage.sent, strict=True):
                view.mul_(is_sent)
        r.exchange([bits.to(v) for bits in (*identity, *([] if usage is None else [usage.used]))])
        # Lines 11 and 12 of Algorithm 1, except that the user's optimizer applies the mean gradients to the parameters
        # x.
        by_any = None if usage is None else r.extras.pop() > 0
        r.apply(BucketTarget(part.slice, gradients, self._scale, by_any))
        if usage is not None and by_any is not None:
            part.memory.restore_unused(usage.sent, by_any)
        # With decay=0 there is no error feedback, so discard the residual, which is in v.
        if not decay:
            v.zero_()
        is_unlike: Tensor | bool = False
        # If a bit is equal on all workers, its mean over workers is 0 or 1, up to rounding.
        for mean in r.extras:
            is_unlike = (mean * (1 - mean) > 1e-6).any() | is_unlike
        self._codes.append(r.verdict.code(is_unlike))
        return self._codes[-1]

    def _complete(self) -> None:
        """End the exchanges of a backward pass. Start the copy of their outcomes to the host, which does not wait for
        it."""
        self._outcome = Readback(torch.stack(self._codes))

    def _settle(self, *, interrupted: bool = False) -> None:
        """Commit the last backward pass, or roll it back if one of its exchanges was rejected.

        No-op during a backward pass. If `interrupted` is True, a pass that has not ended is rolled back instead. Raises
        RuntimeError if workers exchanged different modules with each other.
        """
        with self._lock:
            if not self._pass or not (self._outcome or interrupted):
                return
            # The outcomes of the exchanges are identical on all workers. So either every worker commits all slices of
            # the pass, or every worker rolls all of them back.
            codes = self._outcome.tolist() if self._outcome else []
            rejected = [code for code in codes if any(number != 0 for number in code)]  # NaN != 0 is True
            applied = self._outcome is not None and not rejected
            unlike = [r.feedback.slice.names[0] for r, code in zip(self._pass, codes, strict=False) if code[2]]
            for part in self._pass:
                part.close(apply=applied)
            self._contraction.close(self._steps, apply=applied)
            # After a rejected pass the gradients are NaNs. Protected optimizers set them to None before their step.
            if applied:
                self._skips.reset_streak()
                self._rejected = [] if self._fresh else self._rejected
            elif self._outcome and not unlike:
                self._rejected = list(self._protected)
                others = "a gradient of another worker" if any(code[0] for code in rejected) else THE_MEAN
                # Only the first invalid report is used.
                reports = (report for r in self._pass if (report := r.full_report()))
                skip = Skip.of(self._steps, {self.channel.group.rank: next(reports, Report())}, others)
                if not skip.workers and any(math.isnan(code[0]) for code in rejected):
                    skip = replace(skip, error="another worker has received an invalid message")
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
        """Return the settings, such as the seed, that must be equal when a state is saved and when it is loaded, by
        name."""

    def _saved_fields(self) -> list[Vector | Value]:
        """Return the fields of the saved state, in the order in which they are loaded. Each field comes after the
        fields that must be loaded before it."""
        return [
            attribute(("steps",), self, "_steps", int),
            *self._skips.fields(),
            Value(("ledger",), Totals, self.ledger.state_dict, self.ledger.load_state_dict),
        ]

    def _load_errors(self, saved: Mapping[str, Tensor]) -> None:
        """Store loaded error memories in `_loose`. `saved` has them by name of the parameter or module.

        `_feedback` moves each of them to a slice, when the next gradients of the slice are ready.
        """
        self._slices, self._loose = {}, {name: error.to(self.device, copy=True) for name, error in saved.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this hook as tensors and plain types. It has error memories, step count, skips and
        bytes sent.

        The state differs between workers, so each worker must save its own.
        """
        self._settle()
        return self.saved_state.save()

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if `load_state_dict` would reject `state`. The message names the first entry that is missing
        or invalid."""
        self.saved_state.validate(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned on this worker.

        Raises ValueError, with nothing changed, if the state does not match this hook.
        """
        self.saved_state.validate(state)
        self._settle(interrupted=True)
        self._step_rates.clear()
        self.saved_state.load(state)
        self._drift.resume(max(0, self._steps - 1))  # a comparison of parameters is then due when the next step begins
