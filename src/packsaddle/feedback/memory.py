"""Error memories: the accumulated residuals of compression (Stich et al. 2018; Algorithm 1, lines 10-12).

The methods of a memory e, in the order of their calls in an exchange, with the lines of Algorithm 1:

- `correct` returns the vector to send, v = e + u, for an update u (line 10).
- `apply_mean` subtracts the mean update from the parameters x (line 11).
- `absorb` stores the residual v - C(v) as the new memory (line 12).
- `close` commits the new memory, or rolls back to the old one.

Between exchanges, `reset` clears the memory (line 7). `InPlaceMemory` is a variant for large vectors.

In the paper a worker i stores e^(i). If updates include the step size eta, `ErrorMemory` stores the unsent update eta
e^(i) instead. For a constant step size the two algorithms are the same, for every compressor with C(c v) = c C(v). If
eta changes, the stored eta e does not, so e is rescaled by eta_old / eta_new. This leaves y = x - eta e continuous, and
eta = 0 needs no special case. Hooks do not know the step size, so their updates and memories are in units of a
gradient.
"""

from collections.abc import Collection, Iterable

from torch import Tensor

from packsaddle.comm.aggregators import Averaged, Term
from packsaddle.feedback.slices import Shaped, Slice


class Update:
    """Base class of an update u, float[n], the input of an error memory in one step.

    u is in the units of the memory: those of a parameter, or those of a gradient in hooks.
    """

    # Upper bound on the norm of e plus the scaled gradients, over the parameters with gradients, where e is the memory
    # to which u was added. It does not include the weight decay and the noise in u. None: unknown.
    norm: Tensor | None = None
    is_known_invalid = False  # True if a GradScaler found an Inf or NaN in this worker's gradients

    def add(self, base: Shaped, out: Shaped) -> None:
        raise NotImplementedError

    def add_if_finite(self, out: Shaped) -> bool:
        """Add the update u to `out`, float[n], in place, and return True.

        If the sum may be non-finite, `out` keeps its old values, up to rounding, and the result is False.
        """
        raise NotImplementedError

    def subtract(self, out: Shaped) -> None:
        """Subtract the update u from `out`, float[n], in place.

        This undoes `add_if_finite` up to rounding. Call it in the same step, while the gradients are unchanged.
        """
        raise NotImplementedError


class ErrorMemory:
    """This worker's error memory e of a slice (parameters exchanged together), float[n], in at least float32.

    On compressed coordinates e is the residual of the compression. On uncompressed coordinates it is only the rounding
    error of 16-bit parameters, and with local updates the part of the update that clipping removed. In a two-way
    exchange of W workers, the owner of a chunk, i.e. the worker that averages it, adds W times the residual of the
    compressed mean to its own e.

    In a step, the memory computes the vector to send, v = e + u, for an update u. With `spare`, v is in a second
    vector, which becomes the memory on commit, so the step can be rolled back. Without `spare`, v overwrites the
    memory, and the step cannot be rolled back.
    """

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

    # Methods called during an exchange.

    def correct(self, update: Update) -> Tensor:
        """Return the vector to send, v = e + u, float[n], where e is this memory and u is the update (line 10 of
        Algorithm 1).

        The coordinates of frozen parameters in v are 0.
        """
        update.add(self._now, self._next)
        self._clear_frozen(self._next.flat)
        return self._next.flat

    def apply_mean(self, x: Tensor, g: Averaged) -> None:
        """Subtract the mean update g from the parameters x, float[n], in place (line 11 of Algorithm 1).

        The tensor x must be in at least float32.
        """
        for term in g.mean:
            term.add_to(x[: self.compressed_d], -1.0)
        x[self.compressed_d :].sub_(g.dense)

    def absorb(self, sent: Iterable[Term], rounding: Tensor | None = None) -> None:
        """Set the new memory to the residual: v - C(v) on compressed coordinates, 0 on uncompressed ones (line 12 of
        Algorithm 1).

        v is the vector that `correct` returned, and `sent` is C(v). `rounding`, float[n], is added to the new memory:
        it is the rounding error of 16-bit parameters, or None if there is none.
        """
        residual = self._next.flat
        for term in sent:
            term.add_to(residual, -1.0)
        residual[self.compressed_d :].zero_()
        if rounding is not None:
            residual.add_(rounding)
        self._clear_frozen(residual)

    def keep(self, which: Collection[int]) -> None:
        """Roll back the error memory of some parameters, whose indices in the slice are `which`. Call after
        `absorb`."""
        for i in which:
            self._next.views[i].copy_(self._now.views[i])

    def restore_unused(self, sent: Tensor, by_any: Tensor) -> None:
        """Correct the new error memory of the parameters of which this worker sent zeros instead of v, or which no
        worker used in the backward pass. Call after `absorb`.

        `sent`, bool[p], is True for each of the slice's p parameters of which this worker sent v. `by_any`, bool[p], is
        True for each parameter that at least one worker used.

        If this worker sent zeros, the old error memory is added to the new one, which is the residual of the zeros. If
        no worker used the parameter, the mean is discarded, so the old error memory replaces the new one.
        """
        for new, old, is_sent, anywhere in zip(self._next.views, self._now.views, sent, by_any, strict=True):
            new.mul_(anywhere).add_(old * ~(is_sent & anywhere))

    def close(self, *, apply: bool) -> None:
        """Commit the new error memory if `apply` is True, and otherwise roll back to the old one."""
        if apply:
            self._now, self._next = self._next, self._now

    # Methods called between exchanges.

    def add(self, update: Tensor) -> None:
        """Add an unsent update of the parameters, float[m], to the first m coordinates of the error memory."""
        self.vector[: len(update)].add_(update)

    def reset(self, rounding: Tensor | None = None) -> None:
        """Set the error memory to zero, or to `rounding` if it is given (line 7 of Algorithm 1).

        `rounding`, float[n], is the rounding error of 16-bit parameters.
        """
        self.vector.zero_()
        if rounding is not None:
            self.vector.add_(rounding)

    def _clear_frozen(self, vector: Tensor) -> None:
        """Set the coordinates of frozen parameters in `vector` to zero. Noise or a decoded message may have changed
        them."""
        for view in self.slice.frozen(vector):
            view.zero_()


class InPlaceMemory(ErrorMemory):
    """The error memory e of a large slice, float[n], without a second vector: v = e + u overwrites e, where u is the
    update.

    To roll back, u is computed again and subtracted from v. This needs the gradients of the step, and restores e up to
    rounding. If v may be non-finite, it is computed in a temporary second vector instead.
    """

    def __init__(self, of: Slice) -> None:
        super().__init__(of)
        # The uncommitted update that was added to the memory; None: none was added, or v is in a temporary vector.
        self._added: Update | None = None

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
