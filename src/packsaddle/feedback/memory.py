"""Error memories: what compression has not sent yet (Stich et al. 2018; Algorithm 1, lines 10-12).

All kinds implement the interface of `ErrorMemory`: `correct` adds an update to the memory, v = e + u (line 10), `apply`
moves x by the mean update (line 11), `absorb` keeps the residual (line 12), `settle` commits the step or rolls back,
and `reset` clears the memory (line 7).
`InPlaceMemory` is the same for large vectors, without a second one.

`ErrorMemory` stands for eta e^(i), the pending update, rather than e^(i), where updates have eta in them. For a
constant step size the two are the same algorithm for every compressor with C(c v) = c C(v). When eta changes, keeping
eta e fixed is exactly the rescaling of e by eta_old / eta_new that leaves y = x - eta e continuous, and eta = 0 needs
no special case. Behind a hook, which knows no eta, updates are in units of a gradient, and so is the memory.

`GradientMemory` keeps e in the gradients themselves: no second buffer, and no pass over all coordinates in a step. Each
`p.grad` is a view of one vector. What was not sent stays there, and the next backward pass adds to it, as autograd does
where a gradient is present. So the vector holds e, and e + grad F_i after the pass, in units of a gradient.

`EstimateMemory` is EF21 (Richtarik, Sokolov and Fatkhullin 2021): workers send what their running estimate of the
gradient lacks.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged, Term
from packsaddle.feedback.slices import FlatParameters, Shaped
from packsaddle.numerics.finite import magnitude as measured

Memory = Literal["buffer", "gradient", "ef21"]
_LARGE = 1 << 20  # coordinates: a smaller vector's other one fits a cache, and keeps a step that is left out exactly


class Update(Protocol):
    """u, float[n]: what one step would move x against, in the units of the memory it is added to."""

    def add(self, base: Shaped, out: Shaped) -> None:
        """Set out to base + u, both float[n]; out may be base."""

    def perturb(self, out: Tensor) -> None:
        """Add u to out, float[n], which has u's gradient already."""


class RevocableUpdate(Update, Protocol):
    """An update that can be added in place and taken back in the same step, up to rounding."""

    def add_if_finite(self, out: Shaped) -> bool:
        """Add u to out, float[n], in place. Return False, with out unchanged, if the sum may be non-finite."""

    def take_back(self, out: Shaped) -> None:
        """Subtract u from out, float[n]."""


class Layout(Protocol):
    """The parameters of a vector, float[n]: the compressed ones first."""

    compressed_d: int

    def zeros(self) -> Shaped:
        """Return a vector of zeros, float[n], in at least single precision."""

    def frozen(self, flat: Tensor) -> list[Tensor]:
        """Return the views of frozen parameters in a vector, float[n]."""


