"""Steps in which a worker's gradient is not finite are left out, on all workers together."""

from typing import Protocol

import torch
from torch import Tensor

from packsaddle.channel import Channel
from packsaddle.finite import is_finite, spoil
from packsaddle.skips import Skip, Skips


class Source(Protocol):
    """What gradients come from."""

    def first_bad(self) -> str | None:
        """Return the name of the first parameter whose gradient has an Inf or NaN in it."""


class Guard:
    """Leaves steps out, at most `most` in a row; None leaves none out and looks at nothing.

    A worker that cannot use its gradient sends zeros, and NaNs in the dense part, whose mean then tells all of them: no
    collective, and no byte, that is not there anyway. Only where nothing goes dense is there a number for it.
    Raises ValueError if `most` is negative.
    """

    def __init__(self, most: int | None, channel: Channel) -> None:
        self.skips, self._channel = Skips(most, channel.group.rank), channel
        self.overflowed = False  # a GradScaler has found an Inf in this worker's gradient
        self._bad = torch.tensor(False)  # whether this worker could not use its gradient in the step that is tried

    def passes(self, source: Source, step: int) -> bool:
        """Whether this worker's gradient is finite, in a step without an exchange; else the step is left out here."""
        if self.skips.most is None:
            return True
        name = source.first_bad()
        if name is None and not self.overflowed:
            self.skips.took()
            return True
        self.skips.enter(Skip(step, (self._channel.group.rank,), name or "what a GradScaler has unscaled"))
        return False

    def inspect(self, vector: Tensor, total: Tensor | None, *, blank: bool) -> None:
        """Look at what this worker is to send, float[d]; if it is of no use, make it zeros where `blank`.

        `total` is the sum of it, or near it, if that is known: one that is finite says that all of it is.
        """
        if self.skips.most is None:
            return
        late = self.skips.in_a_row > self.skips.most
        bad = torch.tensor(False) if total is not None and total.isfinite() else ~is_finite(vector)
        # Steps without an exchange were left out here alone; now the others can hear of it.
        self._bad = torch.ones_like(bad) if self.overflowed or late else bad
        if blank:
            spoil(vector, self._bad, 0.0)

    def mark(self, dense: Tensor) -> Tensor:
        """Return the dense part, float[n], as it is to be averaged: NaNs say that the step cannot be taken.

        It is changed in place, as `inspect` has changed what it is a part of.
        """
        if self.skips.most is None:
            return dense
        marked = dense if len(dense) else dense.new_zeros(1)
        spoil(marked, self._bad, float("nan"))
        return marked

    def agrees(self, mean: Tensor) -> bool:
        """Whether all workers can take the step, from the mean of what `mark` returned, float[n]."""
        return self.skips.most is None or bool(is_finite(mean))

    def leave_out(self, source: Source, step: int) -> None:
        """Enter a step that all leave out; collective. Raises NonFiniteError if there were too many in a row."""
        name = (source.first_bad() or "the sum of what was left and the gradient") if self._bad else ""
        text, row = torch.tensor(list(name.encode()), dtype=torch.uint8), torch.tensor([self.skips.in_a_row + 1])
        parts = {"name": text.to(self._bad.device), "row": row.to(self._bad.device)}
        gathered = self._channel.gather(parts, fixed_size=False, purpose="guard")
        names = [bytes(p["name"].tolist()).decode() for p in gathered]
        workers = tuple(worker for worker, found in enumerate(names) if found)
        self.skips.enter(Skip(step, workers, names[workers[0]] if workers else "a mean of finite gradients"))
        self.skips.check(max(int(p["row"]) for p in gathered))
