"""Contenders set up for training: packsaddle's optimizer, or torch's DistributedDataParallel with its own hooks.

This module imports torch.distributed for the peers, as otherwise only `packsaddle.comm` and `packsaddle.hooks.ddp` do.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.quantization_hooks import quantization_pertensor_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

from lab.race import torchft_diloco
from lab.race.contenders import ALONE, DENSE, Contender
from lab.race.recipe import CONSTANT, Recipe
from lab.race.workload import Batch
from lab.runs.tasks import Task
from packsaddle import CompressedSGD, Compression, LocalUpdates, OuterSGD, Overlap, register_ddp_hook
from packsaddle.comm import Bytes, ring_all_gather, ring_all_reduce
from packsaddle.compressors import TopK
from packsaddle.errors import MissingExtraError

# DDP rebuilds its buckets after the first step, so torch's hook does not allow error feedback before the third.
_POWERSGD_FROM = 2
# These hooks start a second collective when their first is done. With several buckets, gloo's workers may do so in
# different orders, and abort; one bucket for all gradients avoids this.
_CHAINED = ("powersgd-N", "ddp-uint8")
_ONE_BUCKET = 1e6  # MiB


class CannotRunError(RuntimeError):
    """Raised if a peer does not work on this backend; with torch's message, identical on all workers."""


@dataclass
class Racer:
    """A contender set up for training. Construction and `step` are collective."""

    task: Task
    forward: nn.Module  # maps a batch to its mean loss
    optimizer: torch.optim.Optimizer
    moved: Callable[[int], Bytes]  # bytes of this worker in its first n steps: counted (packsaddle) or computed
    steps: int = 0
    clip: float | None = None
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    wait: Callable[[], None] = lambda: None  # waits for exchanges that overlap with steps
    end: Callable[[], None] = lambda: None  # ends background services of the training; collective

    def step(self, batch: Batch) -> None:
        """Run forward, backward, exchange and update."""
        self.optimizer.zero_grad()
        self.forward(*batch).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.task.parameters(), self.clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.steps += 1


def enter(contender: Contender, task: Task, recipe: Recipe = CONSTANT) -> Racer:
    """Set up a contender to train `task`; collective. Raises CannotRunError if torch does not support it."""
    racer = _enter(contender, task, recipe)
    racer.clip = recipe.clip
    inner = getattr(racer.optimizer, "optim", racer.optimizer)  # torch's local SGD wraps one
    racer.schedule = recipe.schedule(inner)
    return racer


def _enter(contender: Contender, task: Task, recipe: Recipe) -> Racer:
    """Set up a contender with a constant rate."""
    if contender.hook:
        return _hooked(contender, task, recipe)
    if contender.every:
        return _local_updates(contender, task, recipe)
    if contender.compressor is not None:
        ours = CompressedSGD(
            task.parameters(),
            contender.lr,
            Compression(contender.compressor, memory=contender.memory),
            noise=contender.noise,
            momentum=contender.momentum,
        )
        start = ours.ledger.total  # the parameters of rank 0
        return Racer(task, task, ours, lambda _: _since(ours.ledger.total, start))
    sgd = recipe.make(task.parameters(), contender.lr)
    if contender.peer == ALONE:
        return Racer(task, task, sgd, lambda _: Bytes())
    if contender.peer == "diloco-N":
        return _diloco(contender, task, sgd)
    if contender.peer == "sparseloco-N":
        return _sparseloco(contender, task, sgd)
    model = _wrapped(task, _ONE_BUCKET if contender.peer in _CHAINED else None)
    try:
        return _MAKERS[contender.peer](contender, task, model, sgd)
    except TypeError as error:
        raise CannotRunError(_first_line(error)) from None


def _wrapped(task: Task, bucket: float | None) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch has two arguments for this one
        # Batch statistics are not exchanged, as in packsaddle: DDP would send them in every forward pass.
        return DistributedDataParallel(task, broadcast_buffers=False, bucket_cap_mb=bucket)


