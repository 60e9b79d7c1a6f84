"""Rules of local updates: when fragments are exchanged and how, and what goes together."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from packsaddle.comm.aggregators import Aggregator, AllGather, AllReduce
from packsaddle.optim.fragment import Reduction
from packsaddle.optim.participation import Participation


@dataclass(frozen=True)
class LocalRules:
    """The period, overlap and mean of exchanges; see `LocalUpdates`. Raises ValueError for bad arguments."""

    every: int
    fragments: int
    delay: int
    decay: float
    blend: float | None
    reduction: Reduction

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("fragments", 1), ("delay", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.fragments > self.every:
            raise ValueError(
                f"fragments must be at most every = {self.every}, so that each has a step, got {self.fragments}"
            )
        if self.delay >= self.every:
            raise ValueError(
                f"delay must be below every = {self.every} steps, so that rounds do not meet, got {self.delay}"
            )
        if not (isinstance(self.decay, int | float) and math.isfinite(self.decay) and 0 < self.decay <= 1):
            raise ValueError(f"decay must be in (0, 1], got {self.decay!r}")
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise ValueError(f"blend must be None or in [0, 1], got {self.blend!r}")
        if self.blend is not None and not self.delay:
            raise ValueError("blend needs a delay above 0: without one there is nothing to blend with")
        if self.reduction not in get_args(Reduction):
            raise ValueError(f'reduction must be "mean" or "senders", got {self.reduction!r}')

    def check_participation(
        self, who: Participation, aggregators: Iterable[Aggregator], *, escapes: bool, managed: bool
    ) -> None:
        """Raise ValueError for what does not go with weights, or with a sample of workers in each round."""
        if who.is_even:
            return
        if managed:
            raise ValueError("weight and sample are for a fixed set of workers; with a manager, Elastic has a weight")
        if escapes:
            raise ValueError("escape must be None with weight or sample: its checks are of the mean of all workers")
        if self.reduction != "mean":
            raise ValueError(f'reduction must be "mean" with weight or sample, got {self.reduction!r}')
        if who.samples and self.delay:
            raise ValueError(f"delay must be 0 with sample below 1, got {self.delay}")
        if who.samples:
            _check_direct(aggregators, "with sample below 1")
        # An owner's residual is of the weighted mean, and a round that sends it would weigh it again.
        if any(type(aggregator).add_residual is not Aggregator.add_residual for aggregator in aggregators):
            raise ValueError('exchange must be "direct" with weight: what owners hold back would be weighed twice')

    def check_elastic(self, aggregators: Iterable[Aggregator], *, escapes: bool, sharded: bool) -> None:
        """Raise ValueError for what does not go with workers that come and go."""
        if self.delay:
            raise ValueError(f"delay must be 0 with a manager, whose rounds end before the next step, got {self.delay}")
        if escapes:
            raise ValueError("escape must be None with a manager: its checks are of workers that are all there")
        if self.reduction != "mean":
            raise ValueError(f'reduction must be "mean" with a manager, got {self.reduction!r}')
        if sharded:
            raise ValueError("parameters must be whole on each worker with a manager, and some are DTensors")
        _check_direct(aggregators, "with a manager")


def _check_direct(aggregators: Iterable[Aggregator], where: str) -> None:
    """Raise ValueError for an aggregator that keeps state of the mean, or needs the workers' sum before it chooses."""
    for aggregator in aggregators:
        if not isinstance(aggregator, AllReduce | AllGather):
            name = type(aggregator).__name__
            raise ValueError(
                f"compressor and exchange must average messages directly {where} (TopK, RandomK, QSGD, Sign, "
                f"Identity, LinearSketch, not what {name} needs): others keep state that fits one set of workers"
            )
