"""Local steps between exchanges: Local SGD, with compression and error feedback where workers meet."""

from collections.abc import Sequence

from torch import Tensor

from packsaddle.direction import Extras, Gradient
from packsaddle.feedback import ErrorMemory
from packsaddle.flat import FlatParameters


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

    def correct(
        self, memory: ErrorMemory, direction: Gradient, lrs: Sequence[float], extras: Extras, step: int
    ) -> Tensor | None:
        """Do one step; return what is to be exchanged, float[d] (line 10), or None if it is not time for it."""
        if self.every == 1:
            return memory.correct(direction, lrs, extras)
        if step % self.every == 0:
            self.settle()  # all have met; weights may have been loaded since
        views = self._flat.views(self._flat.x)
        self._flat.change(lambda x: direction.add_to(x, views, [-lr for lr in lrs], extras))
        if (step + 1) % self.every:
            return None
        memory.add(self.drift())
        self._flat.x.copy_(self.synced)
        return memory.vector

    def drift(self) -> Tensor:
        """Return x_synced - x, float[d]: what this worker has moved by itself."""
        return self.synced - self._flat.x

    def add_drift(self, pending: Tensor) -> Tensor:
        """Return `pending`, float[d], plus what this worker has moved by itself; not a copy if every step exchanges."""
        return pending if self.every == 1 else pending + self.drift()

    def settle(self) -> None:
        """Take x as it is for where all workers have met."""
        if self.synced is not self._flat.x:
            self.synced.copy_(self._flat.x)

    def vectors(self) -> dict[str, Tensor]:
        """Return what is kept from step to step, float[d], by name."""
        return {} if self.synced is self._flat.x else {"synced": self.synced}
