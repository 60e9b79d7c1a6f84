"""Error memories: what compression has not sent yet (Stich et al. 2018; Algorithm 1, lines 10-12).

`ErrorMemory` stands for eta e^(i), the pending update, rather than e^(i). For a constant step size the two are the
same algorithm for every compressor with C(c v) = c C(v). When eta changes, keeping eta e fixed is exactly the
rescaling of e by eta_old / eta_new that leaves y = x - eta e continuous, and eta = 0 needs no special case.

`GradientMemory` keeps e in the gradients themselves: no second buffer, and no pass over all coordinates in a step. Each
`p.grad` is a view of one vector. What was not sent stays there, and the next backward pass adds to it, as autograd does
where a gradient is present. So the vector holds e, and e + grad F_i after the pass, in units of a gradient.

`EstimateMemory` is EF21 (Richtarik, Sokolov and Fatkhullin 2021): workers send what their running estimate of the
gradient lacks.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged, Term
from packsaddle.numerics.finite import magnitude as measured
from packsaddle.optim.gradient import Extras, Gradient
from packsaddle.optim.layout import FlatParameters


class ErrorMemory:
    """This worker's eta e^(i), float[d], in at least single precision; on the dense part only what rounding x lost.

    A step is tried in a `spare` vector, which then takes the memory's place, so that a step can be left out; without
    one in the memory itself.
    """

    can_leave_out = True  # a gradient that is not finite

    def __init__(self, flat: FlatParameters, *, spare: bool = False) -> None:
        self._flat = flat
        self._now = flat.zeros()
        self._next = flat.zeros() if spare else self._now

    @property
    def vector(self) -> Tensor:
        """The memory, float[d]."""
        return self._now.flat

    @property
    def views(self) -> list[Tensor]:
        """The memory, shaped as the parameters."""
        return self._now.views

    @property
    def unit(self) -> float:
        """What the vector, and the messages made of it, are to be multiplied by to be updates of x."""
        return 1.0

    @property
    def spare_bytes(self) -> int:
        """The size of the spare vector, if there is one."""
        return 0 if self._next is self._now else self._next.flat.nbytes

    def reach(self, magnitude: float) -> float:
        """Return by how much a mean of this magnitude can move x."""
        return magnitude * abs(self.unit)

    def pending(self) -> Tensor:
        """Return eta e, float[d]; not a copy if it need not be one."""
        return self.vector

    def check(self) -> None:
        """Raise RuntimeError if the gradients cannot be taken."""
        for p, name in zip(self._flat.parameters, self._flat.names, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient, which is not supported")

    def correct(self, direction: Gradient, lrs: Sequence[float], extras: Extras) -> Tensor:
        """Return eta (e + u), float[d] (line 10), of which `absorb` will make the memory; `lrs` are by parameter group.

        A parameter that was frozen is left where it is.
        """
        direction.add(self._now, self._next, lrs, extras)
        self._forget_frozen(self._next.flat)
        return self._next.flat

    def correct_by(self, update: Tensor) -> Tensor:
        """Return eta e + update, float[d], of which `absorb` will make the memory."""
        return torch.add(self.vector, update, out=self._next.flat)

    def apply(self, x: Tensor, g: Averaged) -> None:
        """Subtract mean_i g^(i) from x, float[d], in at least single precision (line 11)."""
        compressed_d = self._flat.compressed_d
        for term in g.mean:
            term.add_to(x[:compressed_d], -self.unit)
        x[compressed_d:].sub_(g.dense, alpha=self.unit)

    def absorb(self, sent: Iterable[Term], lost: Tensor | None = None) -> None:
        """Remember what was to be sent less what was, C(.) of the compressed part and all of the dense one (line 12).

        `lost`, float[d], is what x's own precision could not take; it is to be sent again.
        """
        rest = self._next.flat
        for term in sent:
            term.add_to(rest, -1.0)
        rest[self._flat.compressed_d :].zero_()
        if lost is not None:
            rest.add_(lost)
        self._forget_frozen(rest)
        self._now, self._next = self._next, self._now
        self.settle()

    def add(self, update: Tensor) -> None:
        """Add to eta e, on its first coordinates, float[at most d]."""
        self.vector[: len(update)].add_(update, alpha=1 / self.unit)

    def reset(self, lost: Tensor | None = None) -> None:
        """Set the error to zero (line 7), or to what x's own precision could not take."""
        self.vector.zero_()
        if lost is not None:
            self.vector.add_(lost)
        self.settle()

    def vectors(self) -> dict[str, Tensor]:
        """Return what is kept from step to step beside the memory itself, float[d] each, by name."""
        return {}

    def settle(self, unit: float | None = None) -> None:
        """Take the vector as it now is for the state between two steps, in another unit if one is given."""

    def _forget_frozen(self, vector: Tensor) -> None:
        """Frozen parameters have no error: they take neither noise nor what a compressor makes of zeros."""
        for view in self._flat.frozen(vector):
            view.zero_()


