"""Error memories: the accumulated residuals of compression (Stich et al. 2018; Algorithm 1, lines 10-12).

In an exchange, `correct` adds an update u to the memory e, v = e + u (line 10), `apply_mean` subtracts the mean update
from the parameters x (line 11), `absorb` stores the residual v - C(v) (line 12), and `close` commits or rolls back.
`reset` clears the memory (line 7). `InPlaceMemory` is a variant for large vectors; `sgd.memories` has kinds for
`CompressedSGD` only.

If updates include the step size eta, `ErrorMemory` stores eta e^(i), the pending update, rather than e^(i). For a
constant step size the two are the same algorithm for every compressor with C(c v) = c C(v). When eta changes, keeping
eta e fixed is exactly the rescaling of e by eta_old / eta_new that leaves y = x - eta e continuous, and eta = 0 needs
no special case. Hooks have no access to the step size, so their updates and memories are in units of a gradient.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from torch import Tensor

from packsaddle.comm.aggregators import Averaged, Term
from packsaddle.feedback.slices import Shaped, Slice

Memory = Literal["buffer", "ef21"]


class Update:
    """Base class of the update u, float[n], that a step adds to an error memory, in the units of the memory."""

    norm: Tensor | None = None  # an upper bound on ||e + u|| after `add`; None: unknown
    is_known_invalid = False  # True if a GradScaler found an Inf in this worker's gradients

    def add(self, base: Shaped, out: Shaped) -> None:
        raise NotImplementedError

    def add_if_finite(self, out: Shaped) -> bool:
        """Add this update, the vector u, to out, float[n], in place. Return False, with out unchanged, if the sum may
        be non-finite."""
        raise NotImplementedError

    def subtract(self, out: Shaped) -> None:
        """Subtract this update, the vector u, from out, float[n], in place. This undoes `add_if_finite` in the same
        step, up to rounding."""
        raise NotImplementedError


class ErrorMemory:
    """This worker's error memory e of some parameters, float[n], in at least float32, in a buffer of its own.

    On uncompressed coordinates it holds only the rounding error of the parameters, and the clipped part of local
    updates. In a two-way exchange of W workers, the worker that averages a chunk of the vector also keeps there W times
    the residual of the compressed mean. With `spare`, the vector to send, v = e + u for an update u, is computed in a
    second vector, which becomes the memory on commit, so that a step can be rolled back; without it, v overwrites the
    memory.
    """

    kind = "buffer"  # the name of the class in saved states
    name = "error"  # the name of the vector in saved states
    in_gradient_units = False  # True if updates do not include the learning rate

    def __init__(self, of: Slice, *, spare: bool = False) -> None:
        self.slice, self.compressed_d = of, of.compressed_d
        self._now = of.zeros()
        self._next = of.zeros() if spare else self._now

    @property
    def vector(self) -> Tensor:
        return self._now.flat

    @property
    def views(self) -> list[Tensor]:
        return self._now.views

    @property
    def spare_bytes(self) -> int:
        return 0 if self._next is self._now else self._next.flat.nbytes

    @property
    def is_deferrable(self) -> bool:
        """True if a step can still be rolled back after the next step's gradients
        have replaced the gradients of the step."""
        return self._next is not self._now

    # Methods called during an exchange.

    def correct(self, update: Update) -> Tensor:
        """Return the vector to send, v = e + u, float[n], with zeros for frozen parameters (line 10 of Algorithm 1).
        Here e is this memory and u is the update."""
        update.add(self._now, self._next)
        self._clear_frozen(self._next.flat)
        return self._next.flat

    def apply_mean(self, x: Tensor, g: Averaged) -> None:
        """Subtract the mean update g from the parameters x, float[n], in place (line 11 of Algorithm 1). The tensor x
        is in at least float32."""
        for term in g.mean:
            term.add_to(x[: self.compressed_d], -1.0)
        x[self.compressed_d :].sub_(g.dense)

    def absorb(self, sent: Iterable[Term], rounding: Tensor | None = None) -> None:
        """Set the memory to the residual: v - C(v) on the compressed part, 0 on the uncompressed part (line 12 of
        Algorithm 1). The vector v was sent, and `sent` is C(v), its compressed form. `rounding`, float[n], the rounding
        error of the parameters, is added to the memory."""
        residual = self._next.flat
        for term in sent:
            term.add_to(residual, -1.0)
        residual[self.compressed_d :].zero_()
        if rounding is not None:
            residual.add_(rounding)
        self._clear_frozen(residual)

    def keep(self, which: Collection[int]) -> None:
        """Roll back the error memory of the parameters with these indices. Call after `absorb`."""
        for i in which:
            self._next.views[i].copy_(self._now.views[i])

    def restore_unused(self, used: Tensor, by_any: Tensor) -> None:
        """Correct the new error memory of the parameters for which this worker sent zeros, because it did not use them
        in the backward pass. Call after `absorb`.

        `used` and `by_any`, bool[number of parameters], are True for the parameters that this worker used, and that any
        worker used. Where `used` is False, the old error memory is added to the new one. Where `by_any` is False too,
        no worker used the parameter, and the residual of the zeros is discarded.
        """
        for new, old, here, anywhere in zip(self._next.views, self._now.views, used, by_any, strict=True):
            new.mul_(anywhere).add_(old * ~here)

    def close(self, *, apply: bool) -> None:
        """Commit the new error memory if `apply` is True, and otherwise roll back to the old one."""
        if apply:
            self._now, self._next = self._next, self._now

    # Methods called between exchanges.

    def pending(self) -> Tensor:
        """Return the update of the parameters that this worker has not sent yet, float[n]. It is the error memory
        itself; the result may be a view."""
        return self.vector

    def add(self, update: Tensor) -> None:
        """Add an unsent update of the parameters, float[at most n], to the first coordinates of the error memory."""
        self.vector[: len(update)].add_(update)

    def reset(self, rounding: Tensor | None = None) -> None:
        """Set the error memory to zero (line 7 of Algorithm 1). If `rounding`, float[n], is given, i.e. the rounding
        error of the parameters, the error memory becomes `rounding` instead."""
        self.vector.zero_()
        if rounding is not None:
            self.vector.add_(rounding)

    def bound(self, magnitude: float) -> float:
        """Return an upper bound on the change of any coordinate of the parameters by a mean update whose largest
        magnitude is `magnitude`."""
        return magnitude

    def local_factors(self) -> Sequence[float]:
        """Return the factors, such as learning rates, that this worker applies to the mean update. They must be equal
        on all workers. The list is empty here, since an error memory applies no factors."""
        return []

    def vectors(self) -> dict[str, Tensor]:
        """Return the vectors kept between steps in addition to the memory itself, float[n] each, by name."""
        return {}

    def after_load(self) -> None:
        """Update the state that depends on the memory's vectors. Call after vectors were loaded between two steps."""

    def _clear_frozen(self, vector: Tensor) -> None:
        """Set the coordinates of frozen parameters to zero, since noise or a decoded message may have changed them."""
        for view in self.slice.frozen(vector):
            view.zero_()


class InPlaceMemory(ErrorMemory):
    """The error memory of a large vector, float[n], without a spare vector: v = e + u is computed in the memory itself.

    Here e is the memory, u the update, and v the vector to send. Rolling back subtracts u, which needs the step's
    gradients and restores the memory up to rounding. If the sum may be non-finite, v is computed in a temporary vector.
    """

    def __init__(self, of: Slice) -> None:
        super().__init__(of)
        self._added: Update | None = None  # the uncommitted update that the memory contains, if any

    def correct(self, update: Update) -> Tensor:
        if update.add_if_finite(self._now):
            self._added = update
            self._clear_frozen(self._now.flat)
        else:
            self._next = self.slice.zeros()
            super().correct(update)
        return self._next.flat

    def close(self, *, apply: bool) -> None:
        if self._added is not None and not apply:
            self._added.subtract(self._now)
            self._clear_frozen(self._now.flat)
        super().close(apply=apply)
        self._added, self._next = None, self._now
