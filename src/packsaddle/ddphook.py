"""The state of a communication hook: lines 9-12 of Algorithm 1 on the gradients that DDP hands over in buckets."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import RLock
from typing import Any
from typing import Protocol as TypingProtocol

import torch
from torch import Tensor, nn
from torch.futures import Future

from packsaddle.background import Background, Promise
from packsaddle.channel import Channel, ring_all_reduce
from packsaddle.escape import Reset
from packsaddle.exchange import Bucket
from packsaddle.exchanger import Exchanger, Rules
from packsaddle.finite import spoil
from packsaddle.ledger import Bytes, Ledger
from packsaddle.monitor import Every, contraction
from packsaddle.noise import Noise, Perturbation
from packsaddle.rates import Rates
from packsaddle.sections import Place, Section
from packsaddle.state import check_identity, check_shape


class Stateful(TypingProtocol):
    """What has a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return it, tensors and plain types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


class DDPHook:
    """What `register_ddp_hook` returns: the bytes, the steps, the error memory, and how to save it.

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
        self._steps = self._skipped = 0
        self._contraction: float | None = None
        self.calls = 0  # buckets that DDP has handed over
        self._waiting: list[tuple[Bucket, Promise]] = []
        # Of the backward pass that is under way, or was last:
        self._tried: list[Exchanger] = []
        self._bad: list[Tensor] = []
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
        )
        self._bad.append(bad)
        for bucket in buckets:  # all workers get NaNs if one had any, so that the scalers of all skip the step
            spoil(bucket.buffer, bad > 0, float("nan"))
        self._complete = buckets[-1].is_last

    def _begin(self) -> None:
        """Line 9, once what came of the last step is known."""
        self._settle(broken_off=True)
        self.channel.step = self._steps
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
            taken = self._complete and not bool(torch.stack(self._bad).sum() > 0)
            self._rates.settle(taken=taken)
            for exchanger in self._tried:
                exchanger.settle(taken=taken)
            if taken and self._energies:
                self._contraction = contraction(*torch.stack(self._energies).view(-1, 2).sum(0).tolist())
                self._monitor.done(self._steps)
            self._steps += taken
            self._skipped += self._complete and not taken
            self._tried, self._bad, self._complete, self._energies = [], [], False, []

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
    def uncompressed(self) -> Bytes:
        """What this worker would have moved in as many exchanges without the hook: a ring all-reduce of gradients."""
        exchanges = self.steps + self.skipped
        d = sum(place.size * place.parameter.element_size() for place in self._places)
        return ring_all_reduce(exchanges * d, self.channel.group.size)

    @property
    def skipped(self) -> int:
        """How many steps were not taken, since a worker's gradient was not finite."""
        self._settle()
        return self._skipped

    @property
    def contraction(self) -> float | None:
        """The share of its energy that this worker's vector kept when last measured (see `monitor_every`)."""
        self._settle()
        return self._contraction

    @torch.no_grad()
    def memory(self) -> dict[str, Tensor]:
        """Return this worker's e^(i), in units of a gradient, by parameter, with its share of what the exchange holds.

        The mean over workers is all that has not been applied yet. In a backward pass it is that of the step before.
        """
        self._settle()
        found = {place.name: torch.zeros_like(place.parameter, dtype=torch.float32) for place in self._places}
        with self._lock:
            found |= {name: view.clone() for name, view in self._loose.items()}
            for exchanger in self._exchangers.values():
                error = exchanger.error(self.channel.group.size)
                found |= {place.name: view for place, view in exchanger.section.views(error)}
        return found

    @torch.no_grad()
    def forget(self, lost: Mapping[str, Tensor]) -> None:
        """Set e to zero (line 7), or to what is given by parameter, in units of a gradient."""
        self._settle()
        self._loose = {name: error.clone() for name, error in lost.items()}
        for exchanger in self._exchangers.values():
            exchanger.drop()
            for place, view in exchanger.section.views(exchanger.section.error):
                if place.name in self._loose:
                    view.copy_(self._loose.pop(place.name))

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state: e^(i) by parameter, the step, what the exchange holds, the ledger's totals.

        Tensors and plain types only; each worker has its own. With scope="bucket" what a two-way exchange holds back is
        in the error memory of its owner, since buckets may differ when it is loaded: nothing is lost, but a run goes on
        bit for bit only with scope="model".
        """
        pending, held = self.memory(), dict[str, Any]()
        if self._rules.scope == "model":
            for exchanger in self._exchangers.values():
                section = exchanger.section
                pending |= {place.name: view.clone() for place, view in section.views(section.error)}
                held = exchanger.held()
        return {
            "identity": self._identity(),
            "steps": self._steps,
            "skipped": self.skipped,
            "rates": dict(self._rates.units),
            "pending": pending,
            "held": held,
            "ledger": self.ledger.state_dict(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first difference, if `load_state_dict` would not take this."""
        if "identity" not in state:
            raise ValueError("the state has no identity; was it saved by a hook?")
        check_identity(state["identity"], self._identity())
        pending = state["pending"]
        for place in self._places:
            check_shape(f"the error of {place.name}", pending.get(place.name), place.parameter.shape)
        if len(pending) > len(self._places):
            raise ValueError(f"the state is of {len(pending)} parameters, and there are {len(self._places)}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` saved on this worker; raises ValueError, changing nothing, if it does not fit."""
        self.check_state_dict(state)
        pending = state["pending"]
        self._settle()
        self._exchangers = {}
        self._loose = {name: error.to(self.device, copy=True) for name, error in pending.items()}
        self._steps, self._skipped, self._rates.units = state["steps"], state["skipped"], dict(state["rates"])
        if self._rules.scope == "model":
            exchanger = self._exchanger(frozenset(place.name for place in self._places))
            exchanger.restore(state["held"], self._steps, self.channel.group.size)
        self.ledger.load_state_dict(state["ledger"])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])

    def _identity(self) -> dict[str, Any]:
        """What must be the same where a state is loaded as where it was saved."""
        group = self.channel.group
        return {
            "seed": self._rules.seed,
            "rank": group.rank,
            "workers": group.size,
            "scope": self._rules.scope,
            "exchange": self._rules.exchange,
            "parts": ", ".join(self.parts) or "none",
        }
