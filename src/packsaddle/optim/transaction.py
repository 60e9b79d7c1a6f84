"""The exchange of one backward pass, made in several parts and taken as a whole or not at all."""

from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Channel
from packsaddle.comm.ledger import Ledger
from packsaddle.optim.allocation import Allocation
from packsaddle.optim.error_feedback import Exchanger, Rules
from packsaddle.optim.stages.contraction import Every, contraction
from packsaddle.optim.stages.nonfinite import Skip, Skips


class Transaction:
    """The parts that have been tried in the pass under way, or the last one, and the count of those that were taken.

    What came of a pass is read when somebody asks or the next one begins, so that a pass waits for no GPU. `d` is the
    number of coordinates that all parts compress together.
    """

    def __init__(self, channel: Channel, rules: Rules, monitor: Every, d: int) -> None:
        self.channel = channel
        self._allocation = Allocation(d)
        self._rules, self._monitor = rules, monitor
        self._lock = RLock()  # a backward pass may read what a background thread is making
        self._skips = Skips(rules.max_skipped, channel.group.rank)
        self._steps = 0
        self._contraction: float | None = None
        self._tried: list[Exchanger] = []
        self._bad: list[Tensor] = []  # what `Exchanger.exchange` has returned
        self._bad_name = ""  # the first parameter of which this worker's vector was not finite
        self._complete = False
        self._energies: list[Tensor] = []  # ||v||^2 and ||v - C(v)||^2 of each part

    @property
    def ledger(self) -> Ledger:
        """The bytes this worker sent and received, by step and purpose."""
        return self.channel.ledger

    @property
    def steps(self) -> int:
        """How many exchanges have been taken, so without those that were `skipped`."""
        self._settle()
        return self._steps

    @property
    def skipped(self) -> int:
        """How many steps were not taken, since a worker's gradient, or the mean, was not finite."""
        self._settle()
        return self._skips.count

    @property
    def skips(self) -> list[Skip]:
        """Those steps, since this was made or loaded; each worker names its own part."""
        self._settle()
        return self._skips.list

    @property
    def contraction(self) -> float | None:
        """The share of its energy that this worker's vector kept when last measured (see `monitor_every`)."""
        self._settle()
        return self._contraction

    def protect(self, optimizer: Optimizer) -> None:
        """Keep an optimizer from using the gradients of an exchange that was not taken, as scalers do by themselves.

        It finds no gradients then, and so leaves parameters and its own state alone. Not where `step` has a closure.
        """
        if self._skips.most is not None:
            optimizer.register_step_pre_hook(self._withhold)

    def _withhold(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._settle()
        if self._skips.in_a_row:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = None

    def _open(self) -> None:
        """Begin a pass, once what came of the last one is known."""
        self._settle(broken_off=True)
        self._skips.check(self._skips.in_a_row)
        self.channel.step = self._steps
        self._allocation.begin(self._rules.at(self._steps))

    def _try(self, exchanger: Exchanger, exchange: Callable[..., Tensor]) -> Tensor:
        """Make one part of the pass; return its outcome, as `Exchanger.exchange` does."""
        with self._lock:
            self._tried.append(exchanger)
        bad = exchange(watch=self._measure, report=self._report)
        self._bad.append(bad)
        return bad

    def _settle(self, *, broken_off: bool = False) -> None:
        """Make the last step the state; or forget it, if it was broken off or a worker's gradient was not finite.

        Nothing while a backward pass is under way.
        """
        with self._lock:
            if not self._tried or not (self._complete or broken_off):
                return
            told = [bad for bad in torch.stack(self._bad).tolist() if bad != 0] if self._complete else []
            taken = self._complete and not told
            self._conclude(taken=taken)
            self._allocation.settle(taken=taken)
            for exchanger in self._tried:
                exchanger.settle(taken=taken)
            if taken and self._energies:
                self._contraction = contraction(*torch.stack(self._energies).view(-1, 2).sum(0).tolist())
                self._monitor.done(self._steps)
            if taken:
                self._skips.took()
            elif self._complete:
                workers = (self.channel.group.rank,) if self._bad_name else ()
                others = "a gradient of another worker" if min(told) <= 1 else "a mean of finite gradients"
                self._skips.enter(Skip(self._steps, workers, self._bad_name or others))
            self._steps += taken
            self._tried, self._bad, self._complete, self._energies, self._bad_name = [], [], False, [], ""

    def _conclude(self, *, taken: bool) -> None:
        """Do what else depends on whether a step was taken."""

    def _report(self, name: str) -> None:
        self._bad_name = self._bad_name or name

    def _measure(self, vector: Tensor) -> None:
        if self._monitor.due(self._steps):
            self._energies.append(torch.linalg.vector_norm(vector, dtype=torch.float64).square())
