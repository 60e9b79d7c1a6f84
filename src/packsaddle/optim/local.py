"""Local steps between exchanges: Local SGD, with compression and error feedback where workers meet."""

from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.optim.gradient import Gradient, GradientUpdate
from packsaddle.optim.layout import FlatParameters, Shaped
from packsaddle.optim.memory import Update
from packsaddle.optim.stages.nonfinite import Guard


@dataclass(frozen=True)
class Displacement:
    """x_synced - x, float[d], as the update that is exchanged: what a worker has moved by itself, the other way."""

    moved: Tensor

    def add(self, base: Shaped, out: Shaped) -> None:
        """Set out to base + moved, both float[d]."""
        torch.add(base.flat, self.moved, out=out.flat)

    def perturb(self, out: Tensor) -> None:
        """Add nothing: noise and decay were in the local steps."""


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

    def exchanged(self, u: GradientUpdate, step: int, guard: Guard) -> Update | None:
        """Return what is to be exchanged in this step: u itself if every step exchanges; None between exchanges.

        Otherwise move x against u first. `guard` sees that u is finite, which is this worker's own matter.
        """
        if self.every == 1:
            return u
        if step % self.every == 0:
            self.meet()  # weights may have been loaded since
        usable = guard.passes(u.direction, step)
        if usable:
            self._flat.change(lambda x: u.negated().add(self._x, self._x))
        u.direction.settle(taken=usable)
        if (step + 1) % self.every:
            return None
        displacement = Displacement(self.drift())
        self._flat.x.copy_(self.synced)
        return displacement

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