_HOLD = 'with memory="gradient" the gradients hold what has not been sent yet'


class GradientMemory(ErrorMemory):
    """This worker's e^(i), float[d], as the parameters' gradients.

    Whatever changes gradients between the backward pass and the step would change the memory with them, and raises
    RuntimeError at the next step: clearing, replacing, clipping, unscaling (but what is done to `p.grad.data`, or in
    numpy, leaves no trace). `rates` returns the learning rates by
    parameter group, which must be equal; what was gathered under one rate is applied with it: when it changes, the
    vector is rescaled before the next gradient comes, so that y stays. Raises ValueError if rates differ or are 0,
    and for 16-bit parameters, whose gradients are too coarse to keep an error in.
    """

    can_leave_out = False  # the backward pass has added it

    def __init__(self, flat: FlatParameters, rates: Callable[[], Sequence[float]]) -> None:
        if flat.x.element_size() < 4:
            raise ValueError(f'memory="gradient" needs parameters of 32 or 64 bits, got {flat.x.dtype}')
        super().__init__(flat)
        self._rates = rates
        self._unit = self._rate()
        for p, view in zip(flat.parameters, self.views, strict=True):
            if p.grad is not None:
                view.copy_(p.grad)
        self._attach()
        self._watch()

    @property
    def unit(self) -> float:
        return self._unit

    def pending(self) -> Tensor:
        return self.vector * self._unit

    def correct(self, direction: Gradient, lrs: Sequence[float], extras: Extras) -> Tensor:
        self._rate()
        self._follow_rate()
        direction.perturb(self.vector, [1.0] * len(lrs), extras)
        self._forget_frozen(self.vector)
        return self.vector

    def settle(self, unit: float | None = None) -> None:
        super().settle(unit)
        if unit is not None:
            self._unit = unit
        self._attach()

    def _attach(self) -> None:
        """Make the views the gradients, and the vector's present state one that only backward passes may change."""
        for p, view in zip(self._flat.parameters, self.views, strict=True):
            p.grad = view
        self._version = self.vector._version  # views share it, and every change in place raises it

    def _watch(self) -> None:
        """Be called before and after a parameter's gradient is added to."""
        memory, handles = weakref.ref(self), []

        def watched(p: Tensor, view: Tensor) -> "GradientMemory | None":
            """The memory, unless it is gone, or another optimizer has taken the parameter over."""
            return memory() if p.grad is not None and p.grad.data_ptr() == view.data_ptr() else None

        def before(p: Tensor, view: Tensor, _: Tensor) -> None:
            if it := watched(p, view):
                it._follow_rate()

        def after(view: Tensor, p: Tensor) -> None:
            if it := watched(p, view):
                it._version += 1

        for p, view in zip(self._flat.parameters, self.views, strict=True):
            trained = p.requires_grad
            p.requires_grad_(True)  # hooks can only be set then, and it may be unfrozen later
            handles.append(p.register_hook(partial(before, p, view)))  # type: ignore[no-untyped-call]
            handles.append(p.register_post_accumulate_grad_hook(partial(after, view)))  # type: ignore[no-untyped-call]
            p.requires_grad_(trained)
        weakref.finalize(self, lambda: [handle.remove() for handle in handles])

    def _rate(self) -> float:
        first, *others = self._rates()
        if first == 0 or any(lr != first for lr in others):
            raise ValueError(f'memory="gradient" needs one lr above 0 for all groups, got {[first, *others]}')
        return first

    def _follow_rate(self) -> None:
        """Bring the vector to units of the present rate. One that cannot be is left for `step` to refuse."""
        lr, *others = self._rates()
        if lr != self._unit and lr and all(lr == other for other in others):
            self.vector.mul_(self._unit / lr)
            self._version += 1
            self._unit = lr

    def check(self) -> None:
        for name, p, view in zip(self._flat.names, self._flat.parameters, self.views, strict=True):
            if p.grad is None or p.grad.data_ptr() != view.data_ptr():
                raise RuntimeError(
                    f"{_HOLD}, but that of {name} was cleared or replaced (zero_grad, backward(create_graph=True)?)"
                )
        if self.vector._version != self._version:
            raise RuntimeError(f"{_HOLD}, but they were changed after the backward pass (clipped, or set to zero?)")


