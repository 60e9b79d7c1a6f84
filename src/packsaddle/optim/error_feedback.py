"""Error feedback on one slice of the parameters: lines 10 and 12 of Algorithm 1, once for the optimizer and the hooks.

An `ErrorFeedback` owns a slice's memory and the protocol that averages what is sent of it. A `Round` of it is one
exchange, and a transaction: `correct`, `exchange`, `absorb` try it, `settle` takes it or forgets it as a whole. Line 11
stands between exchange and absorb, and belongs to who has the round, as some move x and others fill gradients.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from packsaddle.comm.aggregators import Averaged, Protocol
from packsaddle.comm.communicator import Channel
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor, Identity
from packsaddle.numerics.finite import first_bad, is_finite, is_usable, spoil
from packsaddle.numerics.seeds import mix
from packsaddle.optim.allocation import Allocation
from packsaddle.optim.layout import Place, dense_strides
from packsaddle.optim.memory import ErrorMemory, Update
from packsaddle.optim.stages.noise import Noise


class ErrorFeedback:
    """This worker's e^(i) on a slice, float[n], the first `compressed_d` of it compressed, and how C(v) is averaged.

    `seed` is that of the slice's shared randomness.
    """

    def __init__(self, memory: ErrorMemory, channel: Channel, seed: int, aggregator: Protocol | None = None) -> None:
        self.memory, self.channel, self.seed = memory, channel, seed
        self._aggregator = aggregator

    @property
    def aggregator(self) -> Protocol:
        """The protocol that averages what is sent."""
        assert self._aggregator is not None, "no compressor has been chosen yet"
        return self._aggregator

    @property
    def is_ready(self) -> bool:
        """Whether there is a protocol."""
        return self._aggregator is not None

    def use(self, aggregator: Protocol | None) -> None:
        """Go on with another protocol; what the last one held back goes to the memory, so that nothing is lost."""
        pending = self.pending()
        if pending is not self.memory.vector:
            self.memory.vector.copy_(pending)
        self._aggregator = aggregator

    def round(self, step: int) -> "Round":
        """Begin an exchange."""
        return Round(self, step)

    def held(self) -> dict[str, Tensor]:
        """Return what the protocol holds back, float[n] each, by name; not copies."""
        return self._aggregator.vectors(self.memory.vector) if self._aggregator is not None else {}

    def pending(self) -> Tensor:
        """Return this worker's share of all that has not been applied yet, float[n]; not a copy if it need not be."""
        pending = self.memory.pending()
        if self._aggregator is None:
            return pending
        return self._aggregator.add_residual(pending, self.channel.group.size)

    def reset(self, lost: Tensor | None = None) -> None:
        """Clear e (line 7), or set it to `lost`, float[n], and forget what the protocol holds back."""
        self.memory.reset(lost)
        if self._aggregator is not None:
            self._aggregator.reset()


class Round:
    """One exchange in the making. As a context it is taken at the end if `absorb` was reached, else forgotten."""

    def __init__(self, feedback: ErrorFeedback, step: int) -> None:
        self._memory, self._aggregator = feedback.memory, feedback.aggregator
        self._channel, self._seed, self.step = feedback.channel, feedback.seed, step
        self._held = self._aggregator.snapshot()
        self.taken = False

    def correct(self, update: Update) -> Tensor:
        """Return v = e^(i) + u^(i), float[n] (line 10)."""
        return self._memory.correct(update)

    def exchange(self, v: Tensor, extras: Sequence[Tensor] = ()) -> tuple[Averaged, list[Tensor]]:
        """Average C(v) over workers, v's dense part as it is, and `extras`, float[m] each; collective (line 10).

        Extras travel in the dense part, so there is no other collective; their means are the second result.
        """
        n = self._memory.compressed_d
        dense = torch.cat([v[n:], *extras]) if any(len(extra) for extra in extras) else v[n:]
        g = self._aggregator.average(self._channel, v[:n], dense, seed=self._seed, step=self.step)
        mean, *others = torch.split(g.dense, [len(v) - n, *(len(extra) for extra in extras)])
        return replace(g, dense=mean), [other.clone() for other in others]

    def absorb(self, g: Averaged, lost: Tensor | None = None) -> None:
        """Keep what was not sent: e^(i) <- v - C(v) (line 12), plus `lost`, float[n], which could not be applied."""
        self._memory.absorb(g.own, lost)
        self.taken = True

    def settle(self, *, taken: bool) -> None:
        """Make the step that was tried the state, or be as before it."""
        if not taken:
            self._aggregator.restore(self._held)
        self._held = None
        self._memory.settle(taken=taken)

    def __enter__(self) -> "Round":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.settle(taken=self.taken and kind is None)


