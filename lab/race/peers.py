"""Contenders set up for training: packsaddle's optimizer, or torch's DistributedDataParallel with its own hooks.

A peer is one of torch's own methods, for which this module imports torch.distributed. In the package, only
`packsaddle.comm` and `packsaddle.hooks.ddp` import it.
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
from lab.tasks import Task
from packsaddle import CompressedSGD, Compression, LocalUpdates, OuterSGD, Overlap, register_ddp_hook
from packsaddle.comm import Bytes, ring_all_gather, ring_all_reduce
from packsaddle.compressors import TopK
from packsaddle.errors import MissingExtraError

# DDP rebuilds its buckets after the first step, so torch's hook does not allow error feedback before the third.
_POWERSGD_FROM = 2
# The hooks of these peers start a second collective when the first one is done. With several buckets, workers may start
# them in different orders, in which case gloo aborts. One bucket for all gradients avoids this.
_CHAINED = ("powersgd-N", "ddp-uint8")
_ONE_BUCKET = 1e6  # MiB


class CannotRunError(RuntimeError):
    """Raised if a peer does not work on this backend. It has torch's message, which is identical on all workers."""


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
    wait: Callable[[], None] = lambda: None  # waits until no exchange overlaps with further steps
    end: Callable[[], None] = lambda: None  # ends background services, such as torchft's; collective

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
    inner = getattr(racer.optimizer, "optim", racer.optimizer)  # torch's local SGD wraps another optimizer
    racer.schedule = recipe.schedule(inner)
    return racer


def _enter(contender: Contender, task: Task, recipe: Recipe) -> Racer:
    """Set up a contender with a constant learning rate; `enter` adds the schedule."""
    if contender.hook:
        return _hooked(contender, task, recipe)
    if contender.every:
        return _local_updates(contender, task, recipe)
    if contender.compressor is not None:
        ours = CompressedSGD(
            task.parameters(),
            contender.lr,
            contender.compressor,
            noise=contender.noise,
            momentum=contender.momentum,
        )
        start = ours.ledger.total  # bytes of the initial broadcast of rank 0's parameters
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
        warnings.simplefilter("ignore", FutureWarning)  # newer torch replaces bucket_cap_mb by two arguments
        # Do not broadcast buffers: DDP would send batch statistics in every forward pass, and packsaddle does not.
        return DistributedDataParallel(task, broadcast_buffers=False, bucket_cap_mb=bucket)


def _hooked(contender: Contender, task: Task, recipe: Recipe) -> Racer:
    """Set up DistributedDataParallel with packsaddle's hook, and one of torch's optimizers."""
    assert contender.compressor is not None
    assert contender.hook is not None
    sgd, model = recipe.make(task.parameters(), contender.lr), _wrapped(task, None)
    compressor, scope = contender.compressor, contender.hook
    hook = register_ddp_hook(model, compressor, noise=contender.noise, scope=scope, optimizer=sgd)
    start = hook.ledger.total
    return Racer(task, model, sgd, lambda _: _since(hook.ledger.total, start))


def _local_updates(contender: Contender, task: Task, recipe: Recipe) -> Racer:
    """Set up packsaddle's local updates, with one of torch's optimizers on each worker."""
    assert contender.compressor is not None
    assert contender.every is not None
    sgd = recipe.make(task.parameters(), contender.lr, momentum=contender.momentum)
    local = LocalUpdates(
        sgd,
        contender.compressor,
        every=contender.every,
        outer=torchft_diloco.outer if contender.outer == "nesterov" else None,
        overlap=Overlap(contender.delay, contender.fragments),
        mean_momentum=0.0,  # 0 in all rows of the race, so that they are comparable
        noise=contender.noise,
    )
    return Racer(task, task, sgd, _counted(local), wait=local.wait)


def _counted(local: LocalUpdates) -> Callable[[int], Bytes]:
    """Return a function that returns the bytes of local updates since now, including exchanges in progress."""
    start = local.ledger.total

    def moved(_: int) -> Bytes:
        local.wait()
        return _since(local.ledger.total, start)

    return moved


def _sparseloco(contender: Contender, task: Task, sgd: torch.optim.Optimizer) -> Racer:
    """Set up SparseLoCo (Sarfi et al. 2025, algorithm 1).

    It sends the largest entries of 0.95 e + (a - x) in 2 bits, where e is the error memory, a the anchor and x the
    parameters. As in the authors' code, each coordinate is averaged only over the workers that sent it.
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
    """Make one step of a contender, to test if it works here. Raises CannotRunError on all workers if it does not."""
    try:
        racer.step(batch)
    except (IndexError, RuntimeError, ValueError) as error:
        # ddp-uint8 fails on all workers, after a collective that all have completed; other errors are unexpected.
        if contender.peer != "ddp-uint8":
            raise
        raise CannotRunError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    """Return the first line of torch's message, without the text that torch adds to errors in callbacks."""
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
        warnings.simplefilter("ignore", DeprecationWarning)  # torch uses its deprecated torch.jit.script on import
        from torch.distributed.optim import PostLocalSGDOptimizer
    state = PostLocalSGDState(None, None, 0, post_local_gradient_allreduce=False)  # type: ignore[no-untyped-call]
    model.register_comm_hook(state, post_localSGD_hook)
    averager = PeriodicModelAverager(contender.number, warmup_steps=0)
    optimizer = PostLocalSGDOptimizer(sgd, averager)
    once = _reduced(task, 4)
    # torch averages in the first step of each period of N steps.
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
    """Average gradients like torch's quantization_pertensor_hook, which does not work on gloo.

    Each bucket is all-gathered as uint8 levels between its smallest and largest value, and replaced by the mean over
    workers. There is no error feedback.
    """
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