def _hooked(contender: Contender, task: Task, recipe: Recipe) -> Racer:
    """Set up packsaddle's hook of DistributedDataParallel, with torch's optimizer."""
    assert contender.compressor is not None
    assert contender.hook is not None
    sgd, model = recipe.make(task.parameters(), contender.lr), _wrapped(task, None)
    compressor, scope = contender.compressor, contender.hook
    hook = register_ddp_hook(model, compressor, noise=contender.noise, scope=scope, optimizer=sgd)
    start = hook.ledger.total
    return Racer(task, model, sgd, lambda _: _since(hook.ledger.total, start))


def _local_updates(contender: Contender, task: Task, recipe: Recipe) -> Racer:
    """Set up packsaddle's local updates of torch's optimizer."""
    assert contender.compressor is not None
    assert contender.every is not None
    sgd = recipe.make(task.parameters(), contender.lr, momentum=contender.momentum)
    local = LocalUpdates(
        sgd,
        contender.compressor,
        every=contender.every,
        outer=torchft_diloco.outer if contender.outer == "nesterov" else None,
        overlap=Overlap(contender.delay, contender.fragments),
        mean_momentum=0.0,  # as in all rows
        noise=contender.noise,
    )
    return Racer(task, task, sgd, _counted(local), wait=local.wait)


def _counted(local: LocalUpdates) -> Callable[[int], Bytes]:
    """Return a function of the bytes of local updates from now on, including running exchanges."""
    start = local.ledger.total

    def moved(_: int) -> Bytes:
        local.wait()
        return _since(local.ledger.total, start)

    return moved


def _sparseloco(contender: Contender, task: Task, sgd: torch.optim.Optimizer) -> Racer:
    """Set up SparseLoCo (Sarfi et al. 2025, algorithm 1): sends the largest entries of 0.95 e + (a - x) in 2 bits.

    As in its code, a coordinate of the mean is averaged over the workers that sent it.
    """
    compression = Compression(TopK(64 / 4096, chunk=4096, values="int2"), exchange="senders", decay=0.95)
    outer = OuterSGD(1.0, momentum=0.0)
    local = LocalUpdates(sgd, compression, every=contender.number, outer=outer, mean_momentum=0.0, keep_unsent=False)
    return Racer(task, task, sgd, _counted(local))


