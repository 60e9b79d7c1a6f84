"""Error memories for CompressedSGD alone: they need the gradients or the learning rates of the parameters."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged, Term
from packsaddle.feedback.memory import ErrorMemory, InPlaceMemory, Memory, Update
from packsaddle.feedback.slices import FlatParameters
from packsaddle.numerics.finite import magnitude as measured

_LARGE = 1 << 20  # coordinates; a smaller vector has a spare, which fits the cache and makes rollback exact
_HOLD = 'with memory="gradient" the gradients store the error memory'


class GradientMemory(ErrorMemory):
    """This worker's error memory e, float[d], stored in the parameters' gradients (memory="gradient").

    Each `p.grad` is a view of one vector. The residual stays there, and the next backward pass accumulates into it, so
    the vector is e before the pass and e plus the gradient after it. This saves a second buffer and a pass over it. A
    change of gradients between the backward pass and the step (clearing, replacing, clipping, unscaling) would change
    the memory, and raises RuntimeError at the next step; a change of `p.grad.data`, or in numpy, is not detected.

    `rates` returns the learning rates by parameter group, which must be equal. When the rate changes, the vector is
    rescaled before the next gradient, so that y = x - eta e does not jump. Raises ValueError if rates differ or are 0,
    and for 16-bit parameters, whose gradients are too coarse for residuals.
    """

    kind = "gradient"
    in_gradients = in_gradient_units = True

    def __init__(self, flat: FlatParameters, rates: Callable[[], Sequence[float]]) -> None:
        if flat.x.element_size() < 4:
            raise ValueError(f'memory="gradient" needs parameters of 32 or 64 bits, got {flat.x.dtype}')
        super().__init__(flat)
        self._flat, self._rates = flat, rates
        self.unit = self._rate()
        for p, view in zip(flat.parameters, self.views, strict=True):
            if p.grad is not None:
                view.copy_(p.grad)
        self._attach()
        self._watch()

    def local_factors(self, grown: float, *, lazy: bool, can_wait: bool) -> Sequence[float]:
        return [self.unit, grown] if can_wait else []

    def pending(self) -> Tensor:
        return self.vector * self.unit

    def correct(self, update: Update) -> Tensor:
        self._rate()
        self._rescale()
        update.perturb(self.vector)
        self._clear_frozen(self.vector)
        return self.vector

    def add(self, update: Tensor) -> None:
        super().add(update)
        self._version = self.vector._version

    def close(self, *, apply: bool) -> None:
        if apply:  # after a skip the gradient stays in the vector, and the optimizer raises
            self.after_load()

    def after_load(self, unit: float | None = None) -> None:
        if unit is not None:
            self.unit = unit
        self._attach()

    def _attach(self) -> None:
        """Set the views as gradients, and record the vector's version, which only backward passes may change."""
        for p, view in zip(self._flat.parameters, self.views, strict=True):
            p.grad = view
        self._version = self.vector._version  # the views share it, and every in-place change increments it

    def _watch(self) -> None:
        """Register hooks that run before and after autograd adds to a parameter's gradient."""
        # Use a weak reference, since parameters own their hooks.
        memory, handles = weakref.ref(self), []

        def watched(p: Tensor, view: Tensor) -> "GradientMemory | None":
            """Return the memory; None if it was deleted or another optimizer replaced the gradient."""
            return memory() if p.grad is not None and p.grad.data_ptr() == view.data_ptr() else None

        def before(p: Tensor, view: Tensor, _: Tensor) -> None:
            if it := watched(p, view):
                it._rescale()

        # Autograd's addition increments the vector's version; `validate` detects any other change.
        def after(view: Tensor, p: Tensor) -> None:
            if it := watched(p, view):
                it._version += 1

        for p, view in zip(self._flat.parameters, self.views, strict=True):
            trained = p.requires_grad
            p.requires_grad_(True)  # required to register hooks; a frozen p may be unfrozen later
            handles.append(p.register_hook(partial(before, p, view)))  # type: ignore[no-untyped-call]
            handles.append(p.register_post_accumulate_grad_hook(partial(after, view)))  # type: ignore[no-untyped-call]
            p.requires_grad_(trained)
        weakref.finalize(self, lambda: [handle.remove() for handle in handles])

    def _rate(self) -> float:
        first, *others = self._rates()
        if first == 0 or any(lr != first for lr in others):
            raise ValueError(f'memory="gradient" needs one lr above 0 for all groups, got {[first, *others]}')
        return first

    def _rescale(self) -> None:
        """Rescale the vector to units of the current rate. An invalid rate raises ValueError in `step`."""
        lr, *others = self._rates()
        if lr != self.unit and lr and all(lr == other for other in others):
            self.vector.mul_(self.unit / lr)
            self._version += 1
            self.unit = lr

    def validate(self) -> None:
        for name, p, view in zip(self._flat.names, self._flat.parameters, self.views, strict=True):
            if p.grad is None or p.grad.data_ptr() != view.data_ptr():
                raise RuntimeError(
                    f"{_HOLD}, but that of {name} was cleared or replaced (zero_grad, backward(create_graph=True)?)"
                )
        if self.vector._version != self._version:
            raise RuntimeError(f"{_HOLD}, but they changed after the backward pass. Do not clip, scale or zero them.")


