"""Compressed exchange behind DistributedDataParallel, with any optimizer: two lines in a script that has it.

`register_ddp_hook` and `attach` return a `DDPHook`: the bytes, the steps, the error memory, and how to save it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, check_agreement, ring_all_reduce
from packsaddle.comm.group import group_like, resolve
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.comm.select_aggregator import choose, warn_of_nothing
from packsaddle.compressors import Compressor, TopK
from packsaddle.numerics.finite import spoil
from packsaddle.numerics.seeds import as_seed
from packsaddle.optim.background import Background, Promise
from packsaddle.optim.compression import Compression, Schedule
from packsaddle.optim.fsdp import is_sharded
from packsaddle.optim.hook import GradientHook, GradientSlice, Rules, Scope
from packsaddle.optim.inner_optimizer import innermost
from packsaddle.optim.layout import Place, Slice, dense_strides, places
from packsaddle.optim.saved_state import FORMAT, check_format, check_identity, check_shape
from packsaddle.optim.stages.escape import Escape, EscapeAfterStep, Reset
from packsaddle.optim.stages.learning_rates import Rates
from packsaddle.optim.stages.noise import Noise, Perturbation


class Stateful(Protocol):
    """An object with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return it, tensors and plain types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that DistributedDataParallel hands over together; to be replaced by their means, in place."""

    index: int  # 0 is the first of a backward pass
    is_last: bool
    buffer: Tensor  # float[n], all of them
    gradients: list[Tensor]  # views of the buffer, shaped as their parameters
    parameters: list[Tensor]


class DDPHook(GradientHook):
    """The hook of `register_ddp_hook`: it exchanges the buckets of each backward pass.

    `places` are the parameters of `module`, the model; `scale()` is what gradients are multiplied by when they come.

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
        rules: Rules,
        places: Sequence[Place],
        noise: float | Callable[[int], float],
        rates: Rates,
        scale: Callable[[], float],
    ) -> None:
        super().__init__(channel, rules, sum(place.size for place in places if not place.dense))
        self.resets: list[Reset] = []  # firings of the escape check
        self.parts: dict[str, Stateful] = {}  # what else is saved with this
        self._module, self._places, self._rates, self._scale = module, places, rates, scale
        self._named = {id(place.parameter): place for place in places}
        self.device = places[0].parameter.device
        self._perturbation = Perturbation(noise)
        self._background = Background(self.device)
        self._slices: dict[frozenset[str], GradientSlice] = {}
        self._loose: dict[str, Tensor] = {}  # error memory that is in no slice, by parameter
        self.calls = 0  # buckets that DDP has handed over
        self._waiting: list[tuple[Bucket, Promise]] = []
        self._noise: Noise | None = None  # of the running backward pass, or of the last
        self._factors: Mapping[str, float] = {}
        self._scaled = 1.0  # what the gradients are multiplied by
        self._failure: Exception | None = None  # of a bucket of that pass

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
        """Average some buckets as one vector, in place; not if another of the same pass has failed.

        DDP hands over the rest of a pass whatever became of its first buckets.
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
        bad = self._try(part, gradients, self._noise, self._scaled, self._factors)
        for bucket in buckets:  # all workers get NaNs if one had any, so that the scalers of all skip the step
            spoil(bucket.buffer, bad > 0, float("nan"))
        self._complete = buckets[-1].is_last

    def _begin(self) -> None:
        """Line 9, once the outcome of the last step is known."""
        self._open()
        if self._steps and self._drift.due(self._steps - 1):
            named = [(place.name, place.parameter) for place in self._places]
            self._drift.compare(self._steps - 1, [p for _, p in named], lambda: named, self._step_rates)
        self._noise = self._perturbation.at(seed=self._rules.seed, step=self._steps)
        self._factors, self._scaled = self._rates.factors(), self._scale()
        self._step_rates.add([self._noise.std if self._noise else 0.0])

    def _conclude(self, *, taken: bool) -> None:
        self._rates.settle(taken=taken)

    def _slice(self, names: frozenset[str]) -> GradientSlice:
        """Return the slice of these parameters; if DDP has made its buckets anew, out of what the old ones hold."""
        if names not in self._slices:
            for old in [key for key in self._slices if not key.isdisjoint(names)]:
                part = self._slices.pop(old)
                part.fold()
                self._loose |= {place.name: view for place, view in part.views()}
            of = Slice([place for place in self._places if place.name in names], self.device)
            self._slices[names] = GradientSlice(of, self._loose, self.channel, self._rules, self._allocation)
        return self._slices[names]

    @property
    def uncompressed(self) -> Bytes:
        """The bytes of as many exchanges without the hook: ring all-reduces of gradients."""
        exchanges = self.steps + self.skipped
        d = sum(place.size * place.parameter.element_size() for place in self._places)
        return ring_all_reduce(exchanges * d, self.channel.group.size)

    @torch.no_grad()
    def memory(self) -> dict[str, Tensor]:
        """Return this worker's e^(i), in units of a gradient, by parameter, with its share of what the exchange holds.

        Each is shaped as its parameter, in float32 or wider. The mean over workers is all that has not been
        applied yet. In a backward pass it is that of the step before.
        """
        self._settle()
        found = {place.name: torch.zeros_like(place.parameter, dtype=torch.float32) for place in self._places}
        with self._lock:
            found |= {name: view.clone() for name, view in self._loose.items()}
            for part in self._slices.values():
                found |= {place.name: view for place, view in part.of.named(part.pending())}
        return found

    @torch.no_grad()
    def forget(self, lost: Mapping[str, Tensor]) -> None:
        """Set e to zero (line 7), or to `lost`, by parameter and shaped as it, in units of a gradient."""
        self._settle()
        self._loose = {name: error.clone() for name, error in lost.items()}
        for part in self._slices.values():
            part.reset()
            for place, view in part.views():
                if place.name in self._loose:
                    view.copy_(self._loose.pop(place.name))

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state: e^(i) by parameter, the step, what the exchange holds, the ledger's totals.

        Tensors and plain types only; each worker has its own. With scope="bucket" what a two-way exchange holds back is
        in the error memory of its owner, since buckets may differ when it is loaded: nothing is lost, but only
        with scope="model" does a run continue bit for bit.
        """
        pending, held = self.memory(), dict[str, Any]()
        if self._rules.scope == "model":
            for part in self._slices.values():
                pending |= {place.name: view.clone() for place, view in part.views()}
                held = part.held()
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
        """Raise ValueError, naming the first difference, if `load_state_dict` would not take `state`."""
        check_format(state, "register_ddp_hook")
        check_identity(state["identity"], self._identity())
        pending = state["pending"]
        for place in self._places:
            check_shape(f"the error of {place.name}", pending.get(place.name), place.parameter.shape)
        if len(pending) > len(self._places):
            raise ValueError(f"the state is of {len(pending)} parameters, and there are {len(self._places)}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this worker's `state_dict`, `state`; raises ValueError, changing nothing, if it does not fit."""
        self.check_state_dict(state)
        pending = state["pending"]
        self._settle()
        self._slices = {}
        self._step_rates.clear()
        self._loose = {name: error.to(self.device, copy=True) for name, error in pending.items()}
        self._steps, self._rates.units = state["steps"], dict(state["rates"])
        self._skips.load_state_dict(state["skips"])
        if self._rules.scope == "model":
            self._slice(frozenset(place.name for place in self._places)).restore(state["held"], self._steps)
        self._allocation.load_state_dict(state["allocation"], self.device)
        self.ledger.load_state_dict(state["ledger"])
        self.resets = [Reset(**reset) for reset in state["resets"]]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])

    def _identity(self) -> dict[str, Any]:
        """Return what must be equal at loading and at saving."""
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
        """Return what of a `state` of `workers` others get the mean of, by place, and what they all get."""
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
        """Put means in a state, in place, and make it this worker's."""
        for (name,), mean in means.items():
            state["pending"][name] = mean.to(state["pending"][name].dtype)
        for vector in state["held"].get("vectors", {}).values():
            vector.zero_()
        here = self._identity()
        state["identity"] |= {name: here[name] for name in ("rank", "workers")}


