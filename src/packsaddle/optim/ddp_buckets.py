"""Buckets of a DDP communication hook: lines 9-12 of Algorithm 1 on each, in order, beside the backward pass."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from typing import Protocol as TypingProtocol

import torch
from torch import Tensor, nn
from torch.futures import Future

from packsaddle.comm.communicator import Channel
from packsaddle.numerics.finite import spoil
from packsaddle.optim.error_feedback import Exchanger, Rates, Rules, Section
from packsaddle.optim.layout import Place
from packsaddle.optim.stages.contraction import Every
from packsaddle.optim.stages.drift import DriftGuard
from packsaddle.optim.stages.escape import Reset
from packsaddle.optim.stages.noise import Noise, Perturbation
from packsaddle.optim.transaction import Transaction

_PATIENCE = 1.0  # seconds that the interpreter's end waits for a thread that is about to end


@dataclass(frozen=True)
class Promise:
    """A tensor to come; `future` is for whoever waits for it."""

    source: Future[Tensor]
    future: Future[Tensor]


Results = Sequence[tuple[Promise, Tensor]]


class Background:
    """Runs functions one after the other: on a CPU in a thread of its own, on a GPU in a stream of its own.

    One after the other, since workers must start their collectives in one order. On a GPU the host does not wait for
    collectives, so a stream is enough to let them overlap with what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waiting: deque[tuple[Callable[[], None], Results]] = deque()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []  # the last one
        self._busy = False
        weakref.finalize(self, _join, self._threads)  # also at the interpreter's end

    def promise(self) -> Promise:
        """Return a tensor to come, which may be waited for in any stream."""
        source: Future[Tensor] = Future(devices=None if self._stream is None else [self._device])
        # DDP reads a future's value without looking for an error; what `then` returns has it as its own.
        return Promise(source, source.then(lambda done: done.value()))

    def submit(self, work: Callable[[], None], results: Results) -> None:
        """Run `work`, after which the promises have their results; an error in it becomes theirs."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                _run(work, results)
            return
        with self._lock:
            self._waiting.append((work, results))
            if self._busy:
                return
            self._busy = True
        # It ends when nothing waits, so none is there when the interpreter ends; and if another worker is gone and a
        # collective does not return, it does not keep this process, which has an error to report, from ending.
        self._threads[:] = [threading.Thread(target=self._work, name="packsaddle", daemon=True)]
        self._threads[0].start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                work, results = self._waiting.popleft()
            _run(work, results)


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_PATIENCE)


@torch.no_grad()
def _run(work: Callable[[], None], results: Results) -> None:
    try:
        work()
    except Exception as error:
        for promise, _ in results:
            promise.source.set_exception(error)  # type: ignore[arg-type]
    else:
        for promise, result in results:
            promise.source.set_result(result)


@dataclass(frozen=True)
class Bucket:
    """Gradients that DistributedDataParallel hands over together; to be replaced by their means, in place."""

    index: int  # 0 is the first of a backward pass
    is_last: bool
    buffer: Tensor  # float[n], all of them
    gradients: list[Tensor]  # views of the buffer, shaped as their parameters
    parameters: list[Tensor]


class Stateful(TypingProtocol):
    """What has a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return it, tensors and plain types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


class BucketExchange(Transaction):
    """Exchanges the buckets of one backward pass after another, each pass as one transaction.

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
        super().__init__(channel, rules, monitor, sum(place.size for place in places if not place.dense))
        self.resets: list[Reset] = []  # firings of the escape check
        self.parts: dict[str, Stateful] = {}  # what else is saved with this
        self._module, self._places, self._rates, self._scale = module, places, rates, scale
        self._named = {id(place.parameter): place for place in places}
        self.device = places[0].parameter.device
        self._perturbation = Perturbation(noise)
        self._background = Background(self.device)
        self._exchangers: dict[frozenset[str], Exchanger] = {}
        self._loose: dict[str, Tensor] = {}  # error memory that is in no section, by parameter
        self._drift = DriftGuard(rules.compare_every, "stop", channel)
        self.calls = 0  # buckets that DDP has handed over
        self._waiting: list[tuple[Bucket, Promise]] = []
        self._noise: Noise | None = None  # of the backward pass that is under way, or was last
        self._factors: Mapping[str, float] = {}
        self._scaled = 1.0  # what the gradients are multiplied by

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
        exchange = partial(exchanger.exchange, self.channel, gradients, self._noise, self._steps)
        bad = self._try(exchanger, partial(exchange, scale=self._scaled, factors=self._factors))
        for bucket in buckets:  # all workers get NaNs if one had any, so that the scalers of all skip the step
            spoil(bucket.buffer, bad > 0, float("nan"))
        self._complete = buckets[-1].is_last

    def _begin(self) -> None:
        """Line 9, once what came of the last step is known."""
        self._open()
        if self._steps and self._drift.due(self._steps - 1):
            named = [(place.name, place.parameter) for place in self._places]
            self._drift.compare(self._steps - 1, [p for _, p in named], lambda: named)
        self._noise = self._perturbation.at(seed=self._rules.seed, step=self._steps)
        self._factors, self._scaled = self._rates.factors(), self._scale()

    def _conclude(self, *, taken: bool) -> None:
        self._rates.settle(taken=taken)

    def _exchanger(self, names: frozenset[str]) -> Exchanger:
        """Return the section of these parameters; if DDP has made its buckets anew, out of what the old ones hold."""
        if names not in self._exchangers:
            for old in [key for key in self._exchangers if not key.isdisjoint(names)]:
                exchanger = self._exchangers.pop(old)
                exchanger.fold(self.channel.group.size)
                self._loose |= {place.name: view for place, view in exchanger.section.views(exchanger.section.error)}
            section = Section([place for place in self._places if place.name in names], self._loose, self.device)
            self._exchangers[names] = Exchanger(section, self._rules, self._allocation)
        return self._exchangers[names]
