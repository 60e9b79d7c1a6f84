"""The escape check (lines 4-8 of Algorithm 1): roll back the steps since the last check if they did not decrease the
loss.
"""

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
    """Settings of the escape check (lines 4-8 of Algorithm 1), without the objective.

    A check ends a segment of steps. If the segment did not decrease the loss, the parameters are rolled back to its
    start point. The settings determine when a check runs, and at which points it evaluates the loss.
    """

    interval: int  # maximum length I of a segment, at least 1; in steps, or with local updates in rounds
    radius: float  # maximum Euclidean distance R > 0 between the start point of a segment and its end
    # "x" accepts the segment if f(x_t) < f(x_t'), where f is the loss, x_t the current point and x_t' the start point,
    # as in line 6 of Algorithm 1. "y" accepts it if f(y_t) < f(x_t'), where y_t is x_t minus the mean unsent update
    # eta e_t. If a segment is accepted, training continues at y_t. "y" needs an uncompressed all-reduce in each check.
    compare: Literal["x", "y"] = field(default="x", kw_only=True)
    # Number of steps between two tests of the distance. The length of the segment is tested in every step.
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_integers(1, **{f"{name} of Escape": getattr(self, name) for name in ("interval", "every")})
        check_positive(**{"radius of Escape": self.radius})
        if self.compare not in ("x", "y"):
            raise ValueError(f'compare of Escape must be "x" or "y", got {self.compare!r}')


@dataclass(frozen=True)
class Escape(EscapeRule):
    """The escape check (lines 4-8 of Algorithm 1): after a segment of steps, accept the parameters or roll them back.

    A segment ends when its length exceeds `interval` steps, or when the distance from its start point x_t' exceeds
    `radius`. The current point is x_t, and eta e_t is the mean over workers of their unsent updates.

    Args:
        interval: maximum length I of a segment, at least 1. Like `every`, it counts steps, or rounds in local updates.
        radius: maximum Euclidean distance R > 0 from the start point of the segment.
        objective: a function that returns this worker's f_i(x) at the parameters' current values, as a float or 0-dim
            tensor; f = mean_i f_i is computed here. It is called under no_grad, at x_t and at x_t', and should be the
            same function both times.
        compare: "x" accepts if f(x_t) < f(x_t'), the loss at the start point (line 6 of Algorithm 1). "y" accepts if
            f(x_t - eta e_t) < f(x_t'), where x_t - eta e_t is the point at which training continues if a segment is
            accepted. It needs an uncompressed all-reduce in each check.
        every: the number of steps between two tests of the distance. The length of the segment is tested in every step.
        sketch: the sketch by which several workers estimate the distance; one worker computes it exactly.

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
    """The record of an escape check (lines 5-8 of Algorithm 1).

    It has the reason for which the check ended a segment of steps, the compared losses, and the decision to accept the
    parameters or to roll them back. x_t are the parameters at the check, x_t' is the start point of the segment, and
    y_t is x_t minus the mean unsent update.
    """

    step: int  # index t of the step at which the check ran, and at which the next segment starts
    reason: Literal["interval", "radius"]  # exceeded limit: the segment's length, or the distance from its start
    distance: float | None  # distance ||x_t' - y_t||, with several workers an estimate; None: not measured in this step
    candidate: float  # loss at the current point: f(x_t) with compare="x", f(y_t) with compare="y"
    start_loss: float  # loss f(x_t') at the start point
    committed: bool  # True: accepted, and x was set to y_t; False: x was rolled back to x_t'


class EscapeCheck:
    """Runs the escape check on the parameters x, float[d], and stores the start point of the current segment.

    Args:
        rule: the settings and the objective.
        of: the slice, i.e. the description of x as one vector of parameters.
        x: the parameters, which are read and changed in place.
        channel: the communicator between workers.
        seed: the seed of the sketches, identical on all workers.
        all_differ: False if the workers' unsent updates differ only in the compressed coordinates, True if they may
            differ in all.
    """

    def __init__(
        self, rule: Escape, of: Slice, x: Tensor, channel: Communicator, seed: int, *, all_differ: bool = False
    ) -> None:
        self.start = x.clone()  # x_t', the parameters at the start of the current segment, float[d]
        self.start_step = 0  # t', the step at the start point
        self._of, self._x, self._averaged = of, x, of.d if all_differ else of.compressed_d
        self._rule, self._channel, self._seed = rule, channel, seed

    def begin(self) -> None:
        """Set the start point of the segment to the current parameters. A later check may roll the parameters back to
        it.

        Call before the first step, since parameters may have been loaded after this object was made.
        """
        self.start.copy_(self._x)

    def run(self, step: int, pending: Tensor) -> tuple[Reset | None, Tensor | None]:
        """End the segment at step t, if it exceeds one of its limits, and accept or roll back its steps (lines 5-7 of
        Algorithm 1); collective.

        `pending` is this worker's unsent update, float[d].

        Returns a pair. The first item is a `Reset`, or None if the segment continues. The second is the rounding error
        of the parameters x, float[d], or None if x is in at least float32. If the segment ends, x is changed in place,
        and the caller must replace the unsent update by the rounding error.
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
        """Return the distance between the start point of the segment and y_t = x_t - eta e_t; collective.

        x_t are the current parameters, and eta e_t is the mean over workers of their unsent updates `pending`. Several
        workers estimate the distance by sketches.
        """
        moved = pending.sub(self._x).add_(self.start)
        if self._channel.group.size == 1:
            return float(torch.linalg.vector_norm(moved, dtype=wide(moved.device)))
        # Use a new hash function for the sketches of each segment, since x depends on the results of earlier sketches.
        sketch = self._rule.sketch.encode(moved, seed=self._seed, step=self.start_step)
        return self._rule.sketch.norm(self._channel.mean(sketch, "escape norm"))

    def _compare(self, pending: Tensor) -> tuple[float, float, Tensor | None]:
        """Accept the current point x_t if its loss is below the loss at the start point x_t', and otherwise roll back
        to x_t' (line 6 of Algorithm 1); collective.

        If the point is accepted, x is set to y_t = x_t - eta e_t, where eta e_t is the mean over workers of their
        unsent updates `pending`. With compare="y", the loss at y_t is compared instead of that at x_t.

        Returns the loss at the current point, the loss at the start point, and y_t, float[d]. The last is None if the
        point was rolled back. If the objective raises an exception, x is unchanged.
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
        # The point y_t may be non-finite although f(x_t) is finite, since e_t may have a NaN. y_t is identical on all
        # workers, so all make the same decision.
        if not torch.isfinite(y).all():
            return candidate, start_loss, None
        x.copy_(y)
        return candidate, start_loss, y

    def _corrected(self, x: Tensor, pending: Tensor) -> Tensor:
        """Return y_t = x_t - eta e_t, float[d]; collective.

        `x` are the parameters x_t, and eta e_t is the mean over workers of their unsent updates `pending`. It is
        computed by an uncompressed all-reduce.
        """
        y, n = x.to(pending.dtype, copy=True), self._averaged
        y[:n].sub_(self._channel.mean(pending[:n].clone(), "reset"))
        y[n:].sub_(pending[n:])
        return y

    def _objective(self) -> float:
        """Return the loss f at the current values of the parameters, i.e. the mean of the workers' objectives f_i;
        collective.

        Returns inf if the mean is NaN.
        """
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
