"""The state of a communication hook: lines 9-12 of Algorithm 1 on the gradients that DDP hands over in buckets."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from typing import Protocol as TypingProtocol

import torch
from torch import Tensor, nn
from torch.futures import Future

from packsaddle.background import Background
from packsaddle.channel import Channel, ring_all_reduce
from packsaddle.escape import Reset
from packsaddle.exchange import Bucket
from packsaddle.exchanger import Exchanger, Rules
from packsaddle.ledger import Bytes, Ledger
from packsaddle.noise import Noise, Perturbation
from packsaddle.rates import Rates
from packsaddle.sections import Place, Section


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
        monitor_every: int,
    ) -> None:
        self.channel = channel
        self.skipped = 0  # steps in which a worker's gradient was not finite
        self.contraction: float | None = None  # mu_t of this worker's compressed vector, when last measured
        self.resets: list[Reset] = []  # firings of the escape check
        self.parts: dict[str, Stateful] = {}  # what else is saved with this
        self._module, self._rules, self._places, self._rates, self._scale = module, rules, places, rates, scale
        self._named = {id(place.parameter): place for place in places}
        self._compressed_d = sum(place.size for place in places if not place.dense)
        self.device = places[0].parameter.device
        self._perturbation = Perturbation(noise)
        self._monitor_every = monitor_every
        self._background = Background(self.device)
        self._exchangers: dict[frozenset[str], Exchanger] = {}
        self._loose: dict[str, Tensor] = {}  # error memory that is in no section, by parameter
        self._saved: dict[str, Any] = {}  # what the exchange of the whole model held when it was saved
        self._steps = 0
        self.calls = 0  # buckets that DDP has handed over
        self._waiting: list[tuple[Bucket, Future[Tensor]]] = []
        # Of the backward pass that is under way, or was last:
        self._tried: list[Exchanger] = []
        self._bad: list[Tensor] = []
        self._complete = False
        self._noise: Noise | None = None
        self._factors: Mapping[str, float] = {}
        self._energies: list[Tensor] = []  # ||v||^2 and ||v - C(v)||^2 of each section

    def __call__(self, bucket: Bucket) -> Future[Tensor]:
        """Take a bucket; its means come with the future. Called in order by DDP, in the backward pass."""
        self.calls += 1
        if bucket.index == 0:
            self._check_parameters()
            self._waiting = []
        if bucket.buffer.layout is not torch.strided:
            raise RuntimeError(f"{self._names([bucket])[0]} has a sparse gradient, which is not supported")
        future = self._background.future()
        self._waiting.append((bucket, future))
        if bucket.is_last or self._rules.scope == "bucket":
            waiting, self._waiting = self._waiting, []
            work = partial(self._exchange, [b for b, _ in waiting])
            self._background.submit(work, [(f, b.buffer) for b, f in waiting])
        return future

    def _check_parameters(self) -> None:
        for name, p in self._module.named_parameters():
            if p.requires_grad and id(p) not in self._named:
                raise RuntimeError(
                    f"{name} was added, replaced or unfrozen after DistributedDataParallel was made, which therefore "
                    f"does not exchange its gradient; make DistributedDataParallel and the hook after it"
                )

    def _names(self, buckets: Sequence[Bucket]) -> list[str]:
        return [self._named[id(p)].name for bucket in buckets for p in bucket.parameters]

    def _exchange(self, buckets: Sequence[Bucket]) -> None:
        """Average some buckets as one vector, in place."""
        if buckets[0].index == 0:
            self._begin()
        gradients = dict(zip(self._names(buckets), (g for b in buckets for g in b.gradients), strict=True))
        exchanger, scale = self._exchanger(frozenset(gradients)), self._scale()
        self._tried.append(exchanger)
        exchanger.prepare(self._rules.at(self._steps), self.channel.group.size)
        section = exchanger.section
        vector = section.correct(gradients, self._noise, scale, self._factors)  # line 10
        self._exclude_bad(vector)
        self._measure(vector)
        g, bad = exchanger.average(self.channel, vector, self._bad[-1], self._steps, self._factors)
        lost = section.deliver(g, gradients, scale)  # line 11
        if lost is not None:
            bad = bad + (~torch.isfinite(lost).all()).to(bad)
        if self._rules.error_feedback:
            section.absorb(g, lost)  # line 12
        else:
            section.corrected.zero_()
        self._measure(vector)
        self._bad[-1] = bad
        if buckets[-1].is_last:
            self._end(buckets[-1])

    def _begin(self) -> None:
        """Line 9, once what came of the last step is known."""
        self._settle()
        self.channel.step = self._steps
        self._noise = self._perturbation.at(seed=self._rules.seed, step=self._steps)
        self._factors = self._rates.factors()
        self._energies = []

    def _exclude_bad(self, vector: Tensor) -> None:
        """Find whether this worker's vector is finite; if not, it sends zeros and says so."""
        self._bad.append(~torch.isfinite(torch.linalg.vector_norm(vector, float("inf"))))
        if vector.device.type != "cpu" or self._bad[-1]:  # a GPU is not waited for
            vector.masked_fill_(self._bad[-1], 0.0)

    def _end(self, last: Bucket) -> None:
        """Give every worker a NaN if one of them had any, so that all of their scalers skip the step."""
        self._complete = True
        bad = torch.stack(self._bad).sum() > 0
        if last.buffer.device.type != "cpu" or bad:
            last.buffer[:1].masked_fill_(bad, float("nan"))

    def _settle(self) -> None:
        """Make the last step the state; or forget it, if it was broken off or a worker's gradient was not finite."""
        if not self._tried:
            return
        taken = self._complete and not bool(torch.stack(self._bad).sum() > 0)
        self._rates.settle(taken=taken)
        for exchanger in self._tried:
            exchanger.settle(taken=taken)
        if taken and self._energies:
            before, after = torch.stack(self._energies).view(-1, 2).sum(0).tolist()
            self.contraction = 1 - after / before if before else 1.0
        self._steps += taken
        self.skipped += self._complete and not taken
        self._tried, self._bad, self._complete, self._energies = [], [], False, []

    def _measure(self, vector: Tensor) -> None:
        if self._monitor_every and (self._steps + 1) % self._monitor_every == 0:
            self._energies.append(torch.linalg.vector_norm(vector, dtype=torch.float64).square())

    def _exchanger(self, names: frozenset[str]) -> Exchanger:
        """Return the section of these parameters; if DDP has made its buckets anew, out of what the old ones hold."""
        if names not in self._exchangers:
            for old in [key for key in self._exchangers if not key.isdisjoint(names)]:
                exchanger = self._exchangers.pop(old)
                exchanger.fold(self.channel.group.size)
                self._loose |= {place.name: view for place, view in exchanger.section.views(exchanger.section.error)}
            section = Section([place for place in self._places if place.name in names], self._loose)
            self._exchangers[names] = Exchanger(section, self._rules, self._compressed_d)
            self._exchangers[names].saved, self._saved = self._saved, {}
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

    @torch.no_grad()
    def memory(self) -> dict[str, Tensor]:
        """Return this worker's e^(i), in units of a gradient, by parameter, with its share of what the exchange holds.

        The mean over workers is all that has not been applied yet.
        """
        self._settle()
        found = {place.name: torch.zeros_like(place.parameter, dtype=torch.float32) for place in self._places}
        found |= {name: view.clone() for name, view in self._loose.items()}
        for exchanger in self._exchangers.values():
            section, n = exchanger.section, exchanger.section.compressed_n
            error = section.error.clone()
            if exchanger.protocol is not None:
                error[:n] = exchanger.protocol.add_residual(error[:n], self.channel.group.size)
            found |= {place.name: view for place, view in section.views(error)}
        return found

    @torch.no_grad()
    def forget(self, lost: Mapping[str, Tensor]) -> None:
        """Set e to zero (line 7), or to what is given by parameter, in units of a gradient."""
        self._settle()
        self._loose = {}
        for exchanger in self._exchangers.values():
            if exchanger.protocol is not None:
                exchanger.protocol.reset()
            exchanger.section.error.zero_()
            for place, view in exchanger.section.views(exchanger.section.error):
                if place.name in lost:
                    view.copy_(lost[place.name])

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state: e^(i) by parameter, the step, what the exchange holds, the ledger's totals.

        Tensors and plain types only; each worker has its own. With scope="bucket" what a two-way exchange holds back is
        in the error memory of its owner, since buckets may differ when it is loaded: nothing is lost, but a run goes on
        bit for bit only with scope="model".
        """
        pending = self.memory()
        exchange = {}
        if self._rules.scope == "model":
            exchange = self._saved
            for exchanger in self._exchangers.values():
                pending |= {
                    place.name: view.clone() for place, view in exchanger.section.views(exchanger.section.error)
                }
                exchange = exchanger.state_dict()
        return {
            "identity": self._identity(),
            "steps": self._steps,
            "skipped": self.skipped,
            "rates": list(self._rates.units),
            "pending": pending,
            "held": exchange,
            "ledger": self.ledger.state_dict(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` saved on this worker; raises ValueError, changing nothing, if it does not fit."""
        for name, expected in self._identity().items():
            found = state["identity"].get(name)
            if found != expected:
                raise ValueError(f"{name} is {expected} here, but the state was saved with {name} {found}")
        pending = state["pending"]
        for place in self._places:
            found = pending.get(place.name)
            if found is None or found.shape != place.parameter.shape:
                what = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise ValueError(
                    f"the error of {place.name} must have shape {tuple(place.parameter.shape)}, found {what}"
                )
        if len(pending) > len(self._places):
            raise ValueError(f"the state is of {len(pending)} parameters, and there are {len(self._places)}")
        self._settle()
        self._exchangers = {}
        self._loose = {name: error.to(self.device, copy=True) for name, error in pending.items()}
        self._saved = dict(state["held"])
        self._steps, self.skipped, self._rates.units = state["steps"], state["skipped"], list(state["rates"])
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
