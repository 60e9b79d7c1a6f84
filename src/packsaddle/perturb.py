"""How the noise xi_t gets to x: through the error memory, or, where that has the same law, only when x receives it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packsaddle.average import AllReduce, Averaged, Protocol
from packsaddle.compress import RandomK
from packsaddle.feedback import ErrorMemory
from packsaddle.flat import FlatParameters
from packsaddle.noise import Noise, OutstandingNoise, Perturbation


class Perturber:
    """Line 9 of Algorithm 1 for an optimizer, and the noise it leaves outstanding if `lazy`.

    Raises ValueError if `lazy` and the protocol is not RandomK by all-reduce, or error feedback not `plain`: only there
    do all workers keep the same coordinates of a vector that is never looked at otherwise, so that k Gaussians a step
    do for d.
    """

    def __init__(
        self,
        noise: float | Callable[[int], float],
        lazy: bool | None,
        *,
        seed: int,
        flat: FlatParameters,
        protocol: Protocol,
        escape: bool,
        plain: bool,
    ) -> None:
        self._perturbation = Perturbation(noise)
        self._seed, self._flat, self._d = seed, flat, flat.compressed_d
        self._outstanding: OutstandingNoise | None = None
        self.grown = 0.0  # the standard deviation, in units of x, of the noise that the last step left outstanding
        compressor = protocol.compressor
        if not plain:
            if lazy:
                raise ValueError(
                    "lazy_noise goes with plain error feedback alone: no ef21, momentum, storm or local_steps"
                )
        elif not (isinstance(protocol, AllReduce) and isinstance(compressor, RandomK)):
            if lazy:
                raise ValueError(
                    f"lazy_noise needs RandomK by all-reduce, got {compressor!r} by {type(protocol).__name__}"
                )
        elif noise != 0 and self._d and (not escape if lazy is None else lazy):
            self._outstanding = OutstandingNoise(compressor.grid(self._d)[0], compressor.block(self._d), flat.x.device)

    @property
    def lazy(self) -> bool:
        """Whether noise may be left outstanding."""
        return self._outstanding is not None

    def draw(self, memory: ErrorMemory, lrs: Sequence[float], step: int) -> tuple[Noise | None, int]:
        """Return xi_t (None: zero), and how many coordinates at the start leave theirs outstanding."""
        xi = self._perturbation.at(seed=self._seed, step=step)
        self.grown = 0.0
        if self._outstanding is None:
            return xi, 0
        if len(set(lrs)) == 1 and not self._flat.has_frozen:
            self.grown = lrs[0] * xi.std if xi else 0.0
            return xi, self._d
        # Cells do not end where parameters do, so what is outstanding goes the usual way.
        self._settle(self._outstanding, memory, step)
        return xi, 0

    def _settle(self, outstanding: OutstandingNoise, memory: ErrorMemory, step: int) -> None:
        """Draw all that is outstanding into the error memory, where eager noise would be."""
        if outstanding.anything:
            memory.add(outstanding.draw(memory.vector[: self._d], seed=self._seed, step=step))
            outstanding.clear()

    def join(self, g: Averaged, unit: float, step: int) -> None:
        """Leave this step's noise outstanding where it is to be; add that of the cells that were exchanged to what all
        apply, in units of `unit`."""
        if self._outstanding is None:
            return
        self._outstanding.grow(self.grown)
        if self._outstanding.anything:
            message = g.mean[0].message
            values = message.parts["values"]
            self._outstanding.take(message.context, values, 1 / unit, seed=self._seed, step=step)

    @property
    def reach(self) -> float:
        """By how much `join` can move x in this step: Gaussians of 32 random bits stay below 7."""
        return 0.0 if self._outstanding is None else 7 * math.hypot(self.grown, self._outstanding.std)

    def snapshot(self) -> Any:
        """Return all that is outstanding, for `restore`."""
        return None if self._outstanding is None else self._outstanding.clone()

    def restore(self, snapshot: Any) -> None:
        """Have outstanding what was when `snapshot` was made."""
        self._outstanding = snapshot

    def add_outstanding(self, pending: Tensor, step: int) -> Tensor:
        """Return eta e, float[d], with outstanding noise: drawn anew for each t, so looking does not change the run."""
        if self._outstanding is None or not self._outstanding.anything:
            return pending
        noise = self._outstanding.draw(pending[: self._d], seed=self._seed, step=step)
        return torch.cat([pending[: self._d] + noise, pending[self._d :]])

    def clear(self) -> None:
        """Leave no noise outstanding."""
        if self._outstanding is not None:
            self._outstanding.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the outstanding noise, tensors and plain types."""
        return {} if self._outstanding is None else self._outstanding.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], memory: ErrorMemory, step: int) -> None:
        """Restore `state_dict`; where it is of other cells, or noise is eager here, settle it in the error memory."""
        self.clear()
        if not state:
            return
        saved = OutstandingNoise.from_state(state, self._flat.x.device)
        if self._outstanding is not None and saved.is_on_grid_of(self._outstanding):
            self._outstanding = saved
        else:
            self._settle(saved, memory, step)
