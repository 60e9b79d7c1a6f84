"""Error feedback: the memory of what compression has not sent yet (Stich et al. 2018; Algorithm 1, lines 10-12).

The memory stands for eta e^(i), the pending update, rather than e^(i). For a constant step size the two are the
same algorithm for every compressor with C(c v) = c C(v). When eta changes, keeping eta e fixed is exactly the
rescaling of e by eta_old / eta_new that leaves y = x - eta e continuous, and eta = 0 needs no special case.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from packsaddle.average import Averaged, Term
from packsaddle.direction import Extras, Gradient
from packsaddle.flat import FlatParameters


class ErrorMemory:
    """This worker's eta e^(i), float[d], in at least single precision; on the dense part only what rounding x lost.

    A step is tried in a `spare` vector, which then takes the memory's place, so that a step can be left out; without
    one in the memory itself.
    """

    can_leave_out = True  # a gradient that is not finite

    def __init__(self, flat: FlatParameters, *, spare: bool = False) -> None:
        self._flat = flat
        self._now = flat.zeros()
        self._next = flat.zeros() if spare else self._now

    @property
    def vector(self) -> Tensor:
        """The memory, float[d]."""
        return self._now.flat

    @property
    def views(self) -> list[Tensor]:
        """The memory, shaped as the parameters."""
        return self._now.views

    @property
    def unit(self) -> float:
        """What the vector, and the messages made of it, are to be multiplied by to be updates of x."""
        return 1.0

    @property
    def spare_bytes(self) -> int:
        """The size of the spare vector, if there is one."""
        return 0 if self._next is self._now else self._next.flat.nbytes

    def reach(self, magnitude: float) -> float:
        """Return by how much a mean of this magnitude can move x."""
        return magnitude * abs(self.unit)

    def pending(self) -> Tensor:
        """Return eta e, float[d]; not a copy if it need not be one."""
        return self.vector

    def check(self) -> None:
        """Raise RuntimeError if the gradients cannot be taken."""
        for p, name in zip(self._flat.parameters, self._flat.names, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient, which is not supported")

    def correct(self, direction: Gradient, lrs: Sequence[float], extras: Extras) -> Tensor:
        """Return eta (e + u), float[d] (line 10), of which `absorb` will make the memory; `lrs` are by parameter group.

        A parameter that was frozen is left where it is.
        """
        direction.add(self._now, self._next, lrs, extras)
        self._forget_frozen(self._next.flat)
        return self._next.flat

    def correct_by(self, update: Tensor) -> Tensor:
        """Return eta e + update, float[d], of which `absorb` will make the memory."""
        return torch.add(self.vector, update, out=self._next.flat)

    def apply(self, x: Tensor, g: Averaged) -> None:
        """Subtract mean_i g^(i) from x, float[d], in at least single precision (line 11)."""
        compressed_d = self._flat.compressed_d
        for term in g.mean:
            term.add_to(x[:compressed_d], -self.unit)
        x[compressed_d:].sub_(g.dense, alpha=self.unit)

    def absorb(self, sent: Iterable[Term], lost: Tensor | None = None) -> None:
        """Remember what was to be sent less what was, C(.) of the compressed part and all of the dense one (line 12).

        `lost`, float[d], is what x's own precision could not take; it is to be sent again.
        """
        rest = self._next.flat
        for term in sent:
            term.add_to(rest, -1.0)
        rest[self._flat.compressed_d :].zero_()
        if lost is not None:
            rest.add_(lost)
        self._forget_frozen(rest)
        self._now, self._next = self._next, self._now
        self.settle()

    def add(self, update: Tensor) -> None:
        """Add to eta e, on its first coordinates, float[at most d]."""
        self.vector[: len(update)].add_(update, alpha=1 / self.unit)

    def reset(self, lost: Tensor | None = None) -> None:
        """Set the error to zero (line 7), or to what x's own precision could not take."""
        self.vector.zero_()
        if lost is not None:
            self.vector.add_(lost)
        self.settle()

    def vectors(self) -> dict[str, Tensor]:
        """Return what is kept from step to step beside the memory itself, float[d] each, by name."""
        return {}

    def settle(self, unit: float | None = None) -> None:
        """Take the vector as it now is for the state between two steps, in another unit if one is given."""

    def _forget_frozen(self, vector: Tensor) -> None:
        """Frozen parameters have no error: they take neither noise nor what a compressor makes of zeros."""
        for view in self._flat.frozen(vector):
            view.zero_()
