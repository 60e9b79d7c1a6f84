"""What a worker moves x against: its gradient, or what momentum or variance reduction makes of gradients over time.

Each direction is u^(i), float[d]; what is sent of it, and what becomes of the rest, is the memory's part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from packsaddle.flat import FlatParameters
from packsaddle.noise import Noise

T = TypeVar("T")


@dataclass(frozen=True)
class Extras:
    """What is added to gradients: weight decay by parameter group, and xi, left out before coordinate `noisy_from`."""

    decays: Sequence[float]
    noise: Noise | None = None
    noisy_from: int = 0


class Gradient:
    """u = grad F_i(x) + weight_decay x + xi.

    A parameter without a gradient counts as one whose gradient is zero.
    """

    started = True

    def __init__(self, flat: FlatParameters) -> None:
        self._flat = flat

    def evaluate(self, closure: Callable[[], T] | None, decays: Sequence[float]) -> T | None:
        """Compute gradients by the closure, if there is one, and return its value."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def add_to(self, out: Tensor, views: Sequence[Tensor], scales: Sequence[float], extras: Extras) -> None:
        """Add scale u to out, float[d], whose `views` are shaped as the parameters; scales by parameter group."""
        self.perturb(out, scales, extras)
        self._add_gradients(views, scales)

    def perturb(self, out: Tensor, scales: Sequence[float], extras: Extras) -> None:
        """Add scale (xi + weight_decay x)."""
        self._add_decay(out, scales, extras.decays)  # first: between exchanges `out` is x itself
        self._add_noise(out, scales, extras)

    def _add_gradients(self, views: Sequence[Tensor], scales: Sequence[float]) -> None:
        for members, scale in zip(self._flat.members, scales, strict=True):
            grads = {i: g for i in members if (g := self._flat.parameters[i].grad) is not None}
            if grads:
                torch._foreach_add_([views[i] for i in grads], list(grads.values()), alpha=scale)

    def _add_noise(self, out: Tensor, scales: Sequence[float], extras: Extras) -> None:
        for run in self._flat.runs:
            if extras.noise is not None and run.stop > extras.noisy_from:
                start = max(run.start, extras.noisy_from)
                extras.noise.add_to(out[start : run.stop], scales[run.group], start)

    def _add_decay(self, out: Tensor, scales: Sequence[float], decays: Sequence[float]) -> None:
        """The decay is part of the objective, so its gradient is compressed with the rest."""
        for run in self._flat.runs:
            if decays[run.group]:
                stretch = slice(run.start, run.stop)
                out[stretch].add_(self._flat.x[stretch], alpha=scales[run.group] * decays[run.group])

    def vectors(self) -> dict[str, Tensor]:
        """Return what is kept from step to step, float[d] each, by name."""
        return {}

    def reset(self) -> None:
        """Forget what was gathered along a segment that was rolled back."""


class _Gathered(Gradient):
    """A direction with a vector of its own, float[d], in at least single precision."""

    def __init__(self, flat: FlatParameters) -> None:
        super().__init__(flat)
        self.vector = torch.zeros(flat.d, dtype=torch.promote_types(flat.x.dtype, torch.float32), device=flat.x.device)
        self._views = flat.views(self.vector)
        self.started = False

    def reset(self) -> None:
        self.vector.zero_()
        self.started = False

    def _add_vector(self, out: Tensor, scales: Sequence[float], factor: float = 1.0) -> None:
        for view in self._flat.frozen(self.vector):
            view.zero_()
        for run in self._flat.runs:
            stretch = slice(run.start, run.stop)
            out[stretch].add_(self.vector[stretch], alpha=factor * scales[run.group])


