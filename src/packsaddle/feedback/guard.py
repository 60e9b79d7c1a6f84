"""The guard of an exchange: an invalid v, with an Inf or NaN or too large, is rejected by all workers, and counted.

A worker whose v is invalid sends zeros and a flag, which is averaged with the rest, so all workers read the same
`Verdict` and apply the exchange, or none does. `Skips` counts the rejected ones.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged
from packsaddle.errors import GuardError
from packsaddle.feedback.memory import Update
from packsaddle.feedback.slices import Slice
from packsaddle.feedback.state import Value, attribute
from packsaddle.messages import numbered
from packsaddle.numerics.finite import fill_where, first_out_of_range, is_in_range

_log = logging.getLogger("packsaddle")

THE_SUM = "the sum of the error memory and the gradient"  # where both are finite
ROOT = "the root module"  # FSDP calls it ""
THE_MEAN = "a mean of finite gradients"
_UNPROTECTED = "unless a GradScaler skips it, the optimizer steps by NaNs: call hook.protect(optimizer)"


class NonFiniteError(GuardError):
    """The error after more than `max_skipped` consecutive steps were skipped because a gradient was not finite.

    Parameters and error memories are as before the first of them. Local updates raise it also if the inner optimizer
    of a worker cannot be reset.

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
    """A skipped step, or a rejected round.

    >>> import torch
    >>> from packsaddle import CompressedSGD, TopK
    >>> weight = torch.nn.Parameter(torch.ones(64, 64))
    >>> opt = CompressedSGD([weight], 0.1, TopK(1.0))
    >>> weight.grad = torch.full((64, 64), float("nan"))
    >>> opt.step()
    >>> opt.skips
    [Skip(step=0, workers=(0,), parameter='parameter 0')]
    """

    step: int  # t; the next step reuses this index
    workers: tuple[int, ...]  # ranks with an invalid vector; behind a hook only this worker's own
    parameter: str  # the first invalid parameter of the first of these workers

    def __str__(self) -> str:
        where = f" on {numbered('worker', self.workers)}" if self.workers else ""
        return f"step {self.step}: {self.parameter} is not finite{where}"


class Skips:
    """Counts skipped steps, and raises NonFiniteError after more than `most` consecutive ones; None: never.

    `protected`: a skipped step leaves the parameters unchanged; behind a hook another optimizer may step by NaNs.
    """

    def __init__(self, most: int | None, rank: int, *, protected: bool = True) -> None:
        self.most, self._rank, self.protected = most, rank, protected
        self.list: list[Skip] = []  # since construction or loading
        self.count = self.in_a_row = 0

    def record(self, skip: Skip) -> None:
        """Record a skipped step. Its first worker, or rank 0, logs it at consecutive counts 1, 2, 4, ..."""
        self.list.append(skip)
        self.count += 1
        self.in_a_row += 1
        is_mine = skip.workers[:1] == (self._rank,) or (not skip.workers and self._rank == 0)
        if is_mine and self.in_a_row & (self.in_a_row - 1) == 0:
            row = f" ({self.in_a_row} in a row)" if self.in_a_row > 1 else ""
            _log.warning("%s; %s%s", skip, "the step is skipped" if self.protected else _UNPROTECTED, row)

    def reset_streak(self) -> None:
        """Reset the count of consecutive skips."""
        self.in_a_row = 0

    def check(self, in_a_row: int) -> None:
        """Raise NonFiniteError, naming the last skip, if `in_a_row` are too many."""
        if self.most is not None and in_a_row > self.most:
            same = "Parameters, error memories and step count are unchanged."
            if not self.protected:
                same = f"Error memories and step count are unchanged, but {_UNPROTECTED}."
            raise NonFiniteError(
                f"{self.list[-1]}; {in_a_row} consecutive step{'s' * (in_a_row > 1)} skipped, more than "
                f"max_skipped={self.most}. "
                f"{same} Lower the learning rate or check the data"
            )

    def fields(self) -> list[Value]:
        """Return the fields of the saved state: the counts."""
        return [
            Value(("skips", "total"), int, lambda: self.count, self._resume),
            attribute(("skips", "consecutive"), self, "in_a_row", int),
        ]

    def _resume(self, total: int) -> None:
        self.count, self.list = total, []


