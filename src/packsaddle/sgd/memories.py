"""The memories of CompressedSGD: an error memory, or with memory="ef21" EF21's estimates of the gradient.

EF21's memory subtracts the workers' mean estimate, multiplied by the learning rates, from the parameters. So it reads
the learning rates in each step.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged, Term
from packsaddle.feedback.memory import ErrorMemory, InPlaceMemory, Memory, Update
from packsaddle.feedback.slices import FlatParameters
from packsaddle.numerics.finite import magnitude as measured

# Smallest number of coordinates for which the error memory may be updated in place. A smaller error memory has a second
# vector instead: both fit a cache, and a rollback is exact.
_LARGE = 1 << 20


class EstimateMemory(ErrorMemory):
    """EF21's estimate of this worker's gradient, float[d], and the mean of the estimates of all workers. It replaces
    the error memory with memory="ef21".

    The method is from Richtarik, Sokolov and Fatkhullin 2021. Let u be the update of worker i, g^(i) its estimate, and
    C the compressor. In a step the worker sends C(u - g^(i)), and adds it to g^(i). The parameters x become x - eta
    mean_i g^(i), where eta is the learning rate. So no update is ever unsent.

    EF21's proof does not assume bounded gradients. With small batches the method needs momentum. Raises ValueError for
    16-bit parameters.
    """

    kind = "ef21"
    name = "estimate"
    in_gradient_units = True

    def __init__(self, flat: FlatParameters, rates: Callable[[], Sequence[float]]) -> None:
        if flat.x.element_size() < 4:
            raise ValueError(f'memory="ef21" needs parameters of 32 or 64 bits, got {flat.x.dtype}')
        super().__init__(flat)
        self._flat = flat
        self.mean = torch.zeros_like(self.vector)
        # The vector to send, i.e. the update minus the estimate; after `absorb` its residual.
        self._lacking = flat.zeros()
        self._rates = rates
        self._bound: float | None = None  # upper bound on the largest absolute value of `mean`; None: not measured yet

    def bound(self, magnitude: float) -> float:
        """Return an upper bound on the change of any coordinate of the parameters in a step.

        `magnitude` is the largest absolute value of the mean update, which the step adds to the mean estimate. The
        first call measures the largest absolute value of the mean estimate. Each call, including the first, adds
        `magnitude` to this value, and returns the sum times the largest learning rate.
        """
        if self._bound is None:
            self._bound = float(measured(self.mean))
        self._bound += magnitude
        return self._bound * max(self._rates(), default=0.0)

    def local_factors(self) -> Sequence[float]:
        # If learning rates differed between workers, the parameters would differ too.
        return self._rates()

    def close(self, *, apply: bool) -> None:
        """No-op: `apply_mean` and `absorb` have already changed the estimates."""

    def after_load(self) -> None:
        self._bound = None

    def pending(self) -> Tensor:
        return torch.zeros_like(self.vector)

    def correct(self, update: Update) -> Tensor:
        torch.neg(self.vector, out=self._lacking.flat)
        update.add(self._lacking, self._lacking)
        self._clear_frozen(self._lacking.flat)
        return self._lacking.flat

    def apply_mean(self, x: Tensor, g: Averaged) -> None:
        for term in g.mean:
            term.add_to(self.mean[: self.compressed_d], 1.0)
        self.mean[self.compressed_d :].add_(g.dense)
        rates = self._rates()
        for of in self._flat.ranges:
            part = slice(of.start, of.stop)
            x[part].sub_(self.mean[part], alpha=rates[of.group])

    def absorb(self, sent: Iterable[Term], rounding: Tensor | None = None) -> None:
        compressed, dense = slice(self.compressed_d), slice(self.compressed_d, None)
        for term in sent:
            term.add_to(self.vector[compressed], 1.0)
            # Leave the residual in `_lacking`, since the contraction is measured from it.
            term.add_to(self._lacking.flat[compressed], -1.0)
        self.vector[dense].add_(self._lacking.flat[dense])
        self._lacking.flat[dense].zero_()
        self._clear_frozen(self.vector)
        self._clear_frozen(self.mean)

    def reset(self, rounding: Tensor | None = None) -> None:
        """No-op: the estimates of the gradient stay valid when the escape check rolls the parameters back."""

    def vectors(self) -> dict[str, Tensor]:
        return {"mean_estimate": self.mean}


def make_memory(
    kind: Memory, flat: FlatParameters, rates: Callable[[], Sequence[float]], *, spare: bool, revocable: bool
) -> ErrorMemory:
    """Return the memory of the parameters `flat`: an error memory, or EF21's estimates.

    Args:
        kind: "buffer" for an error memory, "ef21" for EF21's estimates.
        flat: the parameters.
        rates: returns the learning rate of each parameter group.
        spare: True if an error memory must be able to roll back to its value before the current step.
        revocable: True if the update of a step can be computed again. A large error memory on a CPU then needs no
            second vector for a rollback, since it subtracts the update.
    """
    if kind == "ef21":
        return EstimateMemory(flat, rates)
    in_place = spare and revocable and flat.d >= _LARGE and flat.x.device.type == "cpu"
    return InPlaceMemory(flat) if in_place else ErrorMemory(flat, spare=spare)
