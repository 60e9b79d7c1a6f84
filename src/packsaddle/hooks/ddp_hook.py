"""The hook that exchanges the buckets of a backward pass, as DistributedDataParallel hands them over.

A `Bucket` is what it hands over. DistributedDataParallel makes its buckets anew after the first step or two, so the
hook keeps a slice, with an error memory, for each set of parameters that has come together. `ddp` registers it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.futures import Future

from packsaddle.comm.communicator import Communicator, ring_all_reduce
from packsaddle.comm.ledger import Bytes
from packsaddle.feedback.background import Background, Promise
from packsaddle.feedback.escape import Reset
from packsaddle.feedback.noise import GaussianNoise, Noise
from packsaddle.feedback.round import ErrorFeedback
from packsaddle.feedback.slices import Place, Slice, dense_strides
from packsaddle.feedback.state import FORMAT, check_format, check_identity, check_shape
from packsaddle.hooks.hook import GradientHook, HookOptions
from packsaddle.hooks.rates import Rates
from packsaddle.numerics.finite import spoil


class Stateful(Protocol):
    """An object with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return it, tensors and plain types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that DistributedDataParallel exchanges together; the hook replaces them by their means, in place."""

    index: int  # 0 is the first of a backward pass
    is_last: bool
    buffer: Tensor  # float[n], all of them
    gradients: list[Tensor]  # views of the buffer, shaped as their parameters
    parameters: list[Tensor]


class DDPHook(GradientHook):
    """The hook of `register_ddp_hook`: it exchanges the buckets of each backward pass.

    `places` are the parameters of `module`, the model; `scale()` returns the factor of the incoming gradients.

    >>> import torch
    >>> import torch.distributed as dist
    >>> import packsaddle
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    >>> hook = packsaddle.register_ddp_hook(model, packsaddle.TopK(0.1))
    >>> model(torch.rand(8, 64)).square().mean().backward()
    >>> hook.steps, hook.skipped, hook.ledger.total.sent
    (1, 0, 0)
    >>> sorted(hook.memory())
    ['bias', 'weight']
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        module: nn.Module,
        channel: Communicator,
        rules: HookOptions,
        places: Sequence[Place],
        noise: Noise,
        rates: Rates,
        scale: Callable[[], float],
    ) -> None:
        super().__init__(channel, rules, sum(place.size for place in places if not place.dense))
        self.resets: list[Reset] = []  # firings of the escape check
        self.parts: dict[str, Stateful] = {}  # other parts of the saved state, by name
        self._module, self._places, self._rates, self._scale = module, places, rates, scale
        self._named = {id(place.parameter): place for place in places}
        self.device = places[0].parameter.device
        self._perturbation = noise
        self._background = Background(self.device)
        # Slices are made as buckets come, since DistributedDataParallel may rebuild its buckets.
        self._slices: dict[frozenset[str], ErrorFeedback] = {}
        self._loose: dict[str, Tensor] = {}  # error memory of parameters without a slice, by name
        self.calls = 0  # buckets received from DDP
        # The running backward pass, or the last one.
        self._waiting: list[tuple[Bucket, Promise]] = []
        self._noise: GaussianNoise | None = None
        self._factors: Mapping[str, float] = {}
        self._scaled = 1.0  # the factor of the gradients
        self._failure: Exception | None = None  # of one of its buckets

    def __call__(self, bucket: Bucket) -> Future[Tensor]:
        """Submit a bucket; the future returns its means. DDP calls this in order, in the backward pass."""
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
            work = partial(self._exchange_buckets, [b for b, _ in waiting])
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

    def _exchange_buckets(self, buckets: Sequence[Bucket]) -> None:
        """Average buckets as one vector, in place; raise the error of an earlier bucket of the pass again.

        DDP sends all buckets of a pass, also after an error.
        """
        if buckets[0].index == 0:
            self._failure = None
        if self._failure is not None:
            raise self._failure
        try:
            self._average(buckets)
        except Exception as error:
            self._failure = error
            raise

    def _average(self, buckets: Sequence[Bucket]) -> None:
        gradients = dict(zip(self._names(buckets), (g for b in buckets for g in b.gradients), strict=True))
        with self._lock:
            if buckets[0].index == 0:
                self._begin()
            part = self._slice(frozenset(gradients))
        code = self._exchange(part, gradients, self._noise, self._scaled, self._factors)
        for bucket in buckets:  # all workers get NaNs if one had any, so that the scalers of all skip the step
            spoil(bucket.buffer, code > 0, float("nan"))
        self._complete = buckets[-1].is_last

    def _begin(self) -> None:
        """Line 9, once the outcome of the last step is known."""
        self._open()
        if self._steps and self._drift.due(self._steps - 1):
            named = [(place.name, place.parameter) for place in self._places]
            self._drift.compare(self._steps - 1, [p for _, p in named], lambda: named, self._step_rates)
        self._noise = self._perturbation.drawn(seed=self._rules.seed, step=self._steps)
        self._factors, self._scaled = self._rates.factors(), self._scale()
        self._step_rates.add([self._noise.std if self._noise else 0.0])

    def _conclude(self, *, apply: bool) -> None:
        self._rates.close(apply=apply)

    def _slice(self, names: frozenset[str]) -> ErrorFeedback:
        """Return the slice of these parameters; if DDP has rebuilt its buckets, with the old slices' memories."""
        if names not in self._slices:
            for old in [key for key in self._slices if not key.isdisjoint(names)]:
                part = self._slices.pop(old)
                part.drop_aggregator()
                self._loose |= dict(zip(part.slice.names, part.memory.views, strict=True))
            of = Slice([place for place in self._places if place.name in names], self.device)
            self._slices[names] = self._feedback(of, self._loose, self._rules.seed)
        return self._slices[names]

    @property
    def uncompressed(self) -> Bytes:
        """The bytes of the same number of exchanges without the hook: ring all-reduces of gradients."""
        exchanges = self.steps + self.skipped
        d = sum(place.size * place.parameter.element_size() for place in self._places)
        return ring_all_reduce(exchanges * d, self.channel.group.size)

    @torch.no_grad()
    def memory(self) -> dict[str, Tensor]:
        """Return this worker's e^(i) by parameter, in units of a gradient, with its share of the owner errors.

        Each is shaped as its parameter, in float32 or wider. The mean over workers is the sum of all updates that have
        not been applied yet. In a backward pass it is that of the previous step.
        """
        self._settle()
        found = {place.name: torch.zeros_like(place.parameter, dtype=torch.float32) for place in self._places}
        with self._lock:
            found |= {name: view.clone() for name, view in self._loose.items()}
            for part in self._slices.values():
                found |= dict(zip(part.slice.names, part.slice.views(part.pending().clone()), strict=True))
        return found

    @torch.no_grad()
    def forget(self, lost: Mapping[str, Tensor]) -> None:
        """Reset e to zero (line 7), or to `lost`, by parameter and shaped as it, in units of a gradient."""
        self._settle()
        self._loose = {name: error.clone() for name, error in lost.items()}
        for part in self._slices.values():
            part.reset()
            for name, view in zip(part.slice.names, part.memory.views, strict=True):
                if name in self._loose:
                    view.copy_(self._loose.pop(name))

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state: e^(i) by parameter, the step, the owner errors, the ledger's totals.

        Tensors and plain types only; each worker has its own. With scope="bucket" the owner errors of a two-way
        exchange are in the error memory of their owner, since buckets may differ at loading: no update is lost, but
        only with scope="model" does a run continue bitwise identically.
        """
        # One slice of the whole model is the same at loading, so its owner errors are restored as such.
        pending, held = self.memory(), dict[str, Any]()
        if self._rules.scope == "model":
            for part in self._slices.values():
                pending |= {name: view.clone() for name, view in zip(part.slice.names, part.memory.views, strict=True)}
                held = part.held_state()
        return {
            "format": FORMAT,
            "identity": self._identity(),
            "steps": self._steps,
            "skips": self._skips.state_dict(),
            "rates": dict(self._rates.units),
            "pending": pending,
            "held": held,
            "allocation": self._allocation.state_dict(),
            "ledger": self.ledger.state_dict(),
            "resets": [asdict(reset) for reset in self.resets],
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first difference, unless `load_state_dict` accepts `state`."""
        check_format(state, "register_ddp_hook")
        check_identity(state["identity"], self._identity())
        pending = state["pending"]
        for place in self._places:
            check_shape(f"the error of {place.name}", pending.get(place.name), place.parameter.shape)
        if len(pending) > len(self._places):
            raise ValueError(f"the state is of {len(pending)} parameters, and there are {len(self._places)}")
        compressed = sum(place.size for place in self._places if not place.dense)
        for vector in state["held"].get("vectors", {}).values():
            if len(vector) != compressed:
                raise ValueError(
                    f"the state is of {len(vector)} coordinates that are compressed, and here {compressed} are: was "
                    f"dense_below another?"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, this worker's `state_dict`. Raises ValueError, with nothing changed, if it does not fit."""
        self.check_state_dict(state)
        pending = state["pending"]
        self._settle()
        # Errors wait by parameter until buckets come and make slices.
        self._slices = {}
        self._step_rates.clear()
        self._loose = {name: error.to(self.device, copy=True) for name, error in pending.items()}
        self._steps, self._rates.units = state["steps"], dict(state["rates"])
        self._drift.resume(max(0, self._steps - 1))  # a step is compared when the next begins
        self._skips.load_state_dict(state["skips"])
        if self._rules.scope == "model":
            whole = self._slice(frozenset(place.name for place in self._places))
            if state["held"]:
                self._use(whole, self._steps)
                whole.restore(state["held"])
        self._allocation.load_state_dict(state["allocation"], self.device)
        self.ledger.load_state_dict(state["ledger"])
        self.resets = [Reset(**reset) for reset in state["resets"]]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])

    def _identity(self) -> dict[str, Any]:
        """Return the settings that must be equal at saving and at loading."""
        group = self.channel.group
        return {
            "seed": self._rules.seed,
            "rank": group.rank,
            "workers": group.size,
            "scope": self._rules.scope,
            "exchange": self._rules.compression.exchange,
            "parts": ", ".join(self.parts) or "none",
        }

    def split_state(
        self, state: Mapping[str, Any], workers: int
    ) -> tuple[dict[tuple[Any, ...], Tensor], dict[str, Any]]:
        """Return the tensors of a `state` of `workers` to be averaged, by place, and the rest, identical on all."""
        pending = {name: error.double() for name, error in state["pending"].items()}
        held = state["held"].get("vectors", {})
        for vector in held.values():  # owners' errors of the mean, on the compressed coordinates
            for place in self._places:
                if not place.dense:
                    p = place.parameter
                    pending[place.name] = pending[place.name] + workers * vector.as_strided(
                        p.shape, dense_strides(p), vector.storage_offset() + place.start
                    )
        left_out = ("pending", "ledger", "identity", "held", "monitor", "allocation")
        rest = {k: v for k, v in state.items() if k not in left_out}
        rest["identity"] = {k: v for k, v in state["identity"].items() if k != "rank"}
        rest["held"] = {k: v for k, v in state["held"].items() if k != "vectors"}
        return {(name,): error for name, error in pending.items()}, rest

    def put_means(self, state: dict[str, Any], means: Mapping[tuple[Any, ...], Tensor]) -> None:
        """Write means into a state, in place, and set its rank and number of workers to this worker's."""
        for (name,), mean in means.items():
            state["pending"][name] = mean.to(state["pending"][name].dtype)
        for vector in state["held"].get("vectors", {}).values():
            vector.zero_()
        here = self._identity()
        state["identity"] |= {name: here[name] for name in ("rank", "workers")}