class Section:
    """Some parameters in the order of the vector, and this worker's e^(i) on them, float[n], in units of a gradient.

    A step is tried first (`correct`, `absorb`), on a vector beside the memory, and then taken or forgotten (`settle`):
    whether all workers' gradients were finite shows only when the last section has been exchanged.
    `pending` has what these parameters have gathered elsewhere, by name; what is taken from it is removed.
    """

    def __init__(self, places: Sequence[Place], pending: dict[str, Tensor], device: torch.device) -> None:
        self.places = sorted(places, key=lambda place: place.start)
        self.n = sum(place.size for place in self.places)
        self.compressed_n = sum(place.size for place in self.places if not place.dense)
        dtype = torch.float32
        for place in self.places:
            dtype = torch.promote_types(dtype, place.parameter.dtype)
        self.error = torch.zeros(self.n, dtype=dtype, device=device)
        self.corrected = torch.zeros_like(self.error)
        self._tried = False
        for place, view in self.views(self.error):
            if (known := pending.pop(place.name, None)) is not None:
                view.copy_(known)

    def views(self, vector: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Yield each parameter's part of a vector, float[n], in its shape and memory format.

        Of a shorter one, float[compressed_n], the compressed parameters', which come first.
        """
        start = 0
        for place in self.places:
            if start + place.size > len(vector):
                return
            p = place.parameter
            yield place, vector.as_strided(p.shape, dense_strides(p), vector.storage_offset() + start)
            start += place.size

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the compressed tensors, in order."""
        return [place.parameter.shape for place in self.places if not place.dense]

    def correct(
        self, grads: Mapping[str, Tensor], noise: Noise | None, scale: float, factors: Mapping[str, float]
    ) -> Tensor:
        """Return factor e + grad / scale + xi, float[n] (line 10 of Algorithm 1), in `corrected`; e is left as it is.

        `factors` are by parameter, 1 where none is given; coordinates of xi are those of the whole vector.
        """
        self._tried = True
        memory = [view for _, view in self.views(self.error)]
        for (place, v), e in zip(self.views(self.corrected), memory, strict=True):
            g, factor = grads[place.name], factors.get(place.name, 1.0)
            if scale == 1.0:
                torch.add(g, e, alpha=factor, out=v)
            else:
                torch.mul(e, factor, out=v).add_(g, alpha=1 / scale)
        if noise is not None:
            for first, last, start in self._stretches():
                noise.add_to(self.corrected[first:last], 1.0, start)
        return self.corrected

    def _stretches(self) -> Iterator[tuple[int, int, int]]:
        """Yield where this vector follows the whole one without a gap: from, to, and where that is in the whole."""
        first = last = begin = 0
        for place in self.places:
            if last > first and place.start != begin + last - first:
                yield first, last, begin
                first = last
            if last == first:
                begin = place.start
            last += place.size
        if last > first:
            yield first, last, begin

    def deliver(self, g: Averaged, grads: Mapping[str, Tensor], scale: float) -> Tensor | None:
        """Write mean_i g^(i), times the scale, over the gradients (line 11).

        Returns what 16-bit gradients could not take of it, the same on every worker, float[n]; else None.
        """
        mean = torch.zeros_like(self.corrected)
        for term in g.mean:
            term.add_to(mean[: self.compressed_n], 1.0)
        mean[self.compressed_n :] = g.dense
        exact = all(out.element_size() >= mean.element_size() for out in grads.values())
        for place, view in self.views(mean):
            out = grads[place.name]
            torch.mul(view, scale, out=out)
            if not exact:
                view.sub_(out, alpha=1 / scale)
        return None if exact else mean

    def absorb(self, g: Averaged, lost: Tensor | None) -> None:
        """Leave in `corrected` what has not been sent or could not be taken (line 12)."""
        for term in g.own:
            term.add_to(self.corrected[: self.compressed_n], -1.0)
        self.corrected[self.compressed_n :].zero_()
        if lost is not None:
            self.corrected.add_(lost)

    def leave(self, names: Collection[str]) -> None:
        """Leave e as it was on these parameters."""
        for (place, new), (_, old) in zip(self.views(self.corrected), self.views(self.error), strict=True):
            if place.name in names:
                new.copy_(old)

    def settle(self, *, taken: bool) -> None:
        """Make the step that was tried the state, or forget it."""
        if self._tried and taken:
            self.error, self.corrected = self.corrected, self.error
        self._tried = False


Schedule = Callable[[int], Compressor]
Scope = Literal["bucket", "model"]


_NO_FACTORS: Mapping[str, float] = {}


@dataclass(frozen=True)
class Rules:
    """How gradients are to be exchanged; see `register_ddp_hook`."""

    compressor: Compressor | Schedule
    exchange: str
    back: Compressor | None
    scope: Scope
    error_feedback: bool
    start_step: int
    seed: int
    max_skipped: int | None = 20
    compare_every: int = 100

    def __post_init__(self) -> None:
        if self.start_step < 0:
            raise ValueError(f"start_step must be 0 or more steps, got {self.start_step}")
        if self.scope not in get_args(Scope):
            raise ValueError(f'scope must be "bucket" or "model", got {self.scope!r}')
        if isinstance(self.compressor, type):
            name = self.compressor.__name__
            raise ValueError(f"compressor must be a Compressor such as {name}(0.01), got the class {name} itself")
        given = self.at(self.start_step) if callable(self.compressor) else self.compressor
        if not isinstance(given, Compressor):
            raise ValueError(
                f"compressor must be a packsaddle Compressor such as RandomK(0.01), or a function of the step that "
                f"returns one, got {given!r}"
            )

    def at(self, step: int) -> Compressor:
        """Return the compressor of a step."""
        if step < self.start_step:
            return Identity()
        return self.compressor if isinstance(self.compressor, Compressor) else self.compressor(step)


class Exchanger:
    """A section and the protocol that averages it, which follows the compressor and the allocation of its budget."""

    def __init__(self, section: Section, rules: Rules, allocation: Allocation) -> None:
        self.section, self._rules, self._allocation, self._d = section, rules, allocation, allocation.d
        self._names = tuple(place.name for place in section.places)
        self.protocol: Protocol | None = None
        self._compressor: Compressor | None = None  # the model's
        self._by_size: Compressor | None = None  # what it is on this section, if only its size counts
        self._held: Any = None  # by the protocol, before the step that is being tried
        # The whole vector has the seed as it is, and so the run that CompressedSGD gives.
        self._seed = rules.seed if section.compressed_n == self._d else mix(rules.seed, section.places[0].start)

    def exchange(
        self,
        channel: Channel,
        gradients: Mapping[str, Tensor],
        noise: Noise | None,
        step: int,
        *,
        scale: float = 1.0,
        factors: Mapping[str, float] = _NO_FACTORS,
        watch: Callable[[Tensor], None] = lambda vector: None,
        report: Callable[[str], None] = lambda name: None,
    ) -> Tensor:
        """Lines 10-12 of Algorithm 1: replace the gradients by their mean, and try what that leaves of the error.

        A worker whose vector is not finite sends zeros and says so. Returns 0 if all is well, at most 1 if there was
        such a worker, and more if there was none but the mean is not finite or not for gradients to hold.
        `factors` are what errors are to be multiplied by first, by parameter (see `Rates`); those of 0 stand still.
        `watch` sees this worker's vector, float[n], before and after; `report` the name of the first parameter of which
        it is not finite, on a CPU, since on a GPU to look would be to wait.
        """
        still = {name for name, factor in factors.items() if factor == 0}
        # While an error stands still, no exchange may hold a part of it.
        dense = bool(still) and self._rules.exchange != "direct"
        compressor = Identity() if dense else self._rules.at(step)
        self.prepare(compressor, channel.group.size)
        section = self.section
        vector = section.correct(gradients, noise, scale, factors)  # line 10
        bad = ~is_usable(vector)
        if vector.device.type == "cpu" and bad:
            named = [(place.name, view) for place, view in section.views(vector)]
            report(first_bad(named) or "the sum of what was left and the gradient")
        spoil(vector, bad, 0.0)
        self._allocation.observe(self._names, vector[: section.compressed_n], compressor)
        watch(vector)
        g, bad = self._average(channel, vector, bad, step, factors)
        lost = section.deliver(g, gradients, scale)  # line 11
        bad = bad + 2 * (~self._fits(g, gradients, scale)).to(bad)
        if lost is not None:  # a 16-bit gradient may overflow
            bad = bad + 2 * (~is_finite(lost)).to(bad)
        section.absorb(g, lost)  # line 12
        watch(vector)
        section.leave(still)
        if not self._rules.error_feedback:
            section.corrected.zero_()
            self._release()
        return bad

    @staticmethod
    def _fits(g: Averaged, gradients: Mapping[str, Tensor], scale: float) -> Tensor:
        """Whether gradients can hold the mean times the scale, bool[]; the same on all workers."""
        dtypes = {torch.promote_types(out.dtype, torch.float32) for out in gradients.values()}  # 16 bits: see `lost`
        return g.magnitude() * scale <= min((torch.finfo(dtype).max for dtype in dtypes), default=0.0)

    def prepare(self, compressor: Compressor, workers: int) -> None:
        """Have the protocol of this compressor. What another one holds back goes to the error memory."""
        if self.protocol is None or compressor != self._compressor:
            self._choose(compressor, workers)
        assert self.protocol is not None
        assert self._by_size is not None
        self.protocol.adopt(self._allocation.of(self._names, compressor) or self._by_size)

    def _choose(self, compressor: Compressor, workers: int) -> None:
        self.fold(workers)
        n, shapes, is_dense = self.section.compressed_n, self.section.shapes, isinstance(compressor, Identity)
        back = None if is_dense else self._rules.back
        self._by_size = compressor.restrict(n, self._d).for_tensors(shapes) if n else compressor
        self.protocol = choose(
            self._by_size,
            "direct" if is_dense else self._rules.exchange,
            d=n,
            dense=self.section.n - n + 1,
            workers=workers,
            itemsize=self.section.error.element_size(),
            back=back if back is None or not n else back.restrict(n, self._d).for_tensors(shapes),
        ).protocol
        self._compressor = compressor

    def error(self, workers: int) -> Tensor:
        """Return a copy of e^(i), float[n], with this worker's share of what the protocol holds back."""
        error = self.section.error.clone()
        if self.protocol is not None:
            n = self.section.compressed_n
            error[:n] = self.protocol.add_residual(error[:n], workers)
        return error

    def fold(self, workers: int) -> None:
        """Move what the protocol holds back into the error memory, so that nothing is lost when it goes."""
        self.section.error.copy_(self.error(workers))
        self.protocol = None

    def held(self) -> dict[str, Any]:
        """Return what the protocol holds and for which compressor, tensors and plain types; {} if there is none."""
        if self.protocol is None:
            return {}
        vectors = self.protocol.vectors(self.section.error[: self.section.compressed_n])
        copies = {name: vector.clone() for name, vector in vectors.items()}
        return {"compressor": repr(self._compressor), "vectors": copies, "state": self.protocol.state_dict()}

    def restore(self, held: Mapping[str, Any], step: int, workers: int) -> None:
        """Have the step's protocol hold what was saved; if another compressor's did, the error memory has it."""
        if not held:
            return
        compressor = self._rules.at(step)
        like = self.section.error[: self.section.compressed_n]
        self.prepare(compressor, workers)
        assert self.protocol is not None
        mine = self.protocol.vectors(like)
        if held["compressor"] == repr(compressor) and mine.keys() == held["vectors"].keys():
            for name, vector in mine.items():
                vector.copy_(held["vectors"][name])
            self.protocol.load_state_dict(held["state"], like.device)
        else:  # what protocols hold in vectors is their owner's error of the mean
            for vector in held["vectors"].values():
                like.add_(vector.to(like.device), alpha=workers)

    def drop(self) -> None:
        """Forget all errors."""
        self.section.error.zero_()
        if self.protocol is not None:
            self.protocol.reset()

    def _release(self) -> None:
        """Have the protocol hold no error, where none is to be fed back."""
        if self.protocol is not None:
            for vector in self.protocol.vectors(self.section.error[: self.section.compressed_n]).values():
                vector.zero_()

    def _average(
        self, channel: Channel, vector: Tensor, bad: Tensor, step: int, factors: Mapping[str, float]
    ) -> tuple[Averaged, Tensor]:
        """Exchange the corrected vector, float[n]; return the outcome, and what share of the workers is `bad`."""
        assert self.protocol is not None
        self._held = self.protocol.snapshot()
        n = self.section.compressed_n
        if factors:
            for error in self.protocol.vectors(vector[:n]).values():
                for place, view in self.section.views(error):
                    view.mul_(factors.get(place.name, 1.0))  # 0 only where `prepare` has left nothing to hold
        dense = torch.cat([vector[n:], bad.reshape(1).to(vector)])
        g = self.protocol.average(channel, vector[:n], dense, seed=self._seed, step=step)
        return replace(g, dense=g.dense[:-1]), g.dense[-1].clone()

    def settle(self, *, taken: bool) -> None:
        """Make the step that was tried the state, or forget it."""
        if not taken and self.protocol is not None:
            self.protocol.restore(self._held)
        self._held = None
        self.section.settle(taken=taken)


def is_plain_sgd(optimizer: Optimizer | None) -> bool:
    """Whether an optimizer only subtracts eta times the gradient: then it is known what an error e will do to x."""
    return type(optimizer) is SGD and not any(g["momentum"] or g["maximize"] for g in optimizer.param_groups)


class Rates:
    """What e is to be multiplied by when plain SGD's rate changes from a to b: a / b, so that y = x - eta e stays.

    Without an optimizer, or with another one, nothing: momentum and second moments would take what is multiplied for
    gradients. Raises ValueError if the optimizer does not have all of the parameters.
    """

    def __init__(self, optimizer: Optimizer | None, places: Sequence[Place]) -> None:
        self._optimizer = optimizer
        self._group: dict[str, int] = {}  # the parameter group of each parameter
        if optimizer is not None:
            owner = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
            for place in places:
                if id(place.parameter) not in owner:
                    raise ValueError(f"optimizer must have all parameters of the model, and lacks {place.name}")
                self._group[place.name] = owner[id(place.parameter)]
        self.units: dict[str, float] = {}  # the rate that each parameter's e is in units of, once there was one
        self._next: dict[str, float] = {}

    def now(self) -> dict[str, float]:
        """Return each parameter's learning rate."""
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        return {name: float(groups[i]["lr"]) for name, i in self._group.items()}

    def factors(self) -> Mapping[str, float]:
        """Return the factor of every parameter whose rate has changed, and take note of the rates for `settle`.

        It is 0 where the rate is 0: x will not move, so e is to be left as it is, and out of what is exchanged.
        """
        if not is_plain_sgd(self._optimizer):
            return {}
        rates = self.now()
        units = {name: self.units.get(name) or rate for name, rate in rates.items()}
        self._next = {name: rate or units[name] for name, rate in rates.items()}
        factors = {name: units[name] / rate if rate else 0.0 for name, rate in rates.items()}
        return {name: factor for name, factor in factors.items() if factor != 1.0}

    def settle(self, *, taken: bool) -> None:
        """Take e to be in the rates of the last `factors`, or not."""
        if taken:
            self.units = self._next
