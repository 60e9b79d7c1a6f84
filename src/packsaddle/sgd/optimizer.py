"""CompressedSGD: Algorithm 1 of "Escaping Saddle Points with Compressed SGD" as a torch optimizer.

Read `CompressedSGD.step` first. What it calls is its parts': `gradient` and `memory` make v, `error_feedback` is the
round in which it is exchanged, `stages` are noise, guard, drift and escape.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from numbers import Real
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.communicator import Communicator, check_agreement
from packsaddle.comm.group import is_averaged_by_ddp, training_group
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.select_aggregator import choose, warn_of_nothing
from packsaddle.compressors import Compressor, RandomK, describe
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.contraction import ContractionMonitor
from packsaddle.feedback.drift import Drift, DriftGuard, StepRates
from packsaddle.feedback.escape import Escape, EscapeCheck, Reset
from packsaddle.feedback.guard import NonFiniteError, NonFiniteGuard, Skip
from packsaddle.feedback.memory import make_memory
from packsaddle.feedback.noise import Noise
from packsaddle.feedback.round import ErrorFeedback, Round
from packsaddle.feedback.slices import FlatParameters
from packsaddle.feedback.state import FORMAT, check_fits, fill, put_means, split_state
from packsaddle.numerics.finite import unnoticed
from packsaddle.numerics.kernels import compiler
from packsaddle.numerics.seeds import as_seed
from packsaddle.options.agreement import agreement
from packsaddle.sgd.gradient import Extras, GradientUpdate, Storm, make_direction
from packsaddle.sgd.lazy_noise import Perturber

T = TypeVar("T")  # a loss, as the user's closure returns it


class CompressedSGD(Optimizer):
    """Compressed, perturbed SGD with error feedback, on one process or on many with the same code.

    Args:
        params: parameters or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: the step size eta.
        compressor: C, or a `Compression`, which also says how messages are averaged, which tensors go dense, where
            the error is kept and what is checked on the way. Not a function of the step.
        noise: r, the standard deviation of each coordinate of xi_t, in units of a gradient; a function of the step that
            returns it (see `Ramp`); or a `Noise`.
        escape: the escape check of lines 4-8; None leaves it out.
        momentum: of each worker's gradients, before compression (see `Momentum`); or a `Storm`.
        nesterov: Nesterov's form of the momentum.
        weight_decay: coefficient of x added to the gradient, before compression.
        seed: seed of all shared randomness; identical on all workers.
        process_group: a torch.distributed process group; None is the default group if there is one, else
            this process alone.

    The parameters are moved into one flat tensor, so make the optimizer after `model.to(...)`. Construction is
    collective: every worker starts from rank 0's parameters. Raises ValueError for an argument that is out of
    range or differs between workers, and TypeError for one of another type. The first `step` raises RuntimeError if a
    DistributedDataParallel exchanges the same gradients.

    `choice` says why messages are averaged as they are, `monitor` has the measured contraction, `skips` the steps that
    were left out (with x, memories and t as they were), `drifts` where workers were found apart.

    A parameter without a gradient counts as one with gradient zero: noise and weight decay still apply.

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

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        compressor: Compressor | Compression = RandomK(0.01),  # noqa: B008 -- immutable
        *,
        noise: float | Callable[[int], float] | Noise = 0.0,
        escape: Escape | None = None,
        momentum: float | Storm = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        spec = Compression.of(compressor)
        spec.check_gradients()
        given = spec.fixed()
        if spec.decay != 1:
            raise ValueError(
                f"decay must be 1 in CompressedSGD, got {spec.decay:g}, which is for hooks and local updates"
            )
        self.seed = as_seed(seed)
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"params must be parameters, got the module {type(params).__name__}: pass .parameters()")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._check_rates()
        self._step = 0
        self._is_busy = False  # with what the user's functions are called for
        self._step_supports_amp_scaling = True  # a GradScaler then leaves it to `step` to leave a step out
        self.resets: list[Reset] = []
        self.scalars = torch.zeros(0)

        # x as one vector, and what workers exchange over.
        self._flat = FlatParameters(self.param_groups, spec.dense_below)
        warn_of_nothing(given, self._flat.compressed_d, spec.dense_below, stacklevel=2)
        shapes = [self._flat.parameters[i].shape for i in self._flat.compressed]
        self.compressor = given.for_tensors(shapes)
        self.ledger = Ledger()
        self.channel = Communicator(training_group(process_group), self.ledger)

        # What is made of gradients, what is kept of it, and how it is averaged.
        spare = spec.max_skipped is not None
        self._direction = make_direction(self._flat, momentum, nesterov, spec.memory, spare=spare)
        rates = partial(self._each, "lr")
        self._memory = make_memory(spec.memory, self._flat, rates, spare=spare, revocable=not self._direction.keeps)
        self.choice = choose(
            self.compressor,
            spec.exchange,
            d=self._flat.compressed_d,
            dense=max(self._flat.d - self._flat.compressed_d, int(spare)),
            workers=self.channel.group.size,
            itemsize=self._memory.vector.element_size(),
            back=None if spec.back is None else spec.back.for_tensors(shapes),
        )
        self._feedback = ErrorFeedback(self._memory, self.channel, self.seed, self.choice.aggregator)

        # Stages of a step.
        self.guard = NonFiniteGuard(spec.max_skipped, self.channel)
        self.monitor = ContractionMonitor(self._flat, spec.monitor_every)
        self._drift = DriftGuard(spec.compare_every, spec.on_drift, self.channel)
        self._rates = StepRates()
        self._noise = Perturber(
            Noise.of(noise),
            seed=self.seed,
            flat=self._flat,
            aggregator=self.choice.aggregator,
            escape=escape is not None,
            plain=spec.memory != "ef21" and not momentum,
        )

        # All workers must have been given the same, and they start from the same x.
        sizes = {"numel": self.numel, "compressed_numel": self.compressed_numel}
        same: dict[str, object] = {"lr": self._each("lr"), "weight_decay": self._each("weight_decay")}
        same |= {"seed": self.seed, **agreement(spec), "noise": noise, "momentum": momentum, "nesterov": nesterov}
        same["kernels"] = compiler(self._flat.x.device)
        check_agreement(self.channel, {**same, **sizes, **self._flat.kinds(), "escape": escape}, self._flat.x.device)
        with torch.no_grad():
            self.channel.broadcast(self._flat.x, "start")
        self._escape = EscapeCheck(escape, self._flat, self.channel, self.seed) if escape else None
        self._publish_state()

    def __repr__(self) -> str:
        of, workers = f"{self.compressed_numel:,} of {self.numel:,} coordinates", self.channel.group.size
        rates = ", ".join(f"{lr:g}" for lr in self._each("lr"))
        return (
            f"CompressedSGD(lr={rates}, {describe(self.compressor)} on {of}, exchange={self.choice.name}, "
            f"workers={workers}, steps={self._step})"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a `param_group` after construction, by RuntimeError: the flat vector and its memory are fixed then."""
        if hasattr(self, "_flat"):
            raise RuntimeError("CompressedSGD takes all its parameters at construction; make a new optimizer")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, to None or with set_to_none=False to zero. Raises RuntimeError with memory="gradient"."""
        if self._memory.in_gradients:
            raise RuntimeError('with memory="gradient" zero_grad() would throw away the error memory; leave it out')
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None, *, scalars: Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T], *, scalars: Tensor | None = None) -> T: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], T] | None = None, *, scalars: Tensor | None = None) -> T | None:
        """Do one iteration of Algorithm 1; collective. Returns the closure's value, if one is given.

        Gradients are read and left as they are; call `zero_grad` as with any optimizer (but see `memory`). `scalars`,
        float[n], a loss, say, are averaged over workers in the same collective, as part of what goes dense, and are
        then in `opt.scalars`. Raises ValueError for a learning rate or weight decay that is negative or not finite,
        RuntimeError if it is called within a step, by the closure, say.
        """
        self._check_rates()
        with self._busy():
            loss = self._direction.evaluate(closure, self._each("weight_decay"))  # grad F_i(x_t)
        t = self._begin()
        u = self._perturbed(t)  # line 9: u = eta (grad F_i(x_t) + xi_t)
        with self._feedback.round(t) as r:  # all workers take the step, or none does
            v = r.correct(u)  # line 10: v = eta (e^(i) + grad F_i(x_t) + xi_t)
            g, weight = self._exchange(r, v, scalars)  # line 10: g^(i) = C(v), and its mean over workers
            fits, lost = self._apply(g, weight, t)  # line 11: x <- x - mean_i g^(i)
            if fits:
                r.absorb(g, lost)  # line 12: eta e^(i) <- v - g^(i)
        self._settle(t, v, taken=r.taken)
        if r.taken:
            self._check_escape()  # lines 4-8 of iteration t + 1, so that the next gradient is taken at the new x
        return loss

    def _check_rates(self) -> None:
        """Raise TypeError or ValueError for a rate or weight decay that is none: a script may set them at any time."""
        for name in ("lr", "weight_decay"):
            for i, value in enumerate(group[name] for group in self.param_groups):
                if not isinstance(value, Real | Tensor) or isinstance(value, bool):
                    raise TypeError(f"{name} must be a number, got {value!r}")
                rate = float(value)
                if not (math.isfinite(rate) and rate >= 0):
                    of = f" of parameter group {i}" if len(self.param_groups) > 1 else ""
                    raise ValueError(f"{name}{of} must be finite and not negative, got {rate:g}")

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Within, a function of the user's is called, which must not step."""
        if self._is_busy:
            raise RuntimeError("step() was called within a step, by its closure or by the escape check's objective")
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    def _begin(self) -> int:
        """See that parameters and gradients can be read; return t."""
        if self._step == 0 and is_averaged_by_ddp(self._flat.parameters, self.channel.group):
            raise RuntimeError(
                "a DistributedDataParallel has these parameters and sends every gradient uncompressed before the step: "
                "run the module without it, or keep it and use packsaddle.register_ddp_hook in place of CompressedSGD"
            )
        self._flat.check_attached()
        if self._step == 0 and self._escape is not None:
            self._escape.begin()
        if not self._memory.in_gradients:
            self._flat.check_gradients()
        self._memory.check()
        self.channel.step = self._step
        return self._step

    def _perturbed(self, t: int) -> GradientUpdate:
        """Return eta (grad F_i(x_t) + weight_decay x + xi_t), with momentum or STORM what they make of it (line 9)."""
        lrs = self._each("lr")
        noise, noisy_from = self._noise.draw(self._memory, lrs, t)
        decays = self._each("weight_decay")
        if self.channel.group.size > 1:
            by_group = zip(lrs, decays, strict=True)
            self._rates.add([noise.std if noise else 0.0, *(rate for group in by_group for rate in group)])
        extras = Extras(decays, noise, noisy_from, scale=self._scale())
        bounded = not (self.guard.overflowed or self.guard.x_is_large)
        return GradientUpdate(self._direction, self._memory.scales(lrs), extras, bounded)

    def _scale(self) -> float:
        """Return a GradScaler's factor of the gradients; note if it found an Inf in them."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found is not None and self._memory.in_gradients:
            raise RuntimeError('memory="gradient" goes with no GradScaler, which would scale the error memory too')
        self.guard.overflowed = found is not None and bool(found)
        return 1.0 if scale is None else float(scale)

    def _exchange(self, r: Round, v: Tensor, scalars: Tensor | None) -> tuple[Averaged, float]:
        """Send C(v), v float[d], with what goes dense; average it, and the scalars.

        Returns the outcome, and about its largest magnitude: not finite if it, or a worker's vector, is not.
        """
        # A worker whose v is of no use sends zeros, and NaNs in the dense part.
        self.guard.inspect(v, self._direction.norm, blank=not self._memory.in_gradients)
        self.monitor.before(r.step, v)
        dense = v[self._flat.compressed_d :]
        mark, rates = self.guard.mark(dense), self._rates_of_x(dense)
        given = dense[:0] if scalars is None else scalars.detach().reshape(-1).to(dense)
        g, (mark, self.scalars, mean_rates) = r.exchange(v, [mark, given, rates])
        if len(rates) and not torch.allclose(mean_rates, rates, rtol=1e-5, atol=0):
            raise RuntimeError(
                f"workers must have one lr and one noise at every step, but what they make of x's change is "
                f"{rates.tolist()} here (lr, std of the noise) and {mean_rates.tolist()} in the mean"
            )
        return g, self.guard.weigh(g, mark)

    def _rates_of_x(self, like: Tensor) -> Tensor:
        """Return the factors of x's change, which must be equal on all workers: float[2], or [0] if not compared.

        Compared in the collective there is; on a GPU not at all, since a step would have to wait to read it.
        """
        if self.channel.group.size == 1:
            return like[:0]
        can_wait = like.device.type == "cpu"
        return like.new_tensor(self._memory.rates_of_x(self._noise.grown, lazy=self._noise.lazy, can_wait=can_wait))

    def _apply(self, g: Averaged, weight: float, t: int) -> tuple[bool, Tensor | None]:
        """Subtract the outcome from x, unless x cannot take it; return whether it was, and what `_move` does.

        Where x cannot overflow, whatever it is, there is nothing to be looked at and nothing to be undone.
        """
        if not math.isfinite(weight):
            return False, None
        if self._memory.reach(weight) + self._noise.reach <= unnoticed(self._flat.x.dtype):
            return True, self._move(g, t)
        # x may overflow: try it, look, and go back if it did.
        self.guard.x_is_large = True
        moved = {"x": self._flat.x, **self._memory.vectors()}
        before, noise = {name: vector.clone() for name, vector in moved.items()}, self._noise.snapshot()
        lost = self._move(g, t)
        if all(bool((moved[name].isfinite() | ~old.isfinite()).all()) for name, old in before.items()):
            return True, lost
        for name, old in before.items():
            moved[name].copy_(old)
        self._noise.restore(noise)
        return False, None

    def _move(self, g: Averaged, t: int) -> Tensor | None:
        """x <- x - mean_i g^(i); eta is in the messages or the memory's unit.

        What 16-bit parameters lose by rounding, the same on every worker, is returned, float[d], to be kept in the
        error memory, so that y does not lose it.
        """
        self._noise.join(g, self._memory.unit, t)
        return self._flat.change(lambda x: self._memory.apply(x, g))

    def _settle(self, t: int, rest: Tensor, *, taken: bool) -> None:
        """End a step with an exchange, which has left `rest`, float[d], of v if it was taken."""
        self._direction.settle(taken=taken)
        if not taken:
            self.guard.leave_out(self._direction, t)
            if self._memory.in_gradients:
                raise NonFiniteError(f'{self.skips[-1]}; with memory="gradient" the error memory is lost with it')
        self._count(t, taken=taken)
        if not taken:
            return
        self.monitor.after(t, rest)
        self.guard.skips.took()
        # What all workers should have alike is compared at intervals.
        if self._drift.due(t):
            shared = {"": self._flat.x, **self._shared()}
            self._drift.compare(t, list(shared.values()), lambda: self._flat.named(shared), self._rates)

    def _count(self, t: int, *, taken: bool) -> None:
        """Count a step, and show what it has put in the place of other vectors."""
        self._step = t + taken
        for name, views in {"pending": self._memory.views, **self._direction.views()}.items():
            for p, view in zip(self._flat.parameters, views, strict=True):
                self.state[p][name] = view

    def _check_escape(self) -> None:
        """Lines 4-8."""
        if self._escape is None:
            return
        with self._busy():
            reset, lost = self._escape.run(self._step, self._outstanding())
        if reset is not None:
            self._feedback.reset(lost)
            if not reset.committed:
                self._direction.reset()
            self.resets.append(reset)

    @property
    def steps(self) -> int:
        """The number of steps taken, t."""
        return self._step

    @property
    def skips(self) -> list[Skip]:
        """The steps that were left out since the optimizer was made or loaded (see `Compression.max_skipped`)."""
        return self.guard.skips.list

    @property
    def skipped(self) -> int:
        """The number of skipped steps in total."""
        return self.guard.skips.count

    @property
    def spare_bytes(self) -> int:
        """Memory that only a step which is left out needs: what `max_skipped=None` saves."""
        return self._memory.spare_bytes + self._direction.spare_bytes

    @property
    def drifts(self) -> list[Drift]:
        """The comparisons at which workers differed (see `Compression.compare_every`)."""
        return self._drift.found

    @property
    def mu(self) -> float:
        """The effective contraction of the whole vector: 1 - E||v - C(v)||^2 / ||v||^2 for v of even energy.

        Dense coordinates are sent exactly, so this exceeds `compressor.mu` of the compressed part, which is
        what holds for every v (all of v's energy may lie there).
        """
        d, compressed = self._flat.d, self._flat.compressed_d
        kept = self.choice.aggregator.mu(compressed, self.channel.group.size) * compressed
        return (kept + (d - compressed)) / d if d else 1.0

    @property
    def compressed_numel(self) -> int:
        """The number of compressed coordinates; the other `numel - compressed_numel` are sent uncompressed."""
        return self._flat.compressed_d

    @property
    def numel(self) -> int:
        """The number of coordinates, d."""
        return self._flat.d

    def waits(self) -> list[float] | None:
        """Return the mean number of steps that a coordinate waits to be sent, by parameter in the user's order.

        None where that depends on the values (see `Compressor.rates`).
        """
        rates = self.choice.aggregator.compressor.rates(self._flat.compressed_d)
        if rates is None:
            return None
        waits, start = torch.ones(self._flat.d, dtype=torch.float64), 0
        for n, rate in rates:
            waits[start : start + n] = 1 / rate
            start += n
        return [float(view.reshape(-1)[0]) if view.numel() else 1.0 for view in self._flat.views(waits)]

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return e_t = mean_i e^(i), float[d], in the order of torch's `parameters_to_vector`; collective.

        Raises RuntimeError where a learning rate is 0 (then e_t is undefined; `corrected` is not).
        """
        if 0.0 in self._each("lr"):
            raise RuntimeError("error() divides by the learning rate, which is 0; use corrected()")
        e = self._mean_pending()
        for run in self._flat.runs:
            e[run.start : run.stop].div_(self._each("lr")[run.group])
        return self._flat.in_order(e)

    @torch.no_grad()
    def corrected(self) -> Tensor:
        """Return y_t = x_t - eta e_t, float[d], in the order of torch's `parameters_to_vector`; collective.

        With lazy noise it is right in its marginal law only: what is outstanding is drawn for each t by itself, so that
        y_t and y_{t+1}, or y_t and a later x, are not jointly those of a run with eager noise. So with `error`.
        """
        return self._flat.in_order(self._flat.x - self._mean_pending())

    def _outstanding(self) -> Tensor:
        """This worker's part of eta e: its own memory, what the aggregator holds back, outstanding noise."""
        return self._noise.add_outstanding(self._feedback.pending(), self._step)

    def _mean_pending(self) -> Tensor:
        return self.channel.mean(self._outstanding().clone(), "inspection")

    def _each(self, name: str) -> list[float]:
        return [float(group[name]) for group in self.param_groups]

    def _flat_state(self) -> dict[str, Tensor]:
        """The flat vectors of a checkpoint: this worker's memory, and x_t' if there is an escape check."""
        anchor = {"anchor": self._escape.anchor} if self._escape else {}
        kept = self._memory.vectors() | self._direction.vectors()
        return {"pending": self._memory.vector, **anchor, **kept, **self._feedback.held()}

    def _shared(self) -> dict[str, Tensor]:
        """Those of them that are the same on every worker."""
        return {name: v for name, v in self._flat_state().items() if name in ("anchor", "mean_estimate")}

    def _publish_state(self) -> None:
        """Show the flat vectors as per-parameter state, so that torch's checkpoint tools find them."""
        for name, flat in self._flat_state().items():
            for p, view in zip(self._flat.parameters, self._flat.views(flat), strict=True):
                self.state[p][name] = view

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state, of tensors and plain types only; each worker has its own.

        It has "pending" (eta e^(i), or e^(i) with memory="gradient") and "anchor" (x_t') of each parameter, shaped as
        it; format, t, t', seed, rank and number of workers in each group; what the exchange holds back; outstanding
        noise; the ledger's totals; resets.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update(self._identity(), format=FORMAT, step=self._step, unit=self._memory.unit)
            group["started"] = self._direction.started
            group["anchor_step"] = self._escape.anchor_step if self._escape else 0
        state["exchange"] = self.choice.aggregator.state_dict()
        state["noise"] = self._noise.state_dict()
        state["guard"] = self.guard.skips.state_dict()
        state["ledger"] = self.ledger.state_dict()
        state["monitor"] = self.monitor.state_dict()
        state["resets"] = [asdict(reset) for reset in self.resets]
        state["drifts"] = [asdict(drift) for drift in self._drift.found]
        return state

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError, naming the first difference, if `load_state_dict` would not take `state_dict`."""
        if not isinstance(state_dict.get("param_groups"), list):
            raise ValueError("the state has no param_groups; was it saved by CompressedSGD?")
        check_fits(state_dict, self._flat, self._flat_state(), self._identity())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore this worker's `state_dict`; raises ValueError, changing nothing, if it does not fit."""
        self.check_state_dict(state_dict)
        first = state_dict["param_groups"][0]
        step, anchor_step, unit = first["step"], first["anchor_step"], first["unit"]
        self._direction.started = first.get("started", True)
        # torch would cast state to the parameters' dtype, so only the groups go through it.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        fill(state_dict, self._flat, self._flat_state())
        self._memory.reload(unit)
        self._publish_state()
        self._step = step
        if self._escape:
            self._escape.anchor_step = anchor_step
        for group in self.param_groups:
            for name in ("format", "step", "anchor_step", "unit", "started", *self._identity()):
                group.pop(name, None)
        self.choice.aggregator.load_state_dict(state_dict.get("exchange", {}), self._flat.x.device)
        self._noise.load_state_dict(state_dict.get("noise", {}), self._memory, step)
        self.guard.skips.load_state_dict(state_dict.get("guard", {}))
        self.ledger.load_state_dict(state_dict.get("ledger", []))
        self.monitor.load_state_dict(state_dict.get("monitor", {}))
        self.resets = [Reset(**reset) for reset in state_dict.get("resets", [])]
        self._rates.clear()
        self._drift.found = [Drift(**drift) for drift in state_dict.get("drifts", [])]
        self._drift.resume(step)

    def _identity(self) -> dict[str, int | str]:
        """Return what must be equal at loading and at saving: an error memory is one worker's, and
        an owner's error belongs to its chunk (the other exchanges hold nothing back)."""
        owners = self.choice.name if "residual" in self._flat_state() else "none"
        return {
            "seed": self.seed,
            "rank": self.channel.group.rank,
            "workers": self.channel.group.size,
            "owners": owners,
            "memory": self._memory.kind,
            "direction": self._direction.kind,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copying and pickling: parameters, flat vector and group belong together. Use `state_dict`."""
        raise TypeError("CompressedSGD cannot be copied or pickled; use state_dict() and load_state_dict()")

    def split_state(
        self, state: Mapping[str, Any], workers: int
    ) -> tuple[dict[tuple[Any, ...], Tensor], dict[str, Any]]:
        """Return what of a `state` of `workers` others get the mean of, by place, and what they all get."""
        return split_state(state, workers)

    def put_means(self, state: dict[str, Any], means: Mapping[tuple[Any, ...], Tensor]) -> None:
        """Put means in a state, in place, and make it this worker's."""
        put_means(state, means, self._flat, self._flat_state(), self._identity())