class Momentum(_Gathered):
    """m <- beta m + u on each worker, before compression; u = m, or with `nesterov` beta m + u.

    With error feedback y then moves as in SGD with momentum on the mean gradient, whatever the compressor: the scheme
    of Zheng, Huang and Kwok 2019 (dist-EF-SGDM). `averaging` has m <- beta m + (1 - beta) u instead, beginning
    with the first u: with memory="ef21" that is EF21-SGDM of Fatkhullin, Tyurin and Richtarik 2023.
    """

    def __init__(self, flat: FlatParameters, beta: float, *, nesterov: bool, averaging: bool) -> None:
        super().__init__(flat)
        self._beta, self._nesterov, self._averaging = beta, nesterov, averaging

    def add_to(self, out: Tensor, views: Sequence[Tensor], scales: Sequence[float], extras: Extras) -> None:
        share = 1 - self._beta if self._averaging and self.started else 1.0
        self.started = True
        self.vector.mul_(self._beta)
        super().add_to(self.vector, self._views, [share] * len(scales), extras)
        if self._nesterov:
            super().add_to(out, views, [share * scale for scale in scales], extras)
        self._add_vector(out, scales, self._beta if self._nesterov else 1.0)

    def vectors(self) -> dict[str, Tensor]:
        return {"momentum": self.vector}


class Storm(_Gathered):
    """STORM (Cutkosky and Orabona 2019): d_t = g(x_t) + (1 - a) (d_{t-1} - g(x_{t-1})), both g of the same examples.

    So a step needs a closure that computes loss and gradients, and calls it twice, at x_t and at x_{t-1}. g has weight
    decay in it; xi is added to d, not gathered. With memory="ef21" it is EF21-STORM of Fatkhullin et al. 2023.
    """

    def __init__(self, flat: FlatParameters, a: float) -> None:
        super().__init__(flat)
        self._keep = 1 - a
        self._previous = flat.x.clone()

    def evaluate(self, closure: Callable[[], T] | None, decays: Sequence[float]) -> T | None:
        if closure is None:
            raise ValueError("storm takes the gradient at two points, so step needs a closure: opt.step(closure)")
        loss = super().evaluate(closure, decays)
        here = self._flat.x.clone()
        if self.started:
            gradients = [None if p.grad is None else p.grad.clone() for p in self._flat.parameters]
            self._flat.x.copy_(self._previous)
            for p in self._flat.parameters:
                p.grad = None  # else a closure that does not clear gradients would add to them
            try:
                super().evaluate(closure, decays)
                minus = [-1.0] * len(decays)
                self._add_gradients(self._views, minus)
                self._add_decay(self.vector, minus, decays)
            finally:
                self._flat.x.copy_(here)
                for p, gradient in zip(self._flat.parameters, gradients, strict=True):
                    p.grad = gradient
            self.vector.mul_(self._keep)
        self._previous.copy_(here)
        self.started = True
        return loss

    def add_to(self, out: Tensor, views: Sequence[Tensor], scales: Sequence[float], extras: Extras) -> None:
        ones = [1.0] * len(scales)
        self._add_gradients(self._views, ones)
        self._add_decay(self.vector, ones, extras.decays)
        self._add_vector(out, scales)
        self._add_noise(out, scales, extras)

    def vectors(self) -> dict[str, Tensor]:
        return {"storm": self.vector, "storm_previous": self._previous}


def make_direction(flat: FlatParameters, momentum: float, nesterov: bool, storm: float | None, memory: str) -> Gradient:
    """Return the direction asked for. Raises ValueError for values out of range and for what does not go together."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if nesterov and not momentum:
        raise ValueError("nesterov needs a momentum above 0")
    if storm is not None and not 0 < storm <= 1:
        raise ValueError(f"storm, the weight a of a new gradient, must be in (0, 1], got {storm}")
    if storm is not None and momentum:
        raise ValueError(f"storm is a momentum with a correction; it goes with momentum=0, got {momentum}")
    if memory == "gradient" and (momentum or storm is not None):
        raise ValueError('memory="gradient" leaves no gradient to make a momentum or storm of; use memory="buffer"')
    if storm is not None:
        return Storm(flat, storm)
    if momentum:
        return Momentum(flat, momentum, nesterov=nesterov, averaging=memory == "ef21")
    return Gradient(flat)
