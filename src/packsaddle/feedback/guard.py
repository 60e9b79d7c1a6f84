"""Validation of an exchange: all workers reject it if the vector of one worker is invalid, i.e. has Infs, NaNs or too
large numbers.

A worker whose vector v is invalid sends zeros, and a flag that marks them as invalid. The flags are averaged with the
messages, so all workers compute the same `Verdict`: all apply the exchange, or all reject it. `Skips` counts the
rejected exchanges.
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
from packsaddle.feedback.memory import Update
from packsaddle.feedback.report import Report
from packsaddle.feedback.slices import Slice
from packsaddle.feedback.state import Value, attribute
from packsaddle.messages import numbered
from packsaddle.numerics.devices import read
from packsaddle.numerics.finite import fill_where, first_out_of_range, is_in_range

_log = logging.getLogger("packsaddle")

# Name in a report if the gradients are valid, but their sum with the error memory is invalid.
THE_SUM = "the sum of the error memory and the gradient"
ROOT = "the root module"  # name of the root module in messages; FSDP's own name for it is ""
# Name in a report if each parameter's local update is valid, but all together are invalid.
THE_UPDATE = "all parameters together"
THE_MEAN = "a mean of finite gradients"
_ADVICE = "Lower the learning rate or check the data"
_UNPROTECTED = "unless a GradScaler skips it, the optimizer steps by NaNs: call hook.protect(optimizer)"


class NonFiniteError(GuardError):
    """Raised after more than `max_skipped` consecutive steps were skipped because of an invalid gradient or update.

    The skipped steps changed neither error memories nor parameters. In one case parameters may have changed: a hook
    without a protected optimizer cannot prevent the optimizer from applying NaN gradients.
    """


@dataclass(frozen=True)
class Skip:
    """The record of a skipped step, or with local updates of a rejected round, with its cause."""

    index: int  # index t of the skipped step or rejected round; the next step or round has the same index
    # Ranks of the workers that sent an invalid vector or message. The list of a hook may be incomplete.
    workers: tuple[int, ...]
    parameter: str  # name of the first invalid parameter of the worker workers[0]
    error: str = ""  # the error in the message of workers[0]; "": its message is valid, but its vector is invalid
    is_round: bool = False  # True: a round of local updates; False: a step

    @classmethod
    def of(cls, index: int, reports: Mapping[int, Report], unnamed: str, *, is_round: bool = False) -> "Skip":
        """Return the record of the skipped step or rejected round with this index, from the workers' reports.

        `reports` maps ranks to reports. If all of them are valid, the name of the invalid parameter is `unnamed`.
        `is_round` is True for a round of local updates.
        """
        found = {worker: report for worker, report in reports.items() if report}
        for report in found.values():
            if report.kind == "message":
                return cls(index, (report.worker,), "", report.name, is_round)
        prefix = "the local update of " if is_round else ""
        named = next((prefix + report.name for report in found.values()), unnamed)
        return cls(index, tuple(found), named, is_round=is_round)

    @property
    def message(self) -> str:
        """The record as a sentence, such as "round 3: w is not finite on worker 0"."""
        index = f"{'round' if self.is_round else 'step'} {self.index}"
        if self.error:
            return f"{index}: {self.error}"
        where = f" on {numbered('worker', self.workers)}" if self.workers else ""
        return f"{index}: {self.parameter} is not finite{where}"

    def __str__(self) -> str:
        return self.message


class Skips:
    """The records of skipped steps. Raises NonFiniteError if more than `most` consecutive steps were skipped; None sets
    no limit.

    `protected` is False for a hook whose optimizer may apply the NaN gradients of a skipped step.
    """

    def __init__(self, most: int | None, rank: int, *, protected: bool = True) -> None:
        self.most, self._rank, self.protected = most, rank, protected
        self.list: list[Skip] = []  # the records of the skipped steps since construction or loading, oldest first
        self.count = self.in_a_row = 0

    def record(self, skip: Skip) -> None:
        """Record a skipped step. Log it if the number of consecutive skipped steps is now a power of 2.

        If the cause is an invalid vector, only the first of `skip.workers` logs it, or rank 0 if this list is empty. If
        the cause is an invalid message, every worker logs it.
        """
        self.list.append(skip)
        self.count += 1
        self.in_a_row += 1
        is_mine = skip.error or skip.workers[:1] == (self._rank,) or (not skip.workers and self._rank == 0)
        if is_mine and self.in_a_row & (self.in_a_row - 1) == 0:
            row = f" ({self.in_a_row} in a row)" if self.in_a_row > 1 else ""
            outcome = "the round is rejected" if skip.is_round else "the step is skipped"
            _log.warning("%s; %s%s", skip, outcome if self.protected else _UNPROTECTED, row)

    def reset_streak(self) -> None:
        self.in_a_row = 0

    def check(self, in_a_row: int) -> None:
        """Raise NonFiniteError if `in_a_row`, the number of consecutive skipped steps, exceeds the limit.

        The message names the last skipped step.
        """
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
                f"{same} {'Check the memory and the network of that worker' if self.list[-1].error else _ADVICE}"
            )

    def fields(self) -> list[Value]:
        return [
            Value(("skips", "total"), int, lambda: self.count, self._resume),
            attribute(("skips", "consecutive"), self, "in_a_row", int),
        ]

    def _resume(self, total: int) -> None:
        self.count, self.list = total, []


class Records:
    """The records that an exchanging object keeps of its skipped steps. With local updates, they are those of rejected
    rounds."""

    _skips: Skips

    def _settle(self) -> None:
        """No-op. Hooks override this method to read the outcomes of finished exchanges."""

    @property
    def skips(self) -> list[Skip]:
        """The records of the skipped steps since construction or loading, oldest first (see `Compression.max_skipped`).
        With local updates, these are the rejected rounds. A hook names only the invalid parameters of this worker."""
        self._settle()
        return self._skips.list

    @property
    def skipped(self) -> int:
        """The total number of skipped steps. In local updates, this is the number of rejected rounds."""
        self._settle()
        return self._skips.count

    def reset_skip_streak(self) -> None:
        """Set the count of consecutive skipped steps to 0, so that training may continue after a NonFiniteError."""
        self._skips.reset_streak()


@dataclass
class Verdict:
    """The outcome of an exchange, applied or rejected. It is computed from numbers averaged over workers, so it is
    identical on all workers.

    The numbers stay on the device until `read` copies them to the host.
    """

    # The fraction of workers whose vector v is invalid: a float[], or after `read` a number. None: an invalid v is
    # flagged by NaNs in the mean instead, or v is not validated.
    fraction: Tensor | float | None
    # The approximate maximum of the absolute values of the mean update: a float64[], or after `read` a number. It is
    # non-finite if the mean update is.
    magnitude: Tensor | float
    fits: Tensor | bool = True  # False: parameters or gradients would overflow if the mean update were applied

    def code(self, is_unlike: Tensor | bool = False) -> Tensor:
        """Return the outcome as three numbers, float[3], which are all 0 if the exchange is applied.

        The first number is the fraction of workers with an invalid vector, or NaN if a message is invalid. The second
        is 1 if the parameters or gradients would overflow, and otherwise 0. The third is `is_unlike`: 1 if the workers
        exchanged different sets of parameters, and otherwise 0.
        """
        assert isinstance(self.fraction, Tensor)
        flags = [self.fits, is_unlike]
        fits, unlike = (f.to(self.fraction) if isinstance(f, Tensor) else self.fraction.new_full((), f) for f in flags)
        return torch.stack([self.fraction, 1 - fits, unlike])

    def read(self) -> bool:
        """Copy the numbers of this outcome to the host, where they replace the tensors. Return True if the exchange is
        applied.

        The host waits for the device once.
        """
        return self.settle(*read(*self.tensors()))

    def tensors(self) -> list[Tensor]:
        """Return the tensors whose values `settle` needs: the fraction of workers with an invalid vector, and the
        magnitude of the mean update.

        If `fraction` is None, only the magnitude is returned.
        """
        return [torch.as_tensor(number) for number in (self.fraction, self.magnitude) if number is not None]

    def settle(self, *numbers: float) -> bool:
        """Replace the tensors of this outcome by their values. Return True if the exchange is applied.

        `numbers` are the values of the tensors that the method `tensors` has returned, in the same order, read on the
        host.
        """
        *fraction, self.magnitude = numbers
        if fraction:
            (self.fraction,) = fraction
        # `any` counts NaN as True, so a NaN fraction rejects the exchange.
        return not any(fraction) and math.isfinite(self.magnitude)


class Guard:
    """Validates the vector v that this worker sends, and reports an invalid v to all workers within the exchange.

    Args:
        flag: how an invalid v is reported. "dense": by NaNs in its uncompressed part, or in an extra number if that
            part is empty. "extra": by an extra number, 1 if v is invalid and else 0, whose mean is `Verdict.fraction`.
            "none": v is not validated.
        unnamed: the name in the report of an invalid v whose tensors are all valid on this worker. If None, reports
            name no tensor.
        agree: a function that combines a bool[] of each process of this worker by OR; collective over these processes.
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
        """Return the number of uncompressed numbers in an exchange: the uncompressed coordinates of the vector, and the
        flag, if it is an extra number.

        `dense` is the number of uncompressed coordinates.
        """
        return {"dense": max(dense, 1), "extra": dense + 1, "none": dense}[self._flag]

    def validate(self, v: Tensor, update: Update, of: Slice) -> tuple[Tensor, Report]:
        """Validate the vector to send, v, float[n], and fill it with zeros if it is invalid.

        Returns a bool[] that is True if v is invalid, and a report. On a CPU the report names the first invalid tensor.
        If `update.norm` is finite, v is assumed to be valid and is not read.
        """
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
        """Return the flag that reports to all workers whether this worker's vector to send, v, is invalid.

        Args:
            dense: the uncompressed part of v, float[m]. The flag is averaged over workers together with it.
            invalid: bool[], True if v is invalid.

        Returns a pair. The first item is the flag: a float[1], or a float[0] if an invalid v is flagged by NaNs in
        `dense`, which are written in place, or is not flagged. The second item is an index in the vector [dense, flag]:
        a mean of NaN at this index rejects the exchange. It is None if v is not validated.
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
