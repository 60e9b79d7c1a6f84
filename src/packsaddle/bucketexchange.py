"""A communication hook at work: lines 9-12 of Algorithm 1 on the gradients that DDP hands over in buckets."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import RLock
from typing import Any
from typing import Protocol as TypingProtocol

import torch
from torch import Tensor, nn
from torch.futures import Future

from packsaddle.background import Background, Promise
from packsaddle.channel import Channel
from packsaddle.drift import DriftGuard
from packsaddle.escape import Reset
from packsaddle.exchange import Bucket
from packsaddle.exchanger import Exchanger, Rules
from packsaddle.finite import spoil
from packsaddle.monitor import Every, contraction
from packsaddle.noise import Noise, Perturbation
from packsaddle.rates import Rates
from packsaddle.sections import Place, Section
from packsaddle.skips import Skip, Skips


class Stateful(TypingProtocol):
    """What has a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return it, tensors and plain types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


class BucketExchange:
    """Exchanges the buckets of one backward pass after another, and knows what has become of the last.

    `places` are the parameters of `module`, the model; `scale()` is what gradients are multiplied by when they come.
    """

    def __init__(
        self,
        module: nn.Module,
        channel: Channel,
        rules: Rules,
        places: Sequence[Place],
        noise: float | Callable[[int], float],
        rates: Rates,
        scale: Callable[[], float],
        monitor: Every,
    ) -> None:
        self.channel = channel
        self.resets: list[Reset] = []  # firings of the escape check
        self.parts: dict[str, Stateful] = {}  # what else is saved with this
        self._module, self._rules, self._places, self._rates, self._scale = module, rules, places, rates, scale
        self._named = {id(place.parameter): place for place in places}
        self._compressed_d = sum(place.size for place in places if not place.dense)
        self.device = places[0].parameter.device
        self._perturbation = Perturbation(noise)
        self._monitor = monitor
        self._background = Background(self.device)
        self._lock = RLock()  # a backward pass may read what the background thread is making
        self._exchangers: dict[frozenset[str], Exchanger] = {}
        self._loose: dict[str, Tensor] = {}  # error memory that is in no section, by parameter
        self._skips = Skips(rules.max_skipped, channel.group.rank)
        self._drift = DriftGuard(rules.compare_every, "stop", channel)
        self._steps = 0
        self._contraction: float | None = None
        self.calls = 0  # buckets that DDP has handed over
        self._waiting: list[tuple[Bucket, Promise]] = []
        # Of the backward pass that is under way, or was last:
        self._tried: list[Exchanger] = []
        self._bad: list[Tensor] = []
        self._bad_name = ""  # the first parameter of which this worker's vector was not finite
        self._complete = False
        self._noise: Noise | None = None
        self._factors: Mapping[str, float] = {}
        self._scaled = 1.0  # what the gradients are multiplied by
        self._energies: list[Tensor] = []  # ||v||^2 and ||v - C(v)||^2 of each section

    def __call__(self, bucket: Bucket) -> Future[Tensor]:
        """Take a bucket; its means come with the future. Called in order by DDP, in the backward pass."""
        self.calls += 1
        if bucket.index == 0:
            self._check_parameters()
            self._waiting = []
        if bucket.buffer.layout is not torch.strided:
            raise RuntimeError(f"{self._names([bucket])[0]} has a sparse gradient, which is not supported")
        promise = self._background.promise()
        self._waiting.append((bucket, promise))
        if bucket.is_last or self._rules.scope == "bucket":
            waiting, self._waiting = self._waiting, []
            work = partial(self._exchange, [b for b, _ in waiting])
            self._background.submit(work, [(p, b.buffer) for b, p in waiting])
        return promise.future

    def _check_parameters(self) -> None:
        for name, p in self._module.named_parameters():
            if p.requires_grad and id(p) not in self._named:
                raise RuntimeError(
                    f"{name} was added, replaced or unfrozen after DistributedDataParallel was made, which therefore "
                    f"does not exchange its gradient; make DistributedDataParallel and the hook after it"
                )

    def _names(self, buckets: Sequence[Bucket]) -> list[str]:
        parameters = [p for bucket in buckets for p in bucket.parameters]
        if any(id(p) not in self._named for p in parameters):
            raise RuntimeError(
                "a parameter was frozen or replaced after DistributedDataParallel was made and before the hook was"
            )
        return [self._named[id(p)].name for p in parameters]

    def _exchange(self, buckets: Sequence[Bucket]) -> None:
        """Average some buckets as one vector, in place."""
        gradients = dict(zip(self._names(buckets), (g for b in buckets for g in b.gradients), strict=True))
        with self._lock:
            if buckets[0].index == 0:
                self._begin()
            exchanger = self._exchanger(frozenset(gradients))
            self._tried.append(exchanger)
        bad = exchanger.exchange(
            self.channel,
            gradients,
            self._noise,
            self._steps,
            scale=self._scaled,
            factors=self._factors,
            watch=self._measure,
            report=self._report,
        )
        self._bad.append(bad)
        for bucket in buckets:  # all workers get NaNs if one had any, so that the scalers of all skip the step
            spoil(bucket.buffer, bad > 0, float("nan"))
        self._complete = buckets[-1].is_last

    def _begin(self) -> None:
        """Line 9, once what came of the last step is known."""
        self._settle(broken_off=True)
        self._skips.check(self._skips.in_a_row)
        self.channel.step = self._steps
        if self._steps and self._drift.due(self._steps - 1):
            named = [(place.name, place.parameter) for place in self._places]
            self._drift.compare(self._steps - 1, [p for _, p in named], lambda: named)
        self._noise = self._perturbation.at(seed=self._rules.seed, step=self._steps)
        self._factors, self._scaled = self._rates.factors(), self._scale()
        self._energies = []

    def _settle(self, *, broken_off: bool = False) -> None:
        """Make the last step the state; or forget it, if it was broken off or a worker's gradient was not finite.

        Nothing while a backward pass is under way.
        """
        with self._lock:
            if not self._tried or not (self._complete or broken_off):
                return
            told = [bad for bad in torch.stack(self._bad).tolist() if bad != 0] if self._complete else []
            taken = self._complete and not told
            self._rates.settle(taken=taken)
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

    def _report(self, name: str) -> None:
        self._bad_name = self._bad_name or name

    def _measure(self, vector: Tensor) -> None:
        if self._monitor.due(self._steps):
            self._energies.append(torch.linalg.vector_norm(vector, dtype=torch.float64).square())

    def _exchanger(self, names: frozenset[str]) -> Exchanger:
        """Return the section of these parameters; if DDP has made its buckets anew, out of what the old ones hold."""
        if names not in self._exchangers:
            for old in [key for key in self._exchangers if not key.isdisjoint(names)]:
                exchanger = self._exchangers.pop(old)
                exchanger.fold(self.channel.group.size)
                self._loose |= {place.name: view for place, view in exchanger.section.views(exchanger.section.error)}
            section = Section([place for place in self._places if place.name in names], self._loose, self.device)
            self._exchangers[names] = Exchanger(section, self._rules, self._compressed_d)
        return self._exchangers[names]