@dataclass
class Verdict:
    """The outcome of an exchange, applied or rejected, from averaged numbers; on the device until it is read."""

    fraction: Tensor | None  # float[], of workers with an invalid v; None: they have sent NaNs
    magnitude: Tensor | float  # an approximate maximum of the mean, float64[]; non-finite if the mean is
    fits: Tensor | bool = True  # the target can hold the mean

    def code(self) -> Tensor:
        """Return 0 if the exchange is applied, at most 1 if a worker's v is invalid, 2 or more if the mean is."""
        assert self.fraction is not None
        fits = torch.as_tensor(self.fits, device=self.fraction.device)
        return self.fraction + 2 * (~fits).to(self.fraction)

    def read(self) -> bool:
        """Return True if the exchange is applied. Waits for the device once; `magnitude` is a float afterwards."""
        if self.fraction is None:
            self.magnitude = float(self.magnitude)
            return math.isfinite(self.magnitude)
        fraction, self.magnitude = torch.stack([self.fraction.double(), torch.as_tensor(self.magnitude)]).tolist()
        return fraction == 0 and math.isfinite(self.magnitude)


class Guard:
    """Validates this worker's v, and flags an invalid one to all workers in the exchange.

    Args:
        flag: "dense" sets the uncompressed part to NaN, or sends a number more where there is none; "extra" always
            sends a number, the fraction of workers with an invalid v; "none" checks nothing.
        unnamed: the name of an invalid v whose tensors are all valid. None: tensors are not named.
        agree: returns whether a bool[] is True on any shard of this worker; collective over the shards.
    """

    def __init__(
        self,
        flag: Literal["dense", "extra", "none"],
        *,
        unnamed: str | None = None,
        agree: Callable[[Tensor], Tensor] = lambda invalid: invalid,
    ) -> None:
        self._flag, self._unnamed, self._agree = flag, unnamed, agree

    def numbers(self, dense: int) -> int:
        """Return the length of the uncompressed part of an exchange with `dense` uncompressed coordinates."""
        return {"dense": max(dense, 1), "extra": dense + 1, "none": dense}[self._flag]

    def validate(self, v: Tensor, update: Update, of: Slice, *, blank: bool) -> tuple[Tensor, str]:
        """Return whether v, float[n], is invalid, bool[], and on a CPU its first invalid tensor's name, or "".

        An invalid v is set to zero if `blank`. A finite `update.norm` saves a pass over v.
        """
        if self._flag == "none":
            return torch.tensor(False), ""
        norm = update.norm
        known = norm is not None and bool(norm.isfinite())
        invalid = torch.tensor(False) if known else ~is_in_range(v)
        invalid = self._agree(torch.ones_like(invalid) if update.is_known_invalid else invalid)
        name = ""
        if self._unnamed is not None and v.device.type == "cpu" and invalid:
            named = ((place.name or ROOT, view) for place, view in of.named(v))
            name = first_out_of_range(named) or self._unnamed
        if blank:
            fill_where(v, invalid, 0.0)
        return invalid, name

    def flag(self, dense: Tensor, invalid: Tensor) -> Tensor:
        """Return the flag, float[0 or 1], that is averaged with the uncompressed part of v, float[m].

        Without a number of its own it is in `dense`, which is changed in place.
        """
        if self._flag == "none":
            return dense[:0]
        if self._flag == "extra":
            return invalid.reshape(1).to(dense)
        flag = dense[:0] if len(dense) else dense.new_zeros(1)
        fill_where(dense if len(dense) else flag, invalid, float("nan"))
        return flag

    def verdict(self, g: Averaged, flag: Tensor) -> Verdict:
        """Return the verdict on an exchange, of which `flag` is the mean of the workers' flags."""
        if self._flag == "none":
            return Verdict(None, 0.0)
        if self._flag == "extra":
            return Verdict(flag[0].clone(), g.magnitude())  # the aggregator reuses its buffer
        return Verdict(None, (replace(g, dense=flag) if len(flag) else g).magnitude())
