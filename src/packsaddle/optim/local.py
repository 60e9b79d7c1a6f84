"""Local steps between exchanges: Local SGD, with compression and error feedback where workers meet."""

from collections.abc import Sequence

from torch import Tensor

from packsaddle.optim.gradient import Extras, Gradient
from packsaddle.optim.layout import FlatParameters
from packsaddle.optim.memory import ErrorMemory
from packsaddle.optim.stages.nonfinite import Guard


class LocalSteps:
    """Each worker moves its own x for `every` steps; then all send C(e + x_synced - x) and meet at x_synced - the mean.

    That is Qsparse-local-SGD (Basu et al. 2019, Algorithm 1). Raises ValueError if `every` is below 1, and for 16-bit
    parameters, which would lose what local steps add up to.
    """

    def __init__(self, flat: FlatParameters, every: int) -> None:
        if every < 1:
            raise ValueError(f"local_steps must be 1 or more steps, got {every}")
        if every > 1 and flat.x.element_size() < 4:
            raise ValueError(f"local_steps above 1 need parameters of 32 or 64 bits, got {flat.x.dtype}")
        self._flat, self.every = flat, every
        self.synced = flat.x.clone() if every > 1 else flat.x  # where all workers last met, float[d]
        self._x = flat.shaped(flat.x)

    def correct(
        self, memory: ErrorMemory, direction: Gradient, lrs: Sequence[float], extras: Extras, step: int, guard: Guard
    ) -> Tensor | None:
        """Try one step; return what is to be exchanged, float[d] (line 10), or None if it is not time for it.

        Between exchanges x only moves against a gradient that `guard` finds to be finite, this worker's own matter.
        """
        if self.every == 1:
            return memory.correct(direction, lrs, extras)
        if step % self.every == 0:
            self.meet()  # weights may have been loaded since
        usable = guard.passes(direction, step)
        if usable:
            self._flat.change(lambda x: direction.add(self._x, self._x, [-lr for lr in lrs], extras))
        direction.settle(taken=usable)
        if (step + 1) % self.every:
            return None
        v = memory.correct_by(self.drift())
        self._flat.x.copy_(self.synced)
        return v

    def settle(self, direction: Gradient, *, taken: bool) -> None:
        """End a step with an exchange, which was taken or not."""
        if self.every == 1:
            direction.settle(taken=taken)
        else:
            self.meet()

    def drift(self) -> Tensor:
        """Return x_synced - x, float[d]: what this worker has moved by itself."""
        return self.synced - self._flat.x

    def add_drift(self, pending: Tensor) -> Tensor:
        """Return `pending`, float[d], plus what this worker has moved by itself; not a copy if every step exchanges."""
        return pending if self.every == 1 else pending + self.drift()

    def meet(self) -> None:
        """Take x as it is for where all workers have met."""
        if self.synced is not self._flat.x:
            self.synced.copy_(self._flat.x)

    def vectors(self) -> dict[str, Tensor]:
        """Return what is kept from step to step, float[d], by name."""
        return {} if self.synced is self._flat.x else {"synced": self.synced}
