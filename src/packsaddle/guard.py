"""Steps in which a worker's gradient is not finite are left out, on all workers together."""

from typing import Any, Protocol

import torch
from torch import Tensor

from packsaddle.channel import Channel
from packsaddle.finite import NonFiniteError, Skip, is_finite, spoil


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
        if most is not None and most < 0:
            raise ValueError(f"max_skipped must be 0 or more steps, or None, got {most}")
        self.most, self._channel = most, channel
        self.skips: list[Skip] = []
        self.skipped = self.in_a_row = 0
        self.overflowed = False  # a GradScaler has found an Inf in this worker's gradient
        self._bad = torch.tensor(False)  # whether this worker could not use its gradient in the step that is tried

    def passes(self, source: Source, step: int) -> bool:
        """Whether this worker's gradient is finite, in a step without an exchange; else the step is left out here."""
        if self.most is None:
            return True
        name = source.first_bad()
        if name is None and not self.overflowed:
            self.in_a_row = 0
            return True
        self._enter(Skip(step, (self._channel.group.rank,), name or "what a GradScaler has unscaled"))
        return False

    def inspect(self, vector: Tensor, *, blank: bool) -> None:
        """Look at what this worker is to send, float[d]; if it is of no use, make it zeros where `blank`."""
        if self.most is None:
            return
        bad = ~is_finite(vector)
        # Steps without an exchange were left out here alone; now the others can hear of it.
        self._bad = torch.ones_like(bad) if self.overflowed or self.in_a_row > self.most else bad
        if blank:
            spoil(vector, self._bad, 0.0)

    def mark(self, dense: Tensor) -> Tensor:
        """Return the dense part, float[n], as it is to be averaged: NaNs say that the step cannot be taken.

        It is changed in place, as `inspect` has changed what it is a part of.
        """
        if self.most is None:
            return dense
        marked = dense if len(dense) else dense.new_zeros(1)
        spoil(marked, self._bad, float("nan"))
        return marked

    def agrees(self, mean: Tensor) -> bool:
        """Whether all workers can take the step, from the mean of what `mark` returned, float[n]."""
        return self.most is None or bool(is_finite(mean))

    def leave_out(self, source: Source, step: int) -> None:
        """Enter a step that all leave out; collective. Raises NonFiniteError if there were too many in a row."""
        name = (source.first_bad() or "the sum of what was left and the gradient") if self._bad else ""
        text, row = torch.tensor(list(name.encode()), dtype=torch.uint8), torch.tensor([self.in_a_row + 1])
        parts = {"name": text.to(self._bad.device), "row": row.to(self._bad.device)}
        gathered = self._channel.gather(parts, fixed_size=False, purpose="guard")
        names = [bytes(p["name"].tolist()).decode() for p in gathered]
        workers = tuple(worker for worker, found in enumerate(names) if found)
        self._enter(Skip(step, workers, names[workers[0]] if workers else "a mean of finite gradients"))
        longest = max(int(p["row"]) for p in gathered)
        if self.most is not None and longest > self.most:
            raise NonFiniteError(
                f"{self.skips[-1]}: {longest} in a row could not be taken, and max_skipped={self.most}; parameters, "
                f"error memories and step count are as before. Is the learning rate too high, or the data bad?"
            )

    def took(self) -> None:
        """Know that the step was taken."""
        self.in_a_row = 0

    def _enter(self, skip: Skip) -> None:
        self.skips.append(skip)
        self.skipped += 1
        self.in_a_row += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self.skips = []