class EstimateMemory(ErrorMemory):
    """This worker's estimate g^(i), float[d], and the mean of all workers', in units of a gradient.

    C(u - g^(i)) is sent and added to g^(i) everywhere; x moves against the mean of the estimates, so nothing is ever
    pending: e = 0 and y = x. It has no bounded-gradient assumption, and with small batches it wants momentum. Raises
    ValueError for 16-bit parameters.
    """

    def __init__(self, flat: FlatParameters, rates: Callable[[], Sequence[float]]) -> None:
        if flat.x.element_size() < 4:
            raise ValueError(f'memory="ef21" needs parameters of 32 or 64 bits, got {flat.x.dtype}')
        super().__init__(flat)
        self.mean = torch.zeros_like(self.vector)
        self._lacking = flat.zeros()  # u less the estimate
        self._rates = rates
        self._bound: float | None = None  # on the magnitude of `mean`

    def reach(self, magnitude: float) -> float:
        """The mean estimate moves x, whatever a step brings: it is measured once, and bounded from then on."""
        if self._bound is None:
            self._bound = float(measured(self.mean))
        self._bound += magnitude
        return self._bound * max(self._rates(), default=0.0)

    def settle(self, unit: float | None = None) -> None:
        super().settle(unit)
        self._bound = None

    def pending(self) -> Tensor:
        return torch.zeros_like(self.vector)

    def correct(self, direction: Gradient, lrs: Sequence[float], extras: Extras) -> Tensor:
        torch.neg(self.vector, out=self._lacking.flat)
        direction.add(self._lacking, self._lacking, [1.0] * len(lrs), extras)
        self._forget_frozen(self._lacking.flat)
        return self._lacking.flat

    def apply(self, x: Tensor, g: Averaged) -> None:
        compressed_d = self._flat.compressed_d
        for term in g.mean:
            term.add_to(self.mean[:compressed_d], 1.0)
        self.mean[compressed_d:].add_(g.dense)
        rates = self._rates()
        for run in self._flat.runs:
            stretch = slice(run.start, run.stop)
            x[stretch].sub_(self.mean[stretch], alpha=rates[run.group])

    def absorb(self, sent: Iterable[Term], lost: Tensor | None = None) -> None:
        compressed_d = self._flat.compressed_d
        for term in sent:
            term.add_to(self.vector[:compressed_d], 1.0)
            term.add_to(self._lacking.flat[:compressed_d], -1.0)  # what is left of it, for `stages.contraction`
        self.vector[compressed_d:].add_(self._lacking.flat[compressed_d:])
        self._lacking.flat[compressed_d:].zero_()
        self._forget_frozen(self.vector)
        self._forget_frozen(self.mean)

    def add(self, update: Tensor) -> None:
        raise NotImplementedError("an estimate takes no update: nothing is ever pending")

    def reset(self, lost: Tensor | None = None) -> None:
        """Leave the estimates: they are as good a start from another x as any."""

    def vectors(self) -> dict[str, Tensor]:
        return {"mean_estimate": self.mean}


Memory = Literal["buffer", "gradient", "ef21"]


def make_memory(
    kind: str,
    flat: FlatParameters,
    rates: Callable[[], Sequence[float]],
    *,
    exchange: str,
    local_steps: int,
    spare: bool,
) -> ErrorMemory:
    """Return the memory of this kind, with a `spare` vector if it is to leave steps out and needs one.

    Raises ValueError for any other kind, and for what it does not go with.
    """
    if kind not in get_args(Memory):
        raise ValueError(f"memory must be one of {', '.join(get_args(Memory))}, got {kind!r}")
    if kind == "buffer":
        return ErrorMemory(flat, spare=spare)
    if exchange != "direct":  # others hold errors back, in the units that the messages had
        raise ValueError(f'memory="{kind}" is for exchange "direct", got {exchange!r}')
    if local_steps > 1:
        raise ValueError(f'memory="{kind}" is for local_steps=1, got {local_steps}; use memory="buffer"')
    return GradientMemory(flat, rates) if kind == "gradient" else EstimateMemory(flat, rates)


def kind_of(memory: ErrorMemory) -> Memory:
    """Return a memory's kind."""
    if isinstance(memory, GradientMemory):
        return "gradient"
    return "ef21" if isinstance(memory, EstimateMemory) else "buffer"
