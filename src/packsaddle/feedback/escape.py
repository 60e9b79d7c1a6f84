"""The escape check (lines 4-8 of Algorithm 1): undo the steps since the last check unless they decreased the loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.errors import check_integers, check_positive
from packsaddle.feedback.slices import Slice
from packsaddle.feedback.state import ANY, Value, Vector, attribute
from packsaddle.numerics.devices import wide
from packsaddle.numerics.sketches import NormSketch


@dataclass(frozen=True)
class EscapeRule:
    """Settings of the escape check (lines 4-8 of Algorithm 1), which rolls the parameters back to the start point of a
    segment of steps unless the segment decreased the loss. The settings determine when the check runs, and at which
    points it evaluates the loss."""

    interval: int  # maximum length I of a segment in steps, at least 1; local updates count rounds
    radius: float  # maximum Euclidean distance R > 0 from the start point of the segment
    # "x" accepts the segment if f(x_t) < f(x_t'), where f is the loss, x_t the current point and x_t' the start point,
    # as in line 6 of Algorithm 1. "y" accepts it if f(y_t) < f(x_t'), where y_t is x_t minus the mean unsent update
    # eta e_t. If a segment is accepted, training continues at y_t. "y" needs an uncompressed all-reduce in each check.
    compare: Literal["x", "y"] = field(default="x", kw_only=True)
    # Steps between two tests of the distance. The interval is tested at each step.
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_integers(1, **{f"{name} of Escape": getattr(self, name) for name in ("interval", "every")})
        check_positive(**{"radius of Escape": self.radius})
        if self.compare not in ("x", "y"):
            raise ValueError(f'compare of Escape must be "x" or "y", got {self.compare!r}')


@dataclass(frozen=True)
class Escape(EscapeRule):
    """The escape check (lines 4-8 of Algorithm 1): after a segment of steps, accept the parameters or roll them back.

    A segment ends when it exceeds `interval` steps, or a distance of `radius` from its start point x_t'. The current
    point is x_t, and eta e_t is the mean over workers of their unsent updates.

    Args:
        interval: maximum length I of a segment, at least 1. Like `every`, it counts steps, or rounds in local updates.
        radius: maximum Euclidean distance R > 0 from the start point of the segment.
        objective: a function that returns this worker's f_i(x) at the parameters' current values, as a float or 0-dim
            tensor; f = mean_i f_i is computed here. It is called under no_grad, at x_t and at x_t', and should be the
            same function both times.
        compare: "x" accepts if f(x_t) < f(x_t'), the loss at the start point (line 6 of Algorithm 1). "y" accepts if
            f(x_t - eta e_t) < f(x_t'), where x_t - eta e_t is the point at which training continues if a segment is
            accepted. It needs an uncompressed all-reduce in each check.
        every: steps between tests of the distance; the interval is tested at each step.
        sketch: estimator of the distance if there are several workers.

    Raises ValueError for a value that is out of range.

    >>> import torch
    >>> from packsaddle import CompressedSGD, Escape, TopK
    >>> x = torch.nn.Parameter(torch.zeros(64, 64))
    >>> escape = Escape(interval=100, radius=1.0, objective=lambda: x.square().sum())
    >>> opt = CompressedSGD([x], 0.1, TopK(0.1), noise=0.01, escape=escape)
    >>> opt.resets
    []
    """

    objective: Callable[[], float | Tensor] = field(repr=False)
    sketch: NormSketch = field(default_factory=NormSketch)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.objective):
            raise ValueError(f"objective of Escape must be callable, got {self.objective!r}")


@dataclass(frozen=True)
class Reset:
    """Record of an escape check that ended a segment of steps (lines 5-8 of Algorithm 1): its reason, the compared
    losses and the decision to keep or to roll back the parameters."""

    step: int  # step t at which the check fired, and at which the next segment starts
    reason: Literal["interval", "radius"]  # the limit exceeded: steps since the start point, or distance from it
    distance: float | None  # ||x_t' - y_t||, distance from the start point, may be an estimate; None: not measured
    candidate: float  # loss f(x_t), or f(y_t) with compare="y"
    start_loss: float  # loss f(x_t') at the start point
    committed: bool  # True: x was set to y_t; False: x was rolled back to the start point x_t'


class EscapeCheck:
    """Runs the escape check on x, float[d], i.e. on the parameters `of` as one vector. Stores the start point of the
    segment, i.e. of the steps since the last check.

    The workers' unsent updates differ only in the compressed coordinates, or in all coordinates if `all_differ` is
    True.
    """

    def __init__(
        self, rule: Escape, of: Slice, x: Tensor, channel: Communicator, seed: int, *, all_differ: bool = False
    ) -> None:
        self.start = x.clone()  # the start point x_t', float[d]
        self.start_step = 0  # t', the step at the start point
        self._of, self._x, self._averaged = of, x, of.d if all_differ else of.compressed_d
        self._rule, self._channel, self._seed = rule, channel, seed

    def begin(self) -> None:
        """Set the start point, to which a check may roll the parameters back, to the current parameters. Call before
        the first step, since parameters may have been loaded after construction."""
        self.start.copy_(self._x)

    def run(self, step: int, pending: Tensor) -> tuple[Reset | None, Tensor | None]:
        """Run the escape check at step t (lines 5-7 of Algorithm 1). `pending` is this worker's unsent update,
        float[d].

        Returns a pair. The first item is a `Reset`, or None if the check does not fire. The second is the rounding
        error of the parameters x, float[d], or None if it is zero; only 16-bit parameters have one. If the check fires,
        x is replaced, and the caller must set `pending` to the rounding error.
        """
        distance = self._distance(pending) if step % self._rule.every == 0 else None
        late = step - self.start_step > self._rule.interval
        if not late and (distance is None or distance <= self._rule.radius):
            return None, None
        candidate, start_loss, y = self._compare(pending)
        self.start.copy_(self._x)
        self.start_step = step
        lost = None if y is None or y.dtype == self._x.dtype else self._x - y
        return Reset(step, "interval" if late else "radius", distance, candidate, start_loss, y is not None), lost

    def _distance(self, pending: Tensor) -> float:
        """Return the distance from the start point of the segment to y_t = x_t - eta e_t, where x_t are the current
        parameters and eta e_t is the mean over workers of their unsent updates `pending`. With several workers, the
        distance is estimated by sketches."""
        moved = pending.sub(self._x).add_(self.start)
        if self._channel.group.size == 1:
            return float(torch.linalg.vector_norm(moved, dtype=wide(moved.device)))
        # Use a new hash after each reset, since x depends on the results of earlier sketches.
        sketch = self._rule.sketch.encode(moved, seed=self._seed, step=self.start_step)
        return self._rule.sketch.norm(self._channel.mean(sketch, "escape norm"))

    def _compare(self, pending: Tensor) -> tuple[float, float, Tensor | None]:
        """Accept the current point if its loss is below the loss at the start point x_t', and roll back to x_t'
        otherwise (line 6 of Algorithm 1). If it is accepted, x is set to y_t = x_t - eta e_t, where x_t is the current
        point and eta e_t is the mean over workers of their unsent updates `pending`.

        Returns both losses, and y_t, float[d], or None if the point was not accepted. If the objective raises an
        exception, x is unchanged.
        """
        x, here = self._x, self._x.clone()
        try:
            y = self._corrected(here, pending) if self._rule.compare == "y" else None
            if y is not None:
                x.copy_(y)
            candidate = self._objective()
            x.copy_(self.start)
            start_loss = self._objective()
        except BaseException:
            x.copy_(here)
            raise
        if not candidate < start_loss:
            return candidate, start_loss, None
        y = self._corrected(here, pending) if y is None else y
        # e_t may have a NaN although f(x_t) is finite. y is identical on all workers, so all make the same decision.
        if not torch.isfinite(y).all():
            return candidate, start_loss, None
        x.copy_(y)
        return candidate, start_loss, y

    def _corrected(self, x: Tensor, pending: Tensor) -> Tensor:
        """Return y_t = x_t - eta e_t, float[d]. `x` are the parameters x_t, and eta e_t is the mean over workers of
        their unsent updates `pending`, computed by an uncompressed all-reduce."""
        y, n = x.to(pending.dtype, copy=True), self._averaged
        y[:n].sub_(self._channel.mean(pending[:n].clone(), "reset"))
        return y.sub_(torch.nn.functional.pad(pending[n:], (n, 0)))

    def _objective(self) -> float:
        """Return the loss f at the parameters' current values, i.e. the mean of the workers' objectives f_i;
        collective. Returns inf if the mean is NaN."""
        with torch.no_grad():
            value = torch.as_tensor(self._rule.objective(), dtype=wide(self._x.device), device=self._x.device).detach()
        if value.numel() != 1:
            raise ValueError(f"objective of Escape must return one number, got shape {tuple(value.shape)}")
        mean = float(self._channel.mean(value.reshape(1).clone(), "objective"))
        return math.inf if math.isnan(mean) else mean

    def fields(self) -> tuple[Vector, Value]:
        start = self._of.by_name(self.start)
        shapes = {name: view.shape for name, view in start.items()}
        step = attribute(("escape", "step"), self, "start_step", int)
        return Vector(("escape", "start", ANY), shapes, lambda: start), step
