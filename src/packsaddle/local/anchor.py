"""The anchor of a fragment (parameters exchanged together), and changes of the parameters x relative to it.

The anchor a, float[n] in at least float32, is the values of the parameters on which all workers last agreed. After an
exchange a worker continues from its start point: a, or a - e with `keep_unsent`, where e is its error memory. Its local
update is start - x.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.sharding import local_part
from packsaddle.feedback.memory import ErrorMemory, Update
from packsaddle.feedback.noise import GaussianNoise
from packsaddle.feedback.slices import Shaped, Slice


class Anchor:
    """The anchor a, float[n], and the parameters x of this worker. With `keeps` its start point is a - e, else a."""

    def __init__(self, layout: Slice, parameters: Sequence[Tensor], memory: ErrorMemory, *, keeps: bool) -> None:
        a = layout.zeros()
        self.flat, self.views = a.flat, a.views
        self.leaves = [nn.Parameter(view) for view in self.views]  # the anchor as parameters, for an outer optimizer
        self.layout, self.keeps = layout, keeps
        self._parameters, self._memory = parameters, memory
        # float[n], the local update that start - x misses, because only the start moved or x was rounded; None: 0
        self.owed: Tensor | None = None
        self.set_from_parameters()

    def tensors(self) -> list[Tensor]:
        return [local_part(p) for p in self._parameters]

    def starts(self) -> list[Tensor]:
        """Return the start point of x after an exchange, one tensor per parameter: a, or a - e; may be views of a."""
        return self.layout.views(self.flat - self._memory.vector) if self.keeps else self.views

    def copy_starts(self) -> list[Tensor]:
        """Return a copy of the start point, one tensor per parameter, with the parameters' dtypes and device."""
        return [start.to(x, copy=True) for start, x in zip(self.starts(), self.tensors(), strict=True)]

    def set_from_parameters(self) -> None:
        for a, x in zip(self.views, self.tensors(), strict=True):
            a.copy_(x)

    def apply_mean(self, mean: Tensor | Averaged, outer: Optimizer | None, frozen: Sequence[str] | None) -> None:
        """Apply the mean update: a <- a - mean, or a step of `outer` with the mean, float[n], as gradient (line 11).

        A frozen parameter's anchor stays: neither an outer momentum nor a decoded message that is not exactly zero
        moves it. `frozen` are the names of frozen parameters, equal on all workers. None: they differ between workers,
        and `outer` leaves out the parameters whose mean is zero.
        """
        stays = [name in (frozen or ()) for name in self.layout.names]
        before = [(a, a.clone()) for a, is_frozen in zip(self.views, stays, strict=True) if is_frozen]
        if isinstance(mean, Averaged):
            self._memory.apply_mean(self.flat, mean)
        elif outer is None:
            self.flat.sub_(mean)
        else:
            grads = self.layout.views(mean)
            left_out = [not grad.any() for grad in grads] if frozen is None else stays
            for leaf, grad, is_out in zip(self.leaves, grads, left_out, strict=True):
                leaf.grad = None if is_out else grad
            outer.step()
            for leaf in self.leaves:
                leaf.grad = None
        for a, old in before:
            a.copy_(old)

    def move(self, before: Sequence[Tensor], blend: float | None = None) -> None:
        """Move the parameters x after the anchor changed: x <- start + (x - before), with one tensor of `before` per
        parameter, or x <- start if it is empty. With `blend`, x <- (1 - blend) start + blend x."""
        if not before:
            self.move_to_start()
            return
        where = zip(self.tensors(), self.starts(), before, strict=True)
        starts = ((x, a.to(x.device, x.dtype).to(wide_dtype(x)), s) for x, a, s in where)
        if blend is None:
            self._set((x.to(start.dtype) - s).add_(start) for x, start, s in starts)
        else:
            self._set(torch.lerp(start, x.to(start.dtype), blend) for x, start, _ in starts)

    def move_to_start(self) -> None:
        """Reset the parameters x to this worker's start point, and clear `owed`."""
        self.owed = None
        if not self.keeps:
            self.set_parameters(self.views)
            return
        where = zip(self.layout.places, self.tensors(), self.views, self._memory.views, strict=True)
        for place, x, a, e in where:
            if not place.is_frozen and x.dtype == a.dtype and x.device == a.device:
                torch.sub(a, e, out=x)
            elif not place.is_frozen:
                x.copy_(a - e)

    def move_to_anchor(self) -> None:
        """Set x, except frozen parameters, from its start point to the anchor a; `owed` records the change, so that no
        update is lost."""
        before = [x.clone() for x in self.tensors()]
        self.set_parameters(self.views)
        if self.keeps:
            change = self.layout.zeros()
            for view, x, old in zip(change.views, self.tensors(), before, strict=True):
                view.copy_(x).sub_(old.to(view))
            self.owed = change.flat

    def set_parameters(self, values: Sequence[Tensor]) -> None:
        for place, x, value in zip(self.layout.places, self.tensors(), values, strict=True):
            if not place.is_frozen:
                x.copy_(value)

    @property
    def is_rounded(self) -> bool:
        """True if a parameter's dtype is narrower than the anchor's, so that its start point is rounded."""
        return any(x.dtype != a.dtype for x, a in zip(self.tensors(), self.views, strict=True))

    @contextmanager
    def fixed_update(self) -> Iterator[None]:
        """Within the context the error memory e may change: the start point a - e moves, but x and the local update do
        not, since `owed` records the difference."""
        before = self._moving_start() if self.keeps else None
        yield
        if before is not None and (change := before.sub_(self._moving_start())).any():
            self.owed = change if self.owed is None else self.owed.add_(change)

    def _moving_start(self) -> Tensor:
        """Return the part of the start point that e moves, float[n]: -e, or a - e if it is rounded to x's dtype."""
        if not self.is_rounded:
            return -self._memory.vector
        found = self.layout.zeros()
        for view, x, start in zip(found.views, self.tensors(), self.starts(), strict=True):
            view.copy_(start.to(x.dtype))
        return found.flat

    def subtract_owed(self) -> None:
        """Subtract `owed`, by which the start point moved without x, from x; `owed` keeps the rounding error of x."""
        if self.owed is None:
            return
        pairs, self.owed = zip(self.tensors(), self.layout.views(self.owed), strict=True), None
        self._set(x.to(wide_dtype(x)) - part.to(x.device, wide_dtype(x)) for x, part in pairs)

    def _set(self, values: Iterable[Tensor]) -> None:
        """Set parameters, except frozen ones, to `values`, at least float32; add their rounding error to `owed`."""
        xs = self.tensors()
        rounds = any(x.dtype != wide_dtype(x) for x in xs)
        if rounds and self.owed is None:
            self.owed = self.layout.zeros().flat
        owed = self.layout.views(self.owed) if rounds and self.owed is not None else [None] * len(xs)
        for place, x, value, lost in zip(self.layout.places, xs, values, owed, strict=True):
            if not place.is_frozen:
                x.copy_(value)
                if lost is not None:
                    lost.add_((x.to(value.dtype) - value).to(lost))

    def add_local_update(self, out: Tensor, starts: Sequence[Tensor] | None = None) -> Tensor:
        """Add the local update start - x + owed to out, float[n], and return out; `starts` replace the start points."""
        starts = self.starts() if starts is None else starts
        for x, start, view in zip(self.tensors(), starts, self.layout.views(out), strict=True):
            view.add_(start.to(x).to(view) - x.to(view))
        return out if self.owed is None else out.add_(self.owed)


