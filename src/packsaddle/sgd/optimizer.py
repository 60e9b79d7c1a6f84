"""CompressedSGD: Algorithm 1 of "Escaping Saddle Points with Compressed SGD" as a torch optimizer.

Start with `CompressedSGD.step`, which does these things:

- It computes the update u (module `gradient`).
- It adds u to the error memory e, compresses the sum v = e + u, and averages the messages over workers (module
  `feedback.round`).
- It applies the mean to the parameters x on all workers, or on none (module `target`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, check_agreement
from packsaddle.comm.group import training_group
from packsaddle.comm.ledger import Ledger, Totals
from packsaddle.comm.modules import is_averaged_by_ddp
from packsaddle.comm.select_aggregator import warn_if_nothing_compressed
from packsaddle.compressors import Compressor, RandomK, describe
from packsaddle.errors import check_momentum, suggests
from packsaddle.feedback.checks import Contraction, DriftGuard, StepRates
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.escape import Escape, EscapeCheck, Reset
from packsaddle.feedback.exchanging import Exchanging
from packsaddle.feedback.guard import THE_MEAN, THE_SUM, Guard, Records, Skip, Skips
from packsaddle.feedback.memory import ErrorMemory, InPlaceMemory
from packsaddle.feedback.noise import Noise
from packsaddle.feedback.report import Report
from packsaddle.feedback.round import ErrorFeedback, Round, SavedAggregator
from packsaddle.feedback.slices import FlatParameters
from packsaddle.feedback.state import ANY, State, Value, Vector, attribute, skip
from packsaddle.numerics.devices import check_not_capturing
from packsaddle.numerics.finite import first_out_of_range
from packsaddle.numerics.kernels import arithmetic
from packsaddle.numerics.seeds import as_seed
from packsaddle.options.agreement import agreement
from packsaddle.sgd.gradient import Extras, Gradient, GradientUpdate, Momentum
from packsaddle.sgd.lazy_noise import OutstandingNoise, Perturber
from packsaddle.sgd.saved import NUMBERS, RULES, by_index
from packsaddle.sgd.target import FlatTarget

T = TypeVar("T")  # type of the loss, which the user's closure returns
# Smallest number of coordinates for which the error memory may be updated in place. A smaller error memory has a second
# vector instead: both fit a cache, and a rollback is exact.
_LARGE = 1 << 20


class CompressedSGD(Records, Exchanging, Optimizer):
    """Compressed, perturbed SGD with error feedback, on one process or on many with the same code.

    It replaces the optimizer of a training script. To train with AdamW or Muon instead, see `LocalUpdates` and
    `register_ddp_hook`.

    Args:
        params: parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: the step size eta.
        compressor: C, or a `Compression`, which also sets how messages are averaged, which tensors are sent
            uncompressed, and which checks are made. A function of the step is not supported.

        noise: r, the standard deviation of each coordinate of the noise xi_t, in units of a gradient; a function of the
            step that returns r (see `Ramp`); or a `Noise`. escape: the escape check of Algorithm 1, lines 4-8, or None
            for no check. momentum: coefficient in [0, 1), applied by each worker before compression (see `Momentum`).
            nesterov: True for Nesterov's form of the momentum. weight_decay: the multiple of the parameters x that is
            added to the gradient, before compression. seed: seed of all shared randomness; identical on all workers.
            process_group: a torch.distributed process group; by default torch's default group if there is one, else
            this process alone.

    The parameters are moved into one flat tensor, so make the optimizer after `model.to(...)`. Construction is
    collective, and all workers start from rank 0's parameters.

    Raises ValueError for an argument that is out of range or differs between workers, and TypeError for an argument of
    a wrong type. Raises RuntimeError if a launcher has set WORLD_SIZE above 1 and there is no process group. The first
    `step` raises RuntimeError if a DistributedDataParallel exchanges the same gradients.

    These attributes have results:

    - `choice`: how messages are averaged, and why
    - `monitor`: the measured contraction
    - `skips`: the records of the skipped steps, which change neither parameters nor memories

    A parameter whose `grad` is None has the gradient zero, so noise and weight decay still change it. A frozen
    parameter does not change, and its error memory and momentum are set to zero.

    >>> import torch
    >>> from packsaddle import CompressedSGD, TopK
    >>> model = torch.nn.Linear(64, 64)
    >>> opt = CompressedSGD(model.parameters(), lr=0.1, compressor=TopK(0.01), noise=0.001)
    >>> for batch in torch.rand(3, 8, 64):
    ...     opt.zero_grad()
    ...     (model(batch) - batch).square().mean().backward()
    ...     opt.step()
    >>> opt.steps, opt.compressed_numel
    (3, 4096)
    >>> opt.error().shape
    torch.Size([4160])
    """

    @suggests(compression="compressor", error_feedback="compressor", workers="process_group", group="process_group")
    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        compressor: Compressor | Compression = RandomK(0.01),  # noqa: B008 -- immutable
        *,
        noise: float | Callable[[int], float] | Noise = 0.0,
        escape: Escape | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        spec = Compression.of(compressor)
        given = spec.for_sgd()
        self.seed = as_seed(seed)
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"params must be parameters, got the module {type(params).__name__}: pass .parameters()")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._check_rates()
        self._step = 0
        # With this attribute, a GradScaler calls `step` even if a gradient is Inf or NaN, and `step` itself skips the
        # update.
        self._step_supports_amp_scaling = True
        self.resets: list[Reset] = []
        self.scalars = torch.zeros(0)

        # Move the parameters into one vector x, and make the communicator.
        self._flat = FlatParameters(self.param_groups, spec.dense_below)
        warn_if_nothing_compressed(given, self._flat.compressed_d, spec.dense_below, stacklevel=3)
        self.ledger = Ledger()
        self.channel = Communicator(training_group(process_group), self.ledger)

        # Make the objects of a step: the update, the error memory, the exchange, and the target that applies the mean.
        spare = spec.max_skipped is not None
        check_momentum(momentum, nesterov)
        self._direction = (
            Momentum(self._flat, momentum, nesterov=nesterov, spare=spare) if momentum else Gradient(self._flat)
        )
        # The update of a step without momentum can be computed again, so a large error memory on a CPU subtracts it to
        # roll back.
        is_large = self._flat.d >= _LARGE and self._flat.x.device.type == "cpu"
        in_place = is_large and spare and not momentum
        self._memory = InPlaceMemory(self._flat) if in_place else ErrorMemory(self._flat, spare=spare)
        self.monitor = Contraction(spec.monitor_every, self._flat)
        self._feedback = ErrorFeedback(
            self._memory,
            self.channel,
            Guard("dense" if spare else "none"),
            self.monitor,
            seed=self.seed,
            back=spec.back,
        )
        self._feedback.use(given, spec.exchange or "direct")
        self.choice = self._feedback.choice
        self.compressor = self.choice.aggregator.compressor
        self._noise = Perturber(
            Noise.of(noise),
            self._memory,
            self.choice.aggregator,
            seed=self.seed,
            escape=escape is not None,
            momentum=momentum != 0,
        )
        self._target = FlatTarget(self._flat, self._memory, self._noise)

        # Make the checks that run after a step.
        self._skips = Skips(spec.max_skipped, self.channel.group.rank)
        self._drift = DriftGuard(spec.compare_every, self.channel)
        self._rates = StepRates()

        # Check that arguments are equal on all workers, and broadcast rank 0's parameters x.
        sizes = {"numel": self.numel, "compressed_numel": self.compressed_numel}
        same: dict[str, object] = {"lr": self._each("lr"), "weight_decay": self._each("weight_decay")}
        same |= {"seed": self.seed, **agreement(spec), "noise": noise, "momentum": momentum, "nesterov": nesterov}
        same["arithmetic"] = arithmetic(self._flat.x.device)
        check_agreement(self.channel, {**same, **sizes, **self._flat.kinds(), "escape": escape}, self._flat.x.device)
        with torch.no_grad():
            self.channel.broadcast(self._flat.x, "start")
        self._escape = EscapeCheck(escape, self._flat, self._flat.x, self.channel, self.seed) if escape else None
        self.saved_state = State(
            "CompressedSGD",
            RULES,
            self._identity,
            self._saved_fields,
            head=("param_groups", ANY),
            names=dict(enumerate(self._flat.names)),
        )
        self._publish_state()

    def __repr__(self) -> str:
        of, workers = f"{self.compressed_numel:,} of {self.numel:,} coordinates", self.channel.group.size
        rates = ", ".join(f"{lr:g}" for lr in self._each("lr"))
        return (
            f"CompressedSGD(lr={rates}, {describe(self.compressor)} on {of}, exchange={self.choice.name}, "
            f"workers={workers}, steps={self._step})"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add `param_group`, which is possible only during construction.

        Raises RuntimeError afterwards, since the flat vector of all parameters and the error memory then have their
        final sizes.
        """
        if hasattr(self, "_flat"):
            raise RuntimeError("CompressedSGD takes all its parameters at construction; make a new optimizer")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None, *, scalars: Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T], *, scalars: Tensor | None = None) -> T: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], T] | None = None, *, scalars: Tensor | None = None) -> T | None:
        """Do one iteration of Algorithm 1; collective. Returns the value of `closure`, or None if it is None.

        The step does not change gradients, so call `zero_grad` as usual. `scalars`, float[n], are numbers such as a
        loss. They are averaged over workers in the collective that sends the messages, and their means are then in
        `opt.scalars`.

        Raises ValueError if a learning rate or weight decay is negative or not finite.
        """
        self._check_rates()
        with torch.enable_grad():
            loss = None if closure is None else closure()  # computes this worker's grad F_i(x_t)
        t = self._begin()
        update = self._update(t)  # line 9 of Algorithm 1: u = eta (grad F_i(x_t) + xi_t)
        with self._feedback.round(t) as round:  # the exchange is applied by all workers, or by none
            v = round.correct(update)  # line 10 of Algorithm 1: v = eta (e^(i) + grad F_i(x_t) + xi_t)
            given = v[:0] if scalars is None else scalars.detach().reshape(-1).to(v)
            round.exchange([given])  # line 10 of Algorithm 1: g^(i) = C(v), and its mean over workers
            (self.scalars,) = round.extras
            # Line 11 of Algorithm 1: x <- x - mean_i g^(i); line 12: eta e^(i) <- v - g^(i).
            round.apply(self._target)
        self._finish_step(round)
        if round.absorbed:
            # Lines 4-8 of Algorithm 1 for iteration t + 1 are executed here, so that the next gradient is computed at
            # the new x.
            self._check_escape()
        return loss

    def _check_rates(self) -> None:
        """Raise TypeError or ValueError if a learning rate or a weight decay is invalid. They are validated in every
        step, since a script may change them between steps."""
        for name in ("lr", "weight_decay"):
            for i, value in enumerate(group[name] for group in self.param_groups):
                if not isinstance(value, Real | Tensor) or isinstance(value, bool):
                    raise TypeError(f"{name} must be a number, got {value!r}")
                rate = float(value)
                if not (math.isfinite(rate) and rate >= 0):
                    of = f" of parameter group {i}" if len(self.param_groups) > 1 else ""
                    raise ValueError(f"{name}{of} must be finite and not negative, got {rate:g}")

    def _begin(self) -> int:
        """Validate the parameters and the gradients, and return the index t of the step."""
        if self._step == 0 and is_averaged_by_ddp(self._flat.parameters, self.channel.group):
            raise RuntimeError(
                "a DistributedDataParallel has these parameters and sends every gradient uncompressed before the step: "
                "run the module without it, or keep it and use packsaddle.register_ddp_hook in place of CompressedSGD"
            )
        check_not_capturing("step()", self._flat.x.device)
        self._flat.check_attached()
        if self._step == 0 and self._escape is not None:
            self._escape.begin()
        self._flat.check_gradients()
        self.channel.step = self._step
        return self._step

    def _update(self, t: int) -> GradientUpdate:
        """Return the update of step t, eta u, where u is the direction of the step: gradient + weight_decay x + xi_t,
        or momentum of it (line 9 of Algorithm 1).

        eta is the learning rate, x are the parameters and xi_t is the noise.
        """
        lrs, decays = self._each("lr"), self._each("weight_decay")
        noise, noisy_from = self._noise.draw(lrs, t)
        if self.channel.group.size > 1:
            by_group = zip(lrs, decays, strict=True)
            self._rates.add([noise.std if noise else 0.0, *(rate for group in by_group for rate in group)])
        # Read two attributes that a GradScaler sets: the factor by which the gradients were multiplied, and a flag that
        # is nonzero if a gradient is Inf or NaN.
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        extras = Extras(decays, noise, noisy_from, scale=1.0 if scale is None else float(scale))
        overflowed = found is not None and bool(found)
        decay = max(weight_decay * max(lr, 1.0) for weight_decay, lr in zip(decays, lrs, strict=True))
        return GradientUpdate(self._direction, lrs, extras, overflowed, self._target.decay_may_overflow(decay))

    def _finish_step(self, round: Round) -> None:
        """End a step, as applied or as skipped; collective.

        The momentum is committed, or rolled back, and the step is counted. After an applied step, the workers'
        parameters are compared if a comparison is due. Raises NonFiniteError after too many consecutive skipped steps.
        """
        t = round.step
        self._direction.close(apply=round.absorbed)
        if not round.absorbed:
            # Gather the reports of all workers, with the first invalid parameter or message of each, and their numbers
            # of consecutive skipped steps.
            report = round.full_report()
            if round.invalid:
                gradients = zip(self._flat.names, (p.grad for p in self._flat.parameters), strict=True)
                report = Report("vector", first_out_of_range(gradients) or THE_SUM)
            text = torch.tensor(list(str(report).encode()), dtype=torch.uint8)
            row, device = torch.tensor([self._skips.in_a_row + 1]), round.invalid.device
            parts = {"report": text.to(device), "row": row.to(device)}
            gathered = self.channel.gather(parts, purpose="guard")
            reports = {worker: Report.read(bytes(p["report"].tolist()).decode()) for worker, p in enumerate(gathered)}
            self._skips.record(Skip.of(t, reports, THE_MEAN))
            self._skips.check(max(int(p["row"]) for p in gathered))
            return
        # Count the step. Refresh the views in `self.state`, since a step may swap the buffers of the error memory and
        # of the momentum.
        self._step = t + 1
        momentum = {name: kept.views for name, kept in self._direction.vectors().items()}
        for name, views in {"error": self._memory.views, **momentum}.items():
            for p, view in zip(self._flat.parameters, views, strict=True):
                self.state[p][name] = view
        self._skips.reset_streak()
        if self._drift.due(t):
            shared = {"": self._flat.x, **({"start of ": self._escape.start} if self._escape else {})}

            def named() -> list[tuple[str, Tensor]]:
                return [(kind + p.name, view) for kind, v in shared.items() for p, view in self._flat.named(v)]

            self._drift.compare(t, list(shared.values()), named, self._rates)

    def _check_escape(self) -> None:
        """Run the escape check (lines 4-8 of Algorithm 1). No-op without an escape check.

        A check that ends a segment of steps rolls the parameters back if the segment did not decrease the loss. If a
        segment ends, the error memory is cleared. If the parameters are rolled back, the momentum is cleared too.
        """
        if self._escape is None:
            return
        reset, rounding = self._escape.run(self._step, self._outstanding())
        if reset is not None:
            self._feedback.reset(rounding)
            if not reset.committed:
                self._direction.reset()
            self.resets.append(reset)

    @property
    def steps(self) -> int:
        """The number of applied (not skipped) steps. It is the index t of the next step."""
        return self._step

    @property
    def spare_bytes(self) -> int:
        """The number of bytes of the vectors that exist only to roll back a step. It is 0 with `max_skipped=None`."""
        kept = self._direction.vectors().values() if self._skips.most is not None else ()
        return self._memory.spare_bytes + sum(vector.flat.nbytes for vector in kept)

    @property
    def mu(self) -> float:
        """The contraction 1 - E||v - C(v)||^2 / ||v||^2 of a step that sends the vector v, float[d], as C(v), under the
        assumption that all coordinates of v have equal mean squares.

        It exceeds `compressor.mu` if some coordinates are sent uncompressed, since these have no residual.
        `compressor.mu` needs no assumption: it is a lower bound on the contraction for every vector that is compressed.
        """
        d, compressed = self._flat.d, self._flat.compressed_d
        kept = self.choice.aggregator.mu(compressed, self.channel.group.size) * compressed
        return (kept + (d - compressed)) / d if d else 1.0

    @property
    def compressed_numel(self) -> int:
        """The number of coordinates, i.e. elements of parameters, that are sent compressed. The remaining `numel -
        compressed_numel` coordinates are sent uncompressed."""
        return self._flat.compressed_d

    @property
    def numel(self) -> int:
        """The number of coordinates d, i.e. of elements of all parameters."""
        return self._flat.d

    def waits(self) -> list[float] | None:
        """Return, for each parameter, the mean number of steps between two consecutive sends of the same coordinate.
        The list is in the order of the parameters in the optimizer.

        Returns None if this number depends on the values of the vector to send (see `Compressor.rate`).
        """
        rate = self.compressor.rate(self._flat.compressed_d)
        return None if rate is None else [1.0 if place.dense else 1 / rate for place in self._flat.places]

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return the workers' mean error memory e_t, float[d], in the order of torch's `parameters_to_vector`;
        collective.

        Raises RuntimeError if a learning rate is 0. The unsent update eta e_t is stored, so e_t is then undefined. The
        result of `corrected` is always defined.
        """
        if 0.0 in self._each("lr"):
            raise RuntimeError("error() divides by the learning rate, which is 0; use corrected()")
        e = self._mean_pending()
        for part in self._flat.ranges:
            e[part.start : part.stop].div_(self._each("lr")[part.group])
        return self._flat.in_order(e)

    @torch.no_grad()
    def corrected(self) -> Tensor:
        """Return y_t = x_t - eta e_t, float[d], the parameters x_t minus the workers' mean unsent update eta e_t;
        collective. The order is that of torch's `parameters_to_vector`.

        With lazy noise, each call of `corrected` or `error` newly draws the noise that was not applied yet. So their
        results have the exact distribution at each step t, but the joint distribution of the results at several steps
        is not exact.
        """
        return self._flat.in_order(self._flat.x - self._mean_pending())

    def _outstanding(self) -> Tensor:
        """Return this worker's unsent update, float[d]: the error memory, and with lazy noise a draw of the noise that
        was not applied yet."""
        return self._noise.pending(self._memory.vector, self._step)

    def _mean_pending(self) -> Tensor:
        return self.channel.mean(self._outstanding().clone(), "inspection")

    def _each(self, name: str) -> list[float]:
        return [float(group[name]) for group in self.param_groups]

    def _flat_state(self) -> dict[str, Tensor]:
        """Return the flat vectors of a saved state, float[d] each, by name.

        They are the error memory, the start point of the escape check (to which it may roll the parameters back), and
        the momentum.
        """
        start = {"start": self._escape.start} if self._escape else {}
        momentum = {name: kept.flat for name, kept in self._direction.vectors().items()}
        return {"error": self._memory.vector, **start, **momentum}

    def _publish_state(self) -> None:
        for name, flat in self._flat_state().items():
            for p, view in zip(self._flat.parameters, self._flat.views(flat), strict=True):
                self.state[p][name] = view

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this worker as tensors and plain types. The state differs between workers, so each worker
        must save its own.

        The entry of a parameter has views of the flat vectors: "error", the error memory eta e. With an escape check it
        has "start", the point to which the check may roll back. With momentum it has "momentum".

        The entry of a parameter group has the format, the step t, the start step t' of the escape check, the seed, the
        rank and the number of workers. Further entries of the state are those of the aggregator, the outstanding noise,
        the skips, the ledger and the resets.
        """
        return self.saved_state.save(super().state_dict())

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        self.saved_state.validate(by_index(state, self._group_sizes))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned on this worker.

        Raises ValueError, with nothing changed, if the state does not match this optimizer.
        """
        state = by_index(state_dict, self._group_sizes)
        self.saved_state.validate(state)
        # Torch would convert the state to the dtype of the parameters, so pass only the groups to torch.
        ours = ("format", *NUMBERS, *self._identity())
        groups = [{name: group[name] for name in group if name not in ours} for group in state["param_groups"]]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.saved_state.load(state)
        self._target.forget_x()
        self._publish_state()
        self._rates.clear()
        self._drift.resume(self._step)

    @property
    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.param_groups]

    def _saved_fields(self) -> list[Vector | Value]:
        """Return the fields of the saved state, in the order in which they are loaded. Each field comes after the
        fields that must be loaded before it."""
        shapes = {i: p.shape for i, p in enumerate(self._flat.parameters)}
        group = ("param_groups", ANY)
        escape = self._escape

        def views(name: str) -> dict[int, Tensor]:
            return dict(enumerate(self._flat.views(self._flat_state()[name])))

        def load_noise(saved: OutstandingNoise | None) -> None:
            self._noise.load(saved, self._step)

        return [
            *(Vector(("state", ANY, name), shapes, partial(views, name)) for name in self._flat_state()),
            attribute((*group, "step"), self, "_step", int),
            attribute((*group, "start_step"), escape, "start_step", int)
            if escape
            else Value((*group, "start_step"), int, lambda: 0, skip),
            Value(("aggregator",), SavedAggregator, self._feedback.aggregator_state, self._feedback.load_aggregator),
            Value(("noise",), OutstandingNoise | None, lambda: self._noise.outstanding, load_noise),
            *self._skips.fields(),
            *self.monitor.fields(),
            Value(("ledger",), Totals, self.ledger.state_dict, self.ledger.load_state_dict),
            attribute(("resets",), self, "resets", list[Reset]),
        ]

    def _identity(self) -> dict[str, int | str]:
        """Return the values, by name, that must be equal in a saved state and in the optimizer that loads it."""
        return {
            "seed": self.seed,
            "rank": self.channel.group.rank,
            "workers": self.channel.group.size,
            "direction": self._direction.kind,
        }

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("CompressedSGD cannot be copied or pickled; use state_dict() and load_state_dict()")