class ErrorMemory:
    """This worker's error, float[n], in at least single precision; on the dense part only what rounding x lost.

    A step is tried in a `spare` vector, which then takes the memory's place, so that a step can be left out; without
    one in the memory itself.
    """

    kind: Memory = "buffer"
    in_gradients = False  # p.grad is the memory: a backward pass adds to it before it is known whether a step is taken

    def __init__(self, layout: Layout, *, spare: bool = False) -> None:
        self._layout = layout
        self.compressed_d = layout.compressed_d
        self._now = layout.zeros()
        self._next = layout.zeros() if spare else self._now

    @property
    def vector(self) -> Tensor:
        """The memory, float[n]."""
        return self._now.flat

    @property
    def views(self) -> list[Tensor]:
        """The memory, shaped as the parameters."""
        return self._now.views

    @property
    def unit(self) -> float:
        """The factor that makes the vector, and its messages, updates of x."""
        return 1.0

    @property
    def spare_bytes(self) -> int:
        """The size of the spare vector, if there is one."""
        return 0 if self._next is self._now else self._next.flat.nbytes

    def scales(self, lrs: Sequence[float]) -> Sequence[float]:
        """Return what gradients are to be multiplied by in an update, by parameter group, under these rates."""
        return lrs

    def rates_of_x(self, grown: float, *, lazy: bool, can_wait: bool) -> Sequence[float]:
        """Return the factors this worker applies to the update locally, which must be equal on all workers.

        They are `unit` and `grown`, the std of noise that stays outstanding if `lazy`. Unless `can_wait`, a step must
        not read numbers from a device.
        """
        return [self.unit, grown] if lazy and can_wait else []

    def reach(self, magnitude: float) -> float:
        """Return by how much a mean of this magnitude can move x."""
        return magnitude * abs(self.unit)

    def pending(self) -> Tensor:
        """Return the pending update of x, eta e, float[n]; may be a view."""
        return self.vector

    def check(self) -> None:
        """Raise RuntimeError if the gradients cannot be taken."""

    def correct(self, update: Update) -> Tensor:
        """Return v = e + u, float[n], of which `absorb` will make the memory (line 10).

        A parameter that was frozen is left where it is.
        """
        update.add(self._now, self._next)
        self._forget_frozen(self._next.flat)
        return self._next.flat

    def apply(self, x: Tensor, g: Averaged) -> None:
        """Subtract mean_i g^(i) from x, float[n], in at least single precision (line 11)."""
        for term in g.mean:
            term.add_to(x[: self.compressed_d], -self.unit)
        x[self.compressed_d :].sub_(g.dense, alpha=self.unit)

    def absorb(self, sent: Iterable[Term], lost: Tensor | None = None) -> None:
        """Set the memory to the residual: v - C(v) on the compressed part, 0 on the uncompressed part (line 12).

        `lost`, float[n], is the rounding error of x; it is added, to be sent again.
        """
        rest = self._next.flat
        for term in sent:
            term.add_to(rest, -1.0)
        rest[self.compressed_d :].zero_()
        if lost is not None:
            rest.add_(lost)
        self._forget_frozen(rest)

    def leave(self, which: Collection[int]) -> None:
        """Restore the old e for the parameters with these indices. Call after `absorb`."""
        for i in which:
            self._next.views[i].copy_(self._now.views[i])

    def settle(self, *, taken: bool) -> None:
        """Commit the step, or roll back."""
        if taken:
            self._now, self._next = self._next, self._now

    def add(self, update: Tensor) -> None:
        """Add to eta e, on its first coordinates, float[at most n]."""
        self.vector[: len(update)].add_(update, alpha=1 / self.unit)

    def reset(self, lost: Tensor | None = None) -> None:
        """Set the error to zero (line 7), or to the rounding error of x."""
        self.vector.zero_()
        if lost is not None:
            self.vector.add_(lost)
        self.reload()

    def vectors(self) -> dict[str, Tensor]:
        """Return what is kept from step to step in addition to the memory itself, float[n] each, by name."""
        return {}

    def reload(self, unit: float | None = None) -> None:
        """Accept the vector as the state between two steps, in another unit if one is given."""

    def _forget_frozen(self, vector: Tensor) -> None:
        """Frozen parameters have no error: they take neither noise nor what a compressor makes of zeros."""
        for view in self._layout.frozen(vector):
            view.zero_()


