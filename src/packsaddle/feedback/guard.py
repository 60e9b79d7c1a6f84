"""Validation of an exchange: all workers reject it if one worker's vector is invalid (Inf, NaN or too large numbers).

A worker whose vector v is invalid sends zeros and a flag. The flags are averaged with the messages, so all workers
compute the same `Verdict`: all apply the exchange, or all reject it. `Skips` counts rejected exchanges.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged
from packsaddle.errors import GuardError
from packsaddle.feedback.checks import Drift, DriftGuard
from packsaddle.feedback.memory import Update
from packsaddle.feedback.report import Report
from packsaddle.feedback.slices import Slice
from packsaddle.feedback.state import Value, attribute
from packsaddle.messages import numbered
from packsaddle.numerics.finite import fill_where, first_out_of_range, is_in_range
from packsaddle.numerics.transfers import read

_log = logging.getLogger("packsaddle")

THE_SUM = "the sum of the error memory and the gradient"  # name in a report if only the sum is invalid
ROOT = "the root module"  # name of the root module in messages, since FSDP's name for it is ""
THE_UPDATE = "all parameters together"  # name in a report if only the whole local update is invalid
THE_MEAN = "a mean of finite gradients"
_ADVICE = "Lower the learning rate or check the data"
_UNPROTECTED = "unless a GradScaler skips it, the optimizer steps by NaNs: call hook.protect(optimizer)"


class NonFiniteError(GuardError):
    """Raised after more than `max_skipped` consecutive steps were skipped because of an invalid gradient or update.

    Parameters (unless a hook's optimizer applied NaN gradients) and error memories did not change in these steps. Local
    updates also raise it if a worker's inner optimizer cannot be reset.
    """


@dataclass(frozen=True)
class Skip:
    """A skipped step, or a rejected round of local updates, with its cause."""

    step: int  # index t of the skipped step; the next step reuses this index
    # Ranks that sent an invalid vector or message. A hook lists only the ranks that it has detected.
    workers: tuple[int, ...]
    parameter: str  # name of the first invalid parameter on workers[0]
    message: str = ""  # the error, if workers[0] sent an invalid message; "": the cause is an invalid vector
    is_round: bool = False  # True: a round of local updates, and `step` is the round's index

    @classmethod
    def of(cls, step: int, reports: Mapping[int, Report], unnamed: str, *, is_round: bool = False) -> "Skip":
        """Make the record of a skipped `step` from the workers' reports, by rank. If all reports are valid, the name of
        the parameter is `unnamed`. With `is_round`, `step` is the index of a round."""
        found = {worker: report for worker, report in reports.items() if report}
        for report in found.values():
            if report.kind == "message":
                return cls(step, (report.worker,), "", report.name, is_round)
        prefix = "the local update of " if is_round else ""
        named = next((prefix + report.name for report in found.values()), unnamed)
        return cls(step, tuple(found), named, is_round=is_round)

    def __str__(self) -> str:
        index = f"{'round' if self.is_round else 'step'} {self.step}"
        if self.message:
            return f"{index}: {self.message}"
        where = f" on {numbered('worker', self.workers)}" if self.workers else ""
        return f"{index}: {self.parameter} is not finite{where}"


class Skips:
    """Counts skipped steps, and raises NonFiniteError if more than `most` consecutive steps were skipped. If `most` is
    None, there is no limit.

    `protected` is False for a hook whose optimizer may apply the NaN gradients of a skipped step.
    """

    def __init__(self, most: int | None, rank: int, *, protected: bool = True) -> None:
        self.most, self._rank, self.protected = most, rank, protected
        self.list: list[Skip] = []  # the skipped steps since construction or loading
        self.count = self.in_a_row = 0

    def record(self, skip: Skip) -> None:
        """Record a skipped step, and log it if it is the 1st, 2nd, 4th, 8th, ... consecutive one.

        The step is logged by the first of `skip.workers`, or by rank 0 if no worker is known. A step with an invalid
        message is logged by every worker that records it.
        """
        self.list.append(skip)
        self.count += 1
        self.in_a_row += 1
        is_mine = skip.message or skip.workers[:1] == (self._rank,) or (not skip.workers and self._rank == 0)
        if is_mine and self.in_a_row & (self.in_a_row - 1) == 0:
            row = f" ({self.in_a_row} in a row)" if self.in_a_row > 1 else ""
            outcome = "the round is rejected" if skip.is_round else "the step is skipped"
            _log.warning("%s; %s%s", skip, outcome if self.protected else _UNPROTECTED, row)

    def reset_streak(self) -> None:
        self.in_a_row = 0

    def check(self, in_a_row: int) -> None:
        """Raise NonFiniteError, naming the last skipped step, if `in_a_row`, a number of consecutive skipped steps,
        exceeds the limit."""
        if self.most is not None and in_a_row > self.most:
            same = "Parameters, error memories and step count are unchanged."
            if not self.protected:
                same = f"Error memories and step count are unchanged, but {_UNPROTECTED}."
            one, done = "step", "skipped"
            if self.list[-1].is_round:
                same, one, done = "The anchor and the error memories are unchanged.", "round", "rejected"
            raise NonFiniteError(
                f"{self.list[-1]}; {in_a_row} consecutive {one}{'s' * (in_a_row > 1)} {done}, more than "
                f"max_skipped={self.most}. "
                f"{same} {'Check the memory and the network of that worker' if self.list[-1].message else _ADVICE}"
            )

    def fields(self) -> list[Value]:
        return [
            Value(("skips", "total"), int, lambda: self.count, self._resume),
            attribute(("skips", "consecutive"), self, "in_a_row", int),
        ]

    def _resume(self, total: int) -> None:
        self.count, self.list = total, []


class Records:
    """The records that an exchange keeps: its skipped steps, and the comparisons that found workers to differ. In local
    updates, a skipped step is a rejected round."""

    _skips: Skips
    _drift: DriftGuard

    def _settle(self) -> None:
        """No-op. Hooks override this method to read the outcomes of finished exchanges."""

    @property
    def skips(self) -> list[Skip]:
        """The skipped steps since construction or loading (see `Compression.max_skipped`). In local updates, these are
        the rejected rounds. A hook names only invalid parameters of this worker."""
        self._settle()
        return self._skips.list

    @property
    def skipped(self) -> int:
        """The total number of skipped steps. In local updates, this is the number of rejected rounds."""
        self._settle()
        return self._skips.count

    @property
    def drifts(self) -> list[Drift]:
        """The comparisons that found parameters to differ between workers (see `Compression.compare_every`)."""
        return self._drift.found

    def reset_skip_streak(self) -> None:
        """Reset the count of consecutive skips, so that training may continue after NonFiniteError."""
        self._skips.reset_streak()


@dataclass
class Verdict:
    """The outcome of an exchange, applied or rejected, as numbers averaged over workers. The numbers are on the device
    until `read` copies them to the host."""

    # The fraction of workers whose vector v is invalid, float[], or a number after `read`. None: an invalid v is
    # flagged by NaNs in the mean, or is not detected.
    fraction: Tensor | float | None
    # The approximate maximum magnitude of the mean update, float64[]. If the mean update is non-finite, so is this
    # number.
    magnitude: Tensor | float
    fits: Tensor | bool = True  # False: the result would overflow the parameters or gradients

    def code(self, is_unlike: Tensor | bool = False) -> Tensor:
        """Return the outcome as three numbers, float[3], which are all 0 if the exchange is applied.

        The first is the fraction of workers with an invalid vector, or NaN if a message is invalid. The second is 1 if
        the result would overflow. The third is 1 if workers exchanged different sets of parameters (`is_unlike`).
        """
        assert isinstance(self.fraction, Tensor)
        flags = [self.fits, is_unlike]
        fits, unlike = (f.to(self.fraction) if isinstance(f, Tensor) else self.fraction.new_full((), f) for f in flags)
        return torch.stack([self.fraction, 1 - fits, unlike])

    def read(self) -> bool:
        """Copy the numbers of this outcome to the host, and return True if the exchange is applied. The host waits for
        the device once."""
        return self.settle(*read(*self.tensors()))

    def tensors(self) -> list[Tensor]:
        """Return two tensors, to be read on the host and passed to `settle`: the fraction of workers with an invalid
        vector, and the magnitude of the mean update. If the fraction is None, only the magnitude is returned."""
        return [torch.as_tensor(number) for number in (self.fraction, self.magnitude) if number is not None]

    def settle(self, *numbers: float) -> bool:
        """Set the fraction of workers with an invalid vector, and the magnitude of the mean update, to `numbers`. These
        are the values, read on the host, of the tensors that the method `tensors` returns. Returns True if the exchange
        is applied."""
        *fraction, self.magnitude = numbers
        if fraction:
            (self.fraction,) = fraction
        # A NaN fraction is True in `any`, so it rejects the exchange.
        return not any(fraction) and math.isfinite(self.magnitude)


class Guard:
    """Validates this worker's vector to send, v, and reports an invalid v to all workers within the exchange.

    Args:
        flag: how an invalid v is flagged. "dense": by NaNs in the uncompressed part, or in an extra number if that is
            empty; "extra": always by an extra number, whose mean is `Verdict.fraction`; "none": no checks.
        unnamed: the name reported for an invalid v whose tensors are all valid here. If None, no names are reported.
        agree: a function that reduces a bool[...] with OR over the processes of this worker; collective over them.
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
        """Return how many numbers an exchange sends uncompressed, including the flag that is sent if the vector to send
        is invalid. `dense` is the number of the vector's uncompressed coordinates."""
        return {"dense": max(dense, 1), "extra": dense + 1, "none": dense}[self._flag]

    def validate(self, v: Tensor, update: Update, of: Slice) -> tuple[Tensor, Report]:
        """Return a bool[] that is True if v, float[n], the vector to send, is invalid, and a report, which on a CPU
        names the first invalid tensor. An invalid v is filled with zeros. If `update.norm` is finite, v need not be
        read to validate it."""
        report = Report()
        if self._flag == "none":
            return torch.tensor(False), report
        known = (norm := update.norm) is not None and bool(norm.isfinite())
        invalid = torch.tensor(False) if known else ~is_in_range(v)
        invalid = self._agree(torch.ones_like(invalid) if update.is_known_invalid else invalid)
        if self._unnamed is not None and v.device.type == "cpu" and invalid:
            named = ((place.name or ROOT, view) for place, view in of.named(v))
            report = Report("vector", first_out_of_range(named, self._agree) or self._unnamed)
        fill_where(v, invalid, 0.0)
        return invalid, report

    def flag(self, dense: Tensor, invalid: Tensor) -> tuple[Tensor, int | None]:
        """Return a flag, float[1] or float[0], that reports to all workers whether this worker's vector to send, v, is
        invalid. The flag is averaged over workers together with `dense`, float[m], the uncompressed part of v.

        With flag="dense", an invalid v is flagged by setting `dense` to NaN in place, unless `dense` is empty. Also
        returns the index in the vector [dense, flag] of a number whose NaN mean rejects the exchange, or None if there
        are no checks.
        """
        if self._flag == "none":
            return dense[:0], None
        if self._flag == "extra":
            return invalid.reshape(1).to(dense), len(dense)
        flag = dense[:0] if len(dense) else dense.new_zeros(1)
        fill_where(dense if len(dense) else flag, invalid, float("nan"))
        return flag, 0

    def verdict(self, g: Averaged, flag: Tensor) -> Verdict:
        if self._flag == "none":
            return Verdict(None, 0.0)
        if self._flag == "extra":
            # Copy the flag, since the aggregator reuses its buffer.
            return Verdict(flag[0].clone(), g.magnitude())
        return Verdict(None, (replace(g, dense=flag) if len(flag) else g).magnitude())
