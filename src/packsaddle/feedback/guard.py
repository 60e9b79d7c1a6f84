"""Non-finite steps, which would bring an Inf or NaN into x or an error memory: skipped on all workers, and counted.

`NonFiniteGuard` is the optimizer's, which knows the outcome at once. A hook learns it later, and keeps `Skips` alone.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.communicator import Communicator
from packsaddle.errors import GuardError
from packsaddle.messages import numbered
from packsaddle.numerics.finite import is_usable, spoil

_log = logging.getLogger("packsaddle")

THE_SUM = "the sum of what was left and the gradient"  # where each is finite
THE_MEAN = "a mean of finite gradients"
_UNPROTECTED = "unless a GradScaler leaves it out, the optimizer steps by NaNs: call hook.protect(optimizer)"


class NonFiniteError(GuardError):
    """The error after more than `max_skipped` steps in a row in which a gradient was not finite.

    Parameters and error memories are as they were before the first of them. Local updates raise it also if the inner
    optimizer of a worker cannot be reset.

    >>> import torch
    >>> from packsaddle import Compression, CompressedSGD, NonFiniteError, TopK
    >>> weight = torch.nn.Parameter(torch.ones(64, 64))
    >>> opt = CompressedSGD([weight], 0.1, Compression(TopK(1.0), max_skipped=0))
    >>> weight.grad = torch.full((64, 64), float("nan"))
    >>> try:
    ...     opt.step()
    ... except NonFiniteError:
    ...     print("stopped")
    stopped
    """


@dataclass(frozen=True)
class Skip:
    """A step that was not taken.

    >>> import torch
    >>> from packsaddle import CompressedSGD, TopK
    >>> weight = torch.nn.Parameter(torch.ones(64, 64))
    >>> opt = CompressedSGD([weight], 0.1, TopK(1.0))
    >>> weight.grad = torch.full((64, 64), float("nan"))
    >>> opt.step()
    >>> opt.skips
    [Skip(step=0, workers=(0,), parameter='parameter 0')]
    """

    step: int  # t, which the next step has again
    workers: tuple[int, ...]  # whose gradients were not finite, as far as is known here
    parameter: str  # the first whose gradient was not, on the first of them

    def __str__(self) -> str:
        where = f" on {numbered('worker', self.workers)}" if self.workers else ""
        return f"step {self.step}: {self.parameter} is not finite{where}"


class Skips:
    """The steps that this worker knows of, at most `most` in a row; None: any number.

    `protected` tells if parameters stay as they are in such a step: behind a hook another optimizer may step by NaNs.
    """

    def __init__(self, most: int | None, rank: int, *, protected: bool = True) -> None:
        self.most, self._rank, self.protected = most, rank, protected
        self.list: list[Skip] = []  # since it was made or loaded
        self.count = self.in_a_row = 0

    def enter(self, skip: Skip) -> None:
        """Count a step, and log it on the first of the workers that it is due to; in a row, the 1st, 2nd, 4th, ..."""
        self.list.append(skip)
        self.count += 1
        self.in_a_row += 1
        is_mine = skip.workers[:1] == (self._rank,) or (not skip.workers and self._rank == 0)
        if is_mine and self.in_a_row & (self.in_a_row - 1) == 0:
            row = f" ({self.in_a_row} in a row)" if self.in_a_row > 1 else ""
            _log.warning("%s; %s%s", skip, "the step is left out" if self.protected else _UNPROTECTED, row)

    def took(self) -> None:
        """Know that a step was taken."""
        self.in_a_row = 0

    def check(self, in_a_row: int) -> None:
        """Raise NonFiniteError if that is too many; the last is the one to be named."""
        if self.most is not None and in_a_row > self.most:
            before = "parameters, error memories and step count are as before"
            if not self.protected:
                before = f"error memories and step count are as before, but {_UNPROTECTED}"
            raise NonFiniteError(
                f"{self.list[-1]}: {in_a_row} in a row could not be taken, and max_skipped={self.most}; {before}. "
                f"Is the learning rate too high, or the data bad?"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"skipped": self.count, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self.count, self.in_a_row, self.list = state.get("skipped", 0), state.get("in_a_row", 0), []


class Source(Protocol):
    """The source of gradients."""

    def first_bad(self) -> str | None:
        """Return the name of the first parameter whose gradient cannot be used."""


class NonFiniteGuard:
    """Leaves steps out, at most `most` in a row; None leaves none out and looks at nothing.

    A worker that cannot use its gradient sends zeros, and NaNs in the dense part, whose mean then tells all of them: no
    collective, and no byte, that is not there anyway. Only where nothing goes dense is there a number for it. Finite
    vectors may have a mean that is not, or one that x cannot take: all workers see that alike.
    """

    def __init__(self, most: int | None, channel: Communicator) -> None:
        self.skips, self._channel = Skips(most, channel.group.rank), channel
        self.overflowed = False  # a GradScaler has found an Inf in this worker's gradient
        self.x_is_large = False  # it has moved by what might have been too much
        self._bad = torch.tensor(False)  # whether this worker could not use its gradient in the step that is tried

    def inspect(self, vector: Tensor, norm: Tensor | None, *, blank: bool) -> None:
        """Look at what this worker is to send, float[d]; if it is of no use, make it zeros where `blank`.

        `norm` is at least the norm of it, but for noise and decay, if that is known: one that is finite says that the
        vector can be used (its square is finite too), unless x was seen to be so large that its decay might not be.
        """
        if self.skips.most is None:
            return
        known = norm is not None and not self.x_is_large and bool(norm.isfinite())
        bad = torch.tensor(False) if known else ~is_usable(vector)
        self._bad = torch.ones_like(bad) if self.overflowed else bad
        if blank:
            spoil(vector, self._bad, 0.0)

    def mark(self, dense: Tensor) -> Tensor:
        """Make the dense part, float[n], NaNs if the step cannot be taken, in place: the mean tells all workers.

        Returns what else is to be averaged with it: nothing, or where nothing goes dense a number in its place.
        """
        if self.skips.most is None:
            return dense[:0]
        mark = dense[:0] if len(dense) else dense.new_zeros(1)
        spoil(dense if len(dense) else mark, self._bad, float("nan"))
        return mark

    def weigh(self, g: Averaged, mark: Tensor) -> float:
        """Return about the largest magnitude of an outcome, and of the mean of what `mark` returned.

        Not finite if a worker's vector was not, or the mean is not; the same on all workers.
        """
        if self.skips.most is None:
            return 0.0
        return float((replace(g, dense=mark) if len(mark) else g).magnitude())

    def leave_out(self, source: Source, step: int) -> None:
        """Enter a step that all leave out; collective. Raises NonFiniteError if there were too many in a row."""
        name = (source.first_bad() or THE_SUM) if self._bad else ""
        text, row = torch.tensor(list(name.encode()), dtype=torch.uint8), torch.tensor([self.skips.in_a_row + 1])
        parts = {"name": text.to(self._bad.device), "row": row.to(self._bad.device)}
        gathered = self._channel.gather(parts, fixed_size=False, purpose="guard")
        names = [bytes(p["name"].tolist()).decode() for p in gathered]
        workers = tuple(worker for worker, found in enumerate(names) if found)
        self.skips.enter(Skip(step, workers, names[workers[0]] if workers else THE_MEAN))
        self.skips.check(max(int(p["row"]) for p in gathered))
