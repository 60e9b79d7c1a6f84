"""The gradients themselves as error memory: no second buffer, and no pass over all coordinates in a step.

Each `p.grad` is a view of one vector. What was not sent stays there, and the next backward pass adds to it, as autograd
does where a gradient is present. So the vector holds e, and e + grad F_i after the pass, in units of a gradient.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from packsaddle.direction import Extras, Gradient
from packsaddle.feedback import ErrorMemory
from packsaddle.flat import FlatParameters

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