@dataclass(frozen=True)
class PseudoGradient(Update):
    """The input of an error memory, float[n]: the local update start - x of some parameters, plus `Anchor.owed` and
    noise. For a 16-bit x the local update is relative to the start point rounded to 16 bits."""

    of: Anchor
    decay: float
    noise: GaussianNoise | None

    def add(self, base: Shaped, out: Shaped) -> None:
        """Set out to decay base + start - x + owed + noise, float[n]; base, the error memory, is another tensor."""
        share, xs = self.decay, self.of.tensors()
        # Compute v = decay e + start - x. With start = a - e this is (a - x) + (decay - 1) e.
        starts: Sequence[Tensor] = self.of.views
        if self.of.keeps and self.of.is_rounded:  # to x's dtype, so e cannot be combined with the start point
            starts = self.of.starts()
        elif self.of.keeps:
            share -= 1.0
        for x, start, v in zip(xs, starts, out.views, strict=True):
            torch.sub(start.to(x.dtype).to(start.dtype), x.to(start.device), out=v)
        if share:
            out.flat.add_(base.flat, alpha=share)
        if self.of.owed is not None:
            out.flat.add_(self.of.owed)
        if self.noise is not None:
            self.of.layout.add_noise(out.flat, self.noise)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype, at least float32, in which x is computed before rounding to its own dtype."""
    return torch.promote_types(x.dtype, torch.float32)