class EstimateMemory(ErrorMemory):
    """EF21's estimate of this worker's gradient, float[d], and the mean of all workers' estimates (memory="ef21").

    After Richtarik, Sokolov and Fatkhullin 2021. From its update u and estimate g^(i) a worker sends C(u - g^(i)), and
    adds it to g^(i); x <- x - eta mean_i g^(i). So no update is ever unsent: e = 0 and y = x. EF21's proof does not
    assume bounded gradients; small batches need momentum. Raises ValueError for 16-bit parameters.
    """

    kind = "ef21"
    in_gradient_units = True

    def __init__(self, flat: FlatParameters, rates: Callable[[], Sequence[float]]) -> None:
        if flat.x.element_size() < 4:
            raise ValueError(f'memory="ef21" needs parameters of 32 or 64 bits, got {flat.x.dtype}')
        super().__init__(flat)
        self._flat = flat
        self.mean = torch.zeros_like(self.vector)
        self._lacking = flat.zeros()  # the update minus the estimate, which is the vector to send
        self._rates = rates
        self._bound: float | None = None  # an upper bound on the magnitude of `mean`; None: not measured

    def bound(self, magnitude: float) -> float:
        """Return an upper bound on the change of x by the mean estimate, measured only at the first call."""
        if self._bound is None:
            self._bound = float(measured(self.mean))
        self._bound += magnitude
        return self._bound * max(self._rates(), default=0.0)

    def local_factors(self, grown: float, *, lazy: bool, can_wait: bool) -> Sequence[float]:
        return self._rates()  # compared in every step, on a GPU too: unequal rates would make x differ between workers

    def close(self, *, apply: bool) -> None:
        """No-op: `apply_mean` and `absorb` have changed the estimates."""

    def after_load(self, unit: float | None = None) -> None:
        self._bound = None

    def pending(self) -> Tensor:
        return torch.zeros_like(self.vector)

    def correct(self, update: Update) -> Tensor:
        torch.neg(self.vector, out=self._lacking.flat)
        update.add(self._lacking, self._lacking)
        self._clear_frozen(self._lacking.flat)
        return self._lacking.flat

    def apply_mean(self, x: Tensor, g: Averaged) -> None:
        for term in g.mean:
            term.add_to(self.mean[: self.compressed_d], 1.0)
        self.mean[self.compressed_d :].add_(g.dense)
        rates = self._rates()
        for of in self._flat.ranges:
            part = slice(of.start, of.stop)
            x[part].sub_(self.mean[part], alpha=rates[of.group])

    def absorb(self, sent: Iterable[Term], rounding: Tensor | None = None) -> None:
        compressed, dense = slice(self.compressed_d), slice(self.compressed_d, None)
        for term in sent:
            term.add_to(self.vector[compressed], 1.0)
            term.add_to(self._lacking.flat[compressed], -1.0)  # the residual, for `feedback.checks`
        self.vector[dense].add_(self._lacking.flat[dense])
        self._lacking.flat[dense].zero_()
        self._clear_frozen(self.vector)
        self._clear_frozen(self.mean)

    def add(self, update: Tensor) -> None:
        raise NotImplementedError("an estimate takes no update: nothing is ever pending")

    def reset(self, rounding: Tensor | None = None) -> None:
        """No-op: the estimates stay valid when x is rolled back."""

    def vectors(self) -> dict[str, Tensor]:
        return {"mean_estimate": self.mean}


def make_memory(
    kind: Memory, flat: FlatParameters, rates: Callable[[], Sequence[float]], *, spare: bool, revocable: bool
) -> ErrorMemory:
    """Return the error memory of this kind; with `spare`, its steps can be rolled back. A large buffer on a CPU is
    rolled back by subtraction, without a spare vector, if its updates are `revocable`."""
    if kind == "buffer":
        in_place = spare and revocable and flat.d >= _LARGE and flat.x.device.type == "cpu"
        return InPlaceMemory(flat) if in_place else ErrorMemory(flat, spare=spare)
    return GradientMemory(flat, rates) if kind == "gradient" else EstimateMemory(flat, rates)
