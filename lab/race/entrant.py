"""A method set up to train by the clock: packsaddle's local updates, or torch's own exchanges, with Muon or AdamW.

This module imports torch.distributed for the peers, as `lab.race.peers` does.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.nn.parallel import DistributedDataParallel

from lab.race.inner import make_inner
from lab.race.recipe import share_of_peak
from lab.race.target_settings import Method
from lab.race.workload import Batch
from lab.tasks import Task
from packsaddle import Compression, Identity, LocalUpdates, OuterSGD, register_ddp_hook
from packsaddle.comm import Group, ring_all_reduce

_ONE_BUCKET = 1e6  # MiB: PowerSGD's chained collectives need one bucket on gloo


@dataclass
class Entrant:
    """One method in training. Construction, `step`, `flush` and `common_model` are collective."""

    network: Task
    forward: nn.Module  # maps a batch to its mean loss
    optimizers: list[torch.optim.Optimizer]
    schedules: list[torch.optim.lr_scheduler.LRScheduler]
    sent: Callable[[], int]  # bytes that this worker has sent, start and flush included: counted or computed
    flush: Callable[[], object] = int  # makes the models of all workers identical at the end
    average: Callable[[], object] = int  # called after each step, for methods that average parameters
    local: LocalUpdates | None = None
    steps: int = 0
    # True: workers' models differ between averages, and the common model is their mean.
    diverges: bool = False

    def step(self, batch: Batch) -> None:
        """Run forward, backward, exchange and update."""
        self.network.zero_grad()
        self.forward(*batch).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()
        self.average()
        self.steps += 1

    @contextmanager
    def common_model(self, group: Group) -> Iterator[None]:
        """Set the parameters to the workers' common model within the context.

        That is the anchor of local updates, or for local SGD, which averages models, the mean of the workers' models.
        """
        if self.local is not None and not self.diverges:
            with self.local.at_anchor():
                yield
            return
        tensors = [p.data for p in self.network.parameters()] if self.diverges else []
        own = [t.clone() for t in tensors]
        for t in tensors:
            group.all_reduce(t.div_(group.size))
        yield
        for t, before in zip(tensors, own, strict=True):
            t.copy_(before)


def enter(method: Method, network: Task, lr: float, *, steps: int, warm_up: int) -> Entrant:
    """Set up a method for training; collective.

    The learning rate rises to `lr` in `warm_up` steps and then falls until step `steps`.
    """
    optimizers = make_inner(network, method.inner, lr, method.betas)
    schedules: list[torch.optim.lr_scheduler.LRScheduler] = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: share_of_peak(step, warm_up, steps)) for each in optimizers
    ]
    entrant = Entrant(network, network, optimizers, schedules, sent=int)
    kinds = {
        "alone": _alone,
        "dense": _dense,
        "hook": _hook,
        "local": _local,
        "local-sgd": _local_sgd,
        "powersgd": _powersgd,
    }
    kinds[method.kind](method, entrant)
    return entrant


def _alone(method: Method, entrant: Entrant) -> None:
    """Set up training without any exchange: the entrant remains as it is."""


def _local(method: Method, entrant: Entrant) -> None:
    local = LocalUpdates(
        entrant.optimizers,
        Compression(method.make_compressor(), dense_below=method.dense_below, exchange=method.exchange),
        every=method.every,
        overlap=method.overlap,
        outer=None if method.outer is None else OuterSGD(*method.outer),
        mean_momentum=0.0,  # 0 in all rows of the race, so that they are comparable
        keep_unsent=method.keep_unsent,
    )
    last = method.make_compressor() if method.flush == "compressed" else Identity()
    entrant.local, entrant.flush = local, partial(local.flush, last)
    # Without error memory and outer optimizer this is local SGD, here with averages in 16 bits.
    entrant.diverges = not method.keep_unsent and method.outer is None
    entrant.sent = lambda: local.ledger.total.sent


def _local_sgd(method: Method, entrant: Entrant) -> None:
    """Set up local SGD: torch's averager averages the parameters in float32 at the end of each period of steps."""
    averager = PeriodicModelAverager(method.every, warmup_steps=0)
    world = dist.group.WORLD
    assert world is not None
    averager.step = 1  # starting at 0, torch's averager would average after the first step of each period
    averages = 0

    def average() -> None:
        nonlocal averages
        averages += averager.step % method.every == 0
        averager.average_parameters(entrant.network.parameters())

    def flush() -> None:
        nonlocal averages
        if entrant.steps % method.every:
            averages += 1
            average_parameters(entrant.network.parameters(), world)

    entrant.average, entrant.flush, entrant.diverges = average, flush, True
    entrant.sent = lambda: averages * _ring(entrant.network, 4)


def _dense(method: Method, entrant: Entrant) -> None:
    model = _wrapped(entrant.network, None)
    if method.bits == 16:
        model.register_comm_hook(None, fp16_compress_hook)
    entrant.forward = model
    entrant.sent = lambda: entrant.steps * _ring(entrant.network, method.bits // 8)


def _hook(method: Method, entrant: Entrant) -> None:
    model = _wrapped(entrant.network, None)
    hook = register_ddp_hook(model, method.make_compressor(), optimizer=entrant.optimizers)
    entrant.forward = model
    entrant.sent = lambda: hook.ledger.total.sent


def _powersgd(method: Method, entrant: Entrant) -> None:
    model = _wrapped(entrant.network, _ONE_BUCKET)
    state = PowerSGDState(None, method.rank, start_powerSGD_iter=method.start)
    model.register_comm_hook(state, powerSGD_hook)
    entrant.forward = model
    size = sum(p.numel() for p in entrant.network.parameters())

    def sent() -> int:
        numbers = min(entrant.steps, method.start) * size + state.total_numel_after_compression
        return ring_all_reduce(4 * numbers, dist.get_world_size()).sent

    entrant.sent = sent


def _wrapped(network: Task, bucket: float | None) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch replaces bucket_cap_mb by two arguments
        return DistributedDataParallel(network, broadcast_buffers=False, bucket_cap_mb=bucket)


def _ring(network: Task, itemsize: int) -> int:
    """Return the bytes that a worker sends in a ring all-reduce of the parameters, at `itemsize` bytes each."""
    size = itemsize * sum(p.numel() for p in network.parameters())
    return ring_all_reduce(size, dist.get_world_size()).sent