class InPlaceMemory(ErrorMemory):
    """The error of a large vector, float[n]: a step is tried in the memory itself, and there is no other vector.

    To leave a step out its update is subtracted again, from gradients that are still there; so the memory is then as
    before up to rounding. An update that may not be finite, which could not be taken back, is tried in another vector.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._tried: RevocableUpdate | None = None  # what the memory has in it that may be taken back

    def correct(self, update: RevocableUpdate) -> Tensor:  # type: ignore[override]
        if update.add_if_finite(self._now):
            self._tried = update
            self._forget_frozen(self._now.flat)
        else:
            self._next = self._layout.zeros()
            super().correct(update)
        return self._next.flat

    def settle(self, *, taken: bool) -> None:
        if self._tried is not None and not taken:
            self._tried.take_back(self._now)
            self._forget_frozen(self._now.flat)
        super().settle(taken=taken)
        self._tried, self._next = None, self._now


_HOLD = 'with memory="gradient" the gradients hold what has not been sent yet'


class GradientMemory(ErrorMemory):
    """This worker's e^(i), float[d], as the parameters' gradients.

    A change of gradients between the backward pass and the step (clearing, replacing, clipping, unscaling) would change
    the memory, and raises RuntimeError at the next step; a change of `p.grad.data`, or in numpy, is not detected.
    `rates` returns the learning rates by parameter group, which must be equal. An update is applied at the rate under
    which it was accumulated: when the rate changes, the vector is rescaled before the next gradient, so that y does not
    jump. Raises ValueError if rates differ or are 0, and for 16-bit parameters, whose gradients are too coarse for an
    error.
    """

    kind = "gradient"
    in_gradients = True

    def __init__(self, flat: FlatParameters, rates: Callable[[], Sequence[float]]) -> None:
        if flat.x.element_size() < 4:
            raise ValueError(f'memory="gradient" needs parameters of 32 or 64 bits, got {flat.x.dtype}')
        super().__init__(flat)
        self._flat, self._rates = flat, rates
        self._unit = self._rate()
        for p, view in zip(flat.parameters, self.views, strict=True):
            if p.grad is not None:
                view.copy_(p.grad)
        self._attach()
        self._watch()

    @property
    def unit(self) -> float:
        return self._unit

    def scales(self, lrs: Sequence[float]) -> Sequence[float]:
        return [1.0] * len(lrs)

    def rates_of_x(self, grown: float, *, lazy: bool, can_wait: bool) -> Sequence[float]:
        return [self.unit, grown] if can_wait else []

    def pending(self) -> Tensor:
        return self.vector * self._unit

    def correct(self, update: Update) -> Tensor:
        self._rate()
        self._follow_rate()
        update.perturb(self.vector)
        self._forget_frozen(self.vector)
        return self.vector

    def add(self, update: Tensor) -> None:
        super().add(update)
        self._version = self.vector._version

    def settle(self, *, taken: bool) -> None:
        if taken:  # otherwise the gradient stays in it, and `check` raises at the next step
            self.reload()

    def reload(self, unit: float | None = None) -> None:
        if unit is not None:
            self._unit = unit
        self._attach()

    def _attach(self) -> None:
        """Set the views as gradients, and record the vector's version, which only backward passes may change."""
        for p, view in zip(self._flat.parameters, self.views, strict=True):
            p.grad = view
        self._version = self.vector._version  # views share it, and every change in place raises it

    def _watch(self) -> None:
        """Register hooks that run before and after autograd adds to a parameter's gradient."""
        # Weak, since parameters keep their hooks.
        memory, handles = weakref.ref(self), []

        def watched(p: Tensor, view: Tensor) -> "GradientMemory | None":
            """Return the memory, unless it is gone or another optimizer has replaced the gradient."""
            return memory() if p.grad is not None and p.grad.data_ptr() == view.data_ptr() else None

        def before(p: Tensor, view: Tensor, _: Tensor) -> None:
            if it := watched(p, view):
                it._follow_rate()

        # Autograd's addition raises the vector's version by one; `check` detects any other change.
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
        """Rescale the vector to units of the current rate. An invalid rate raises ValueError in `step`."""
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

    kind = "ef21"

    def __init__(self, flat: FlatParameters, rates: Callable[[], Sequence[float]]) -> None:
        if flat.x.element_size() < 4:
            raise ValueError(f'memory="ef21" needs parameters of 32 or 64 bits, got {flat.x.dtype}')
        super().__init__(flat)
        self._flat = flat
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

    def scales(self, lrs: Sequence[float]) -> Sequence[float]:
        return [1.0] * len(lrs)

    def rates_of_x(self, grown: float, *, lazy: bool, can_wait: bool) -> Sequence[float]:
        return self._rates()  # every step, on a GPU too: nothing else holds x together

    def settle(self, *, taken: bool) -> None:
        """Do nothing: `apply` and `absorb` have changed the estimates."""

    def reload(self, unit: float | None = None) -> None:
        self._bound = None

    def pending(self) -> Tensor:
        return torch.zeros_like(self.vector)

    def correct(self, update: Update) -> Tensor:
        torch.neg(self.vector, out=self._lacking.flat)
        update.add(self._lacking, self._lacking)
        self._forget_frozen(self._lacking.flat)
        return self._lacking.flat

    def apply(self, x: Tensor, g: Averaged) -> None:
        for term in g.mean:
            term.add_to(self.mean[: self.compressed_d], 1.0)
        self.mean[self.compressed_d :].add_(g.dense)
        rates = self._rates()
        for run in self._flat.runs:
            stretch = slice(run.start, run.stop)
            x[stretch].sub_(self.mean[stretch], alpha=rates[run.group])

    def absorb(self, sent: Iterable[Term], lost: Tensor | None = None) -> None:
        compressed, dense = slice(self.compressed_d), slice(self.compressed_d, None)
        for term in sent:
            term.add_to(self.vector[compressed], 1.0)
            term.add_to(self._lacking.flat[compressed], -1.0)  # what is left of it, for `stages.contraction`
        self.vector[dense].add_(self._lacking.flat[dense])
        self._lacking.flat[dense].zero_()
        self._forget_frozen(self.vector)
        self._forget_frozen(self.mean)

    def add(self, update: Tensor) -> None:
        raise NotImplementedError("an estimate takes no update: nothing is ever pending")

    def reset(self, lost: Tensor | None = None) -> None:
        """Leave the estimates: they are as good a start from another x as any."""

    def vectors(self) -> dict[str, Tensor]:
        return {"mean_estimate": self.mean}


def make_memory(
    kind: Memory,
    flat: FlatParameters,
    rates: Callable[[], Sequence[float]],
    *,
    spare: bool,
    revocable: bool,
) -> ErrorMemory:
    """Return the memory of this kind, with a `spare` vector if it is to leave steps out and needs one.

    A large one on a CPU, where time is reading and writing, does without if its updates are `revocable`.
    """
    if kind == "buffer":
        in_place = spare and revocable and flat.d >= _LARGE and flat.x.device.type == "cpu"
        return InPlaceMemory(flat) if in_place else ErrorMemory(flat, spare=spare)
    return GradientMemory(flat, rates) if kind == "gradient" else EstimateMemory(flat, rates)
