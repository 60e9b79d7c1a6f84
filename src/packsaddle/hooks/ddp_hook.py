"""The communication hook of DistributedDataParallel, called with one `Bucket` of gradients at a time.

DistributedDataParallel may rebuild its buckets after the first step or two, so the hook keeps one error memory for each
set of parameters that share a bucket.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future

from packsaddle.comm.communicator import Communicator
from packsaddle.feedback.background import Background, Promise
from packsaddle.feedback.exchanging import Exchanging
from packsaddle.feedback.round import ErrorFeedback, SavedAggregator
from packsaddle.feedback.slices import Place, Slice
from packsaddle.feedback.state import ANY, State, Value, Vector, skip, typed
from packsaddle.hooks.hook import RULES, GradientHook, HookOptions
from packsaddle.numerics.devices import check_not_capturing
from packsaddle.numerics.finite import fill_where


@dataclass(frozen=True)
class Bucket:
    """A set of gradients that DistributedDataParallel exchanges together.

    The hook replaces them with their means over workers, in place.
    """

    index: int  # index of the bucket in the backward pass, in which bucket 0 is the first
    is_last: bool
    buffer: Tensor  # float[n], all gradients of the bucket as one vector
    gradients: list[Tensor]  # views of the buffer, one for each parameter, with the parameter's shape
    parameters: list[Tensor]


class DDPHook(GradientHook, Exchanging):
    """The hook of `register_ddp_hook`: it exchanges the buckets of each backward pass.

    `module` is the model inside DistributedDataParallel. `places` has the `Place` of each trained parameter, i.e. its
    position in the flat vector of all trained parameters.

    With scope="bucket", DDP may form other buckets in a resumed run than in the run that saved the state. No update is
    lost then, but the resumed run is not bitwise identical to an uninterrupted one. With scope="model" it is.
    """

    def __init__(
        self,
        module: nn.Module,
        channel: Communicator,
        rules: HookOptions,
        places: Sequence[Place],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        super().__init__(channel, rules, sum(place.size for place in places if not place.dense))
        self.saved_state = State("register_ddp_hook", RULES, self._identity, self._saved_fields)
        self._module, self._places, self._scaler = module, places, scaler
        self._named = {id(place.parameter): place for place in places}
        self._sizes = {place.name: place.parameter.nbytes for place in places}
        # An enabled GradScaler skips steps with non-finite gradients, so the optimizer never applies the NaNs of a
        # rejected exchange.
        if scaler is not None:
            self._skips.protected |= scaler.is_enabled()
        self._background = Background(self.device, blocks=channel.group.stages(self.device))
        self.calls = 0  # number of buckets that DDP has passed to this hook so far
        # Names of the parameters used since the last exchange (see `Usage`); None: workers use all parameters.
        self._used: set[str] | None = None
        # State of the running backward pass, or of the last one.
        self._waiting: list[tuple[Bucket, Promise]] = []
        self._failure: Exception | None = None  # the first exception in this backward pass; None: no exception so far

    @property
    def device(self) -> torch.device:
        return self._places[0].parameter.device

    def record_use(self) -> None:
        """Record which parameters each backward pass uses, since workers may use only some of them. Call at most
        once."""
        used = self._used = set()

        def on_gradient(name: str, _: Tensor) -> None:
            used.add(name)

        for place in self._places:
            noted = partial(on_gradient, place.name)
            place.parameter.register_post_accumulate_grad_hook(noted)  # type: ignore[no-untyped-call]

    def __call__(self, bucket: Bucket) -> Future[Tensor]:
        """Start to average the gradients of a bucket. DDP calls this method in the backward pass.

        Returns a future of the bucket's mean gradients, float[n]. With scope="model" the exchange starts when the last
        bucket has been passed.
        """
        self.calls += 1
        if bucket.index == 0:
            check_not_capturing("the hook", self.device)
            self._waiting = []
            for name, p in self._module.named_parameters():
                if p.requires_grad and id(p) not in self._named:
                    raise RuntimeError(
                        f"{name} was added, replaced or unfrozen after DistributedDataParallel was made, which "
                        f"therefore does not exchange its gradient; make DistributedDataParallel and the hook after it"
                    )
        if bucket.buffer.layout is not torch.strided:
            raise RuntimeError(f"{self._names([bucket])[0]} has a sparse gradient, which is not supported")
        promise = self._background.promise()
        self._waiting.append((bucket, promise))
        if bucket.is_last or self.rules.scope == "bucket":
            waiting, self._waiting = self._waiting, []
            # The exchange runs in the background, so it gets a copy of the names.
            used = None if self._used is None else frozenset(self._used)
            work = partial(self._average, [b for b, _ in waiting], used)
            self._background.submit(work, [(p, b.buffer) for b, p in waiting])
        if bucket.is_last and self._used is not None:
            self._used.clear()
        return promise.future

    def _names(self, buckets: Sequence[Bucket]) -> list[str]:
        parameters = [p for bucket in buckets for p in bucket.parameters]
        if any(id(p) not in self._named for p in parameters):
            raise RuntimeError(
                "a parameter was replaced after DistributedDataParallel was made and before the hook was registered"
            )
        return [self._named[id(p)].name for p in parameters]

    def _average(self, buckets: Sequence[Bucket], used: Collection[str] | None) -> None:
        """Average the gradients in `buckets` over workers as one vector, in place.

        `used` has the names of the parameters that this worker has used, or is None if workers use all parameters.
        If this raises an error, DDP nevertheless passes the other buckets of the backward pass. For these the same
        error is raised.
        """
        if buckets[0].index == 0:
            self._failure = None
        if self._failure is not None:
            raise self._failure
        try:
            gradients = dict(zip(self._names(buckets), (g for b in buckets for g in b.gradients), strict=True))
            with self._lock:
                if buckets[0].index == 0:
                    self._begin()
                part = self._slice(frozenset(gradients))
            code = self._exchange(part, gradients, used=used)
        except Exception as error:
            self._failure = error
            raise
        # If the exchange was rejected, set the gradients to NaN on all workers, so that the GradScalers of all workers
        # skip the step.
        for bucket in buckets:
            fill_where(bucket.buffer, (code != 0).any(), float("nan"))
        if buckets[-1].is_last:
            self._complete()

    def _begin(self) -> None:
        """Begin a backward pass: commit or roll back the last one, and draw the noise of this one (line 9 of Algorithm
        1).

        If a comparison is due, compare the parameters of all workers; collective.
        """
        self._open()
        if self._steps and self._drift.due(self._steps - 1):
            named = [(place.name, place.parameter) for place in self._places]
            self._drift.compare(self._steps - 1, [p for _, p in named], lambda: named, self._step_rates)
        self._noise = self.rules.noise.drawn(seed=self.rules.seed, step=self._steps)
        self._scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        self._step_rates.add([self._noise.std if self._noise else 0.0])

    def _slice(self, names: frozenset[str]) -> ErrorFeedback:
        """Return the `ErrorFeedback` of a bucket, which has the error memories of the bucket's parameters. `names` are
        the names of these parameters.

        If DDP has formed this bucket for the first time, or anew, an `ErrorFeedback` is made. It gets the error
        memories that the parameters had in old buckets.
        """
        if names not in self._slices:
            for old in [key for key in self._slices if not key.isdisjoint(names)]:
                part = self._slices.pop(old)
                self._loose |= part.slice.by_name(part.memory.vector)
            of = Slice([place for place in self._places if place.name in names], self.device)
            self._slices[names] = self._feedback(of, self.rules.seed)
        return self._slices[names]

    @torch.no_grad()
    def memory(self) -> dict[str, Tensor]:
        """Return this worker's error memory in units of a gradient, as a dictionary with one tensor for each parameter
        name.

        Each tensor has the shape of its parameter, and is in at least float32. During a backward pass, the result is
        the error memory after the previous step.
        """
        self._settle()
        found = {place.name: torch.zeros_like(place.parameter, dtype=torch.float32) for place in self._places}
        with self._lock:
            found |= {name: view.clone() for name, view in self._loose.items()}
            for part in self._slices.values():
                found |= part.slice.by_name(part.memory.vector.clone())
        return found

    def _saved_fields(self) -> list[Vector | Value]:
        shapes = {place.name: place.parameter.shape for place in self._places}
        whole = self._whole

        def aggregator() -> SavedAggregator | None:
            return None if whole is None else whole.aggregator_state()

        return [
            *super()._saved_fields(),
            Vector(("error", ANY), shapes, self.memory, self._load_errors),
            Value(("aggregator",), SavedAggregator | None, aggregator, skip),
        ]

    @property
    def _whole(self) -> ErrorFeedback | None:
        """The `ErrorFeedback` of all parameters together, with scope="model".

        It is None with scope="bucket". It is also None before the first exchange, if no state was loaded.
        """
        return next(iter(self._slices.values()), None) if self.rules.scope == "model" else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.rules.scope == "model":
            whole = self._slice(frozenset(place.name for place in self._places))
            aggregator = typed(SavedAggregator | None, state["aggregator"])
            if aggregator is not None:
                self._use_compressor(whole)
                whole.load_aggregator(aggregator)

    def _identity(self) -> dict[str, Any]:
        group = self.channel.group
        return {
            "seed": self.rules.seed,
            "rank": group.rank,
            "workers": group.size,
            "scope": self.rules.scope,
            "exchange": self.rules.compression.exchange,
        }