def _diloco(contender: Contender, task: Task, sgd: torch.optim.Optimizer) -> Racer:
    try:
        end = torchft_diloco.attach(task, sgd, contender.number)
    except MissingExtraError as error:
        raise CannotRunError(str(error)) from None
    once = _reduced(task, 4)
    return Racer(task, task, sgd, lambda steps: once(steps // contender.number), end=end)


def probe(racer: Racer, contender: Contender, batch: Batch) -> None:
    """Make one step of a contender that may not work here. Raises CannotRunError, on all workers."""
    try:
        racer.step(batch)
    except (IndexError, RuntimeError, ValueError) as error:
        if contender.peer != "ddp-uint8":  # it fails after a collective that every worker has completed
            raise
        raise CannotRunError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    """Return torch's message, without its wrapping of errors in callbacks."""
    return re.sub(r"^(Got the following error when running the callback: (\w+: )?)+", "", str(error)).splitlines()[0]


def _size(task: Task) -> int:
    return sum(p.numel() for p in task.parameters() if p.requires_grad)


def _since(total: Bytes, start: Bytes) -> Bytes:
    return Bytes(total.payload - start.payload, total.sent - start.sent, total.received - start.received)


def _reduced(task: Task, itemsize: int) -> Callable[[int], Bytes]:
    one = ring_all_reduce(itemsize * _size(task), dist.get_world_size())
    return lambda steps: Bytes(one.payload * steps, one.sent * steps, one.received * steps)


def _dense(contender: Contender, task: Task, model: DistributedDataParallel, sgd: torch.optim.Optimizer) -> Racer:
    return Racer(task, model, sgd, _reduced(task, 4))


def _fp16(contender: Contender, task: Task, model: DistributedDataParallel, sgd: torch.optim.Optimizer) -> Racer:
    model.register_comm_hook(None, fp16_compress_hook)
    return Racer(task, model, sgd, _reduced(task, 2))


def _bf16(contender: Contender, task: Task, model: DistributedDataParallel, sgd: torch.optim.Optimizer) -> Racer:
    model.register_comm_hook(None, bf16_compress_hook)
    return Racer(task, model, sgd, _reduced(task, 2))


def _powersgd(contender: Contender, task: Task, model: DistributedDataParallel, sgd: torch.optim.Optimizer) -> Racer:
    state = PowerSGDState(None, contender.number, start_powerSGD_iter=_POWERSGD_FROM)
    model.register_comm_hook(state, powerSGD_hook)
    dense = _size(task)

    def moved(steps: int) -> Bytes:
        numbers = min(steps, _POWERSGD_FROM) * dense + state.total_numel_after_compression
        return ring_all_reduce(4 * numbers, dist.get_world_size())

    return Racer(task, model, sgd, moved)


def _local(contender: Contender, task: Task, model: DistributedDataParallel, sgd: torch.optim.Optimizer) -> Racer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of its own torch.jit.script on import
        from torch.distributed.optim import PostLocalSGDOptimizer
    state = PostLocalSGDState(None, None, 0, post_local_gradient_allreduce=False)  # type: ignore[no-untyped-call]
    model.register_comm_hook(state, post_localSGD_hook)
    averager = PeriodicModelAverager(contender.number, warmup_steps=0)
    optimizer = PostLocalSGDOptimizer(sgd, averager)
    once = _reduced(task, 4)
    # torch averages in the first of every N steps.
    return Racer(task, model, optimizer, lambda steps: once(-(-steps // contender.number)))


def _torch_uint8(contender: Contender, task: Task, model: DistributedDataParallel, sgd: torch.optim.Optimizer) -> Racer:
    model.register_comm_hook(None, quantization_pertensor_hook)
    return _quantised(task, model, sgd)


def _own_uint8(contender: Contender, task: Task, model: DistributedDataParallel, sgd: torch.optim.Optimizer) -> Racer:
    model.register_comm_hook(None, uint8_hook)
    return _quantised(task, model, sgd)


def _quantised(task: Task, model: DistributedDataParallel, sgd: torch.optim.Optimizer) -> Racer:
    d, workers = _size(task), dist.get_world_size()
    return Racer(task, model, sgd, lambda steps: ring_all_gather(d * steps, workers))


def uint8_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Average as torch's quantization_pertensor_hook, but on gloo: all-gather each bucket as uint8 levels between its
    smallest and largest value, and apply the mean over workers. No error feedback."""
    v: Tensor = bucket.buffer()
    low = v.min()
    width = ((v.max() - low) / 255).clamp_min(torch.finfo(v.dtype).tiny)
    levels = ((v - low) / width).round_().to(torch.uint8)
    wire = torch.cat([torch.stack([low, width]).view(torch.uint8), levels])
    gathered = [torch.empty_like(wire) for _ in range(dist.get_world_size())]
    work = dist.all_gather(gathered, wire, async_op=True)
    assert work is not None

    def mean(_: torch.futures.Future[list[Tensor]]) -> Tensor:
        v.zero_()
        for message in gathered:
            low, width = message[:8].view(torch.float32)
            v.add_(message[8:].to(v.dtype).mul_(width).add_(low), alpha=1 / len(gathered))
        return v

    future: torch.futures.Future[Tensor] = work.get_future().then(mean)
    return future


_MAKERS: dict[str, Callable[[Contender, Task, DistributedDataParallel, torch.optim.Optimizer], Racer]] = {
    DENSE: _dense,
    "ddp-fp16": _fp16,
    "ddp-bf16": _bf16,
    "ddp-uint8": _torch_uint8,
    "own-uint8": _own_uint8,
    "powersgd-N": _powersgd,
    "local-sgd-N": _local,
}
