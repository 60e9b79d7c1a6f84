"""EF21 (Richtarik, Sokolov and Fatkhullin 2021): workers send what their running estimate of the gradient lacks."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from packsaddle.average import Averaged, Term
from packsaddle.direction import Extras, Gradient
from packsaddle.feedback import ErrorMemory
from packsaddle.finite import magnitude as measured
from packsaddle.flat import FlatParameters


class EstimateMemory(ErrorMemory):
    """This worker's estimate g^(i), float[d], and the mean of all workers', in units of a gradient.

    C(u - g^(i)) is sent and added to g^(i) everywhere; x moves against the mean of the estimates, so nothing is ever
    pending: e = 0 and y = x. It has no bounded-gradient assumption, and with small batches it wants momentum. Raises
    ValueError for 16-bit parameters.
    """

    def __init__(self, flat: FlatParameters, rates: Callable[[], Sequence[float]]) -> None:
        if flat.x.element_size() < 4:
            raise ValueError(f'memory="ef21" needs parameters of 32 or 64 bits, got {flat.x.dtype}')
        super().__init__(flat)
        self.mean = torch.zeros_like(self.vector)
        self._lacking = flat.zeros()  # u less the estimate
        self._rates = rates
        self._bound: float | None = None  # on the magnitude of `mean`

    def reach(self, magnitude: float) -> float:
        """The mean estimate moves x, whatever a step brings: it is measured once, and bounded from then on."""
        if self._bound is None:
            self._bound = float(measured(self.mean))
        self._bound += magnitude
        return self._bound * max(self._rates(), default=0.0)

    def settle(self, unit: float | None = None) -> None:
        super().settle(unit)
        self._bound = None

    def pending(self) -> Tensor:
        return torch.zeros_like(self.vector)

    def correct(self, direction: Gradient, lrs: Sequence[float], extras: Extras) -> Tensor:
        torch.neg(self.vector, out=self._lacking.flat)
        direction.add(self._lacking, self._lacking, [1.0] * len(lrs), extras)
        self._forget_frozen(self._lacking.flat)
        return self._lacking.flat

    def apply(self, x: Tensor, g: Averaged) -> None:
        compressed_d = self._flat.compressed_d
        for term in g.mean:
            term.add_to(self.mean[:compressed_d], 1.0)
        self.mean[compressed_d:].add_(g.dense)
        rates = self._rates()
        for run in self._flat.runs:
            stretch = slice(run.start, run.stop)
            x[stretch].sub_(self.mean[stretch], alpha=rates[run.group])

    def absorb(self, sent: Iterable[Term], lost: Tensor | None = None) -> None:
        compressed_d = self._flat.compressed_d
        for term in sent:
            term.add_to(self.vector[:compressed_d], 1.0)
            term.add_to(self._lacking.flat[:compressed_d], -1.0)  # what is left of it, for `monitor`
        self.vector[compressed_d:].add_(self._lacking.flat[compressed_d:])
        self._lacking.flat[compressed_d:].zero_()
        self._forget_frozen(self.vector)
        self._forget_frozen(self.mean)

    def add(self, update: Tensor) -> None:
        raise NotImplementedError("an estimate takes no update: nothing is ever pending")

    def reset(self, lost: Tensor | None = None) -> None:
        """Leave the estimates: they are as good a start from another x as any."""

    def vectors(self) -> dict[str, Tensor]:
        return {"mean_estimate": self.mean}