def on_buckets(model: DistributedDataParallel, take: Callable[[Bucket], "Future[Tensor]"]) -> None:
    """Let `take` exchange a model's buckets. Raises RuntimeError if the model has a communication hook already."""

    def hook(take: Callable[[Bucket], Future[Tensor]], bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        return take(Bucket(bucket.index(), bucket.is_last(), bucket.buffer(), bucket.gradients(), bucket.parameters()))

    try:
        model.register_comm_hook(take, hook)
    except RuntimeError as error:
        if "can only be called once" not in str(error):
            raise
        raise RuntimeError(
            "this DistributedDataParallel has a communication hook already, and takes no second one; "
            "for another hook wrap model.module anew"
        ) from error


def register_ddp_hook(
    model: DistributedDataParallel,
    compressor: Compressor | Schedule | Compression = TopK(0.1),  # noqa: B008 -- immutable
    *,
    noise: float | Callable[[int], float] = 0.0,
    escape: Escape | None = None,
    error_feedback: bool = True,
    start_step: int = 0,
    seed: int = 0,
    scope: Scope = "bucket",
    optimizer: Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> DDPHook:
    """Let DistributedDataParallel exchange its gradients compressed, perturbed and with error feedback; collective.

    Every worker's p.grad after a backward pass is the mean of what all workers sent, and any optimizer may use it. With
    plain SGD and scope="model" the run is that of `CompressedSGD` (with lazy_noise=False), step by step.

    Args:
        model: what DistributedDataParallel made, on which no hook has been registered yet.
        compressor: C, or a function of the step that gives it (see `RatioRamp`), or a `Compression`, which also says
            how messages are averaged, which tensors go dense and what is checked on the way; its memory must be
            "buffer" and its on_drift "stop".
        noise: r, the standard deviation of each coordinate of xi_t in the units of a gradient, or a function of the
            step that gives it (see `Ramp`).
        escape: the escape check of lines 4-8, made after each step of `optimizer`, which must be plain SGD.
        error_feedback: keep what was not sent and add it to the next gradient.
        start_step: steps to exchange uncompressed first.
        seed: as in `CompressedSGD`.
        scope: what is compressed as one vector: each of DDP's buckets, during the backward pass, or all of the
            model at its end, as Algorithm 1 has it.
        optimizer: what steps, to be kept from stepping where an exchange was not taken. If it is plain SGD the error
            memory follows its learning rates, so that y = x - eta e does not jump; with any other it stays as it is.
        scaler: the GradScaler whose scale is in the gradients; the error memory is then kept without it.

    Where a worker's gradient is not finite the exchange is not taken: error memories, noise and step count stay as they
    were, and every worker finds a NaN in its gradients, so that scalers skip the step on all of them together. It is
    logged by the worker whose it was, with the name of the parameter (on a CPU), and entered in `hook.skips`. More than
    `max_skipped` in a row raise NonFiniteError in the backward pass (with None they never do, and `optimizer` has
    their NaNs), and parameters that are found to differ DriftError on all workers.
    If gradients are computed and the hook is never called (the model is run past DistributedDataParallel, as
    `model.module(x)`), the next forward pass raises RuntimeError.

    Raises TypeError or ValueError for bad arguments, also if workers differ in them, RuntimeError for a second hook.

    >>> import torch
    >>> import torch.distributed as dist
    >>> import packsaddle
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> hook = packsaddle.register_ddp_hook(model, packsaddle.TopK(0.1), optimizer=optimizer)
    >>> model(torch.rand(8, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> hook.steps
    1
    >>> dist.destroy_process_group()
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"model must be a DistributedDataParallel, got {type(model).__name__}: wrap the model first, "
            f"or, where a framework has wrapped it, see packsaddle.attach"
        )
    spec = Compression.of(compressor)
    rules = Rules(spec, scope, error_feedback, start_step, as_seed(seed))
    _check_types(optimizer, scaler)
    optimizer = None if optimizer is None else innermost(optimizer)
    named = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
    found = places(named, spec.dense_below)
    _check_sizes(found, rules, model.process_group.size())
    channel, rates = Communicator(group_like(model), Ledger()), Rates(optimizer, found)
    scale = (lambda: 1.0) if scaler is None else scaler.get_scale
    hook = DDPHook(model.module, channel, rules, found, noise, rates, scale)
    if escape is not None:
        checker = EscapeAfterStep(escape, hook, optimizer, found, rates, dense_below=spec.dense_below, seed=rules.seed)
        hook.parts["escape"] = checker
    same = {**rules.arguments(), "noise": noise, "escape": escape, "lr": rates.now()}
    same |= {place.name: (tuple(place.parameter.shape), place.parameter.dtype) for place in found}
    check_agreement(channel, same, found[0].parameter.device)
    if optimizer is not None:
        hook.protect(optimizer)
    on_buckets(model, hook)
    _guard(model, hook)
    return hook


def keep_gradients_local(model: nn.Module) -> None:
    """Have every DistributedDataParallel in a model exchange neither gradients nor buffers, for `LocalUpdates`.

    For frameworks that wrap each model: backward passes leave each worker's own gradient, and forward passes its own
    buffers, such as running statistics. A model without one is left as it is. Raises RuntimeError for a
    DistributedDataParallel that has a communication hook already.

    >>> import torch
    >>> import torch.distributed as dist
    >>> import packsaddle
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    >>> packsaddle.keep_gradients_local(model)
    >>> local = packsaddle.LocalUpdates(torch.optim.AdamW(model.parameters()), every=30)
    >>> dist.destroy_process_group()
    """

    def own(bucket: Bucket) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        future.set_result(bucket.buffer)
        return future

    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            on_buckets(module, own)
            module.broadcast_buffers = False  # which would wait for worker 0's at each forward pass


def _check_types(optimizer: Optimizer | None, scaler: torch.amp.GradScaler | None) -> None:
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")


def _check_sizes(found: list[Place], rules: Rules, workers: int) -> None:
    """Raise ValueError if the compressor cannot act on the model, before a step finds out."""
    for place in found:
        if not place.parameter.is_floating_point():
            raise ValueError(f"parameters must be floating point, but {place.name} is {place.parameter.dtype}")
    compressed = [place for place in found if not place.dense]
    compressor, d = rules.at(rules.start_step), sum(place.size for place in compressed)
    spec = rules.compression
    warn_of_nothing(compressor, d, spec.dense_below, stacklevel=3)
    shapes = [place.parameter.shape for place in compressed]
    choose(compressor.for_tensors(shapes), spec.exchange, d=d, dense=1, workers=workers, back=spec.back)


def attach(model: nn.Module, *arguments: Any, **options: Any) -> DDPHook | None:
    """Register the hook on the DistributedDataParallel in what a framework made of a model.

    It is found through torch.compile and other wrappers. `arguments` and `options` are those of `register_ddp_hook`.
    If there is no DistributedDataParallel and one worker, there is nothing to exchange, and None is returned.
    Raises TypeError if there is none, or more than one, among several workers, or if the model is sharded by FSDP; and
    what `register_ddp_hook` raises.

    >>> import torch
    >>> import packsaddle
    >>> hook = packsaddle.attach(torch.nn.Linear(4, 4), packsaddle.TopK(0.1))
    >>> hook is None
    True
    """
    found = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if not found and is_sharded(model):
        raise TypeError(
            "model is sharded by FSDP, whose gradients are already reduced over workers when its hooks see them; "
            "see packsaddle.register_fsdp_hook"
        )
    if not found and resolve(None).size == 1:
        if options.get("noise") or options.get("escape") is not None:
            warnings.warn("there is one worker and no exchange, so no noise and no escape check either", stacklevel=2)
        return None
    if len(found) != 1:
        raise TypeError(
            f"model must have one DistributedDataParallel in it, got {type(model).__name__} with {len(found)}; "
            f"attach after the framework has wrapped the model"
        )
    return register_ddp_hook(found[0], *arguments, **options)


def _guard(model: DistributedDataParallel, hook: DDPHook) -> None:
    """Raise at a forward pass if gradients came before it that should have gone through the hook and did not."""
    last = [p for p in model.module.parameters() if p.requires_grad][-1]
    missed = False

    def on_gradient(_: Tensor) -> None:
        nonlocal missed
        missed = missed or model.require_backward_grad_sync

    def on_forward(module: nn.Module, _: Any) -> None:
        if hook.calls:
            for handle in handles:
                handle.remove()
        elif missed:
            raise RuntimeError(
                "gradients were computed, but DistributedDataParallel never called the hook: workers train apart. "
                "Is the model run as model.module, or wrapped again by a framework? attach to what is really run"
            )

    handles = [
        last.register_post_accumulate_grad_hook(on_gradient),
        model.module.register_forward_pre_hook(on_forward),
    ]
