"""The methods of the race: how workers that train one network exchange. `METHODS` has all of them, by name.

A method is a function here and a line in the table. It gets a worker that trains by itself, and adds the exchange to
it. This module imports torch.distributed for the peers; in the package only `packsaddle.comm` and `packsaddle.hooks`
import it.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lab.race.gpt import GPT, Recipe, make_optimizers
from packsaddle import (
    CompressedSGD,
    Compression,
    LocalUpdates,
    OuterAgreement,
    OuterSGD,
    Rounded,
    TopK,
    register_ddp_hook,
)
from packsaddle.comm import Group, connect, resolve, ring_all_reduce
from packsaddle.compressors import Compressor, Message
from packsaddle.errors import require

EVERY = 8  # steps between two rounds of local updates, the default of `LocalUpdates`
_ONE_BUCKET = 1e6  # MiB: PowerSGD's chained collectives need one bucket on gloo
_JOIN_MS = 30_000  # milliseconds that torchft's lighthouse waits for late workers


class Worker:
    """One worker in training. Construction, `step` and `flush` are collective.

    As it is made, it trains alone; a method replaces what its exchange changes.
    """

    def __init__(self, network: GPT, recipe: Recipe, workers: int) -> None:
        self.network, self.recipe, self.workers = network, recipe, workers
        self.optimizers: list[torch.optim.Optimizer] = make_optimizers(network, recipe)
        self.forward: nn.Module = network  # maps windows x and y to their mean loss
        self.exchange: Callable[[], object] = int  # called between backward and the optimizers' steps
        self.local: LocalUpdates | None = None
        self.flush: Callable[[], object] = int  # gives all workers the same parameters at the end
        self.end: Callable[[], object] = int  # ends background services; collective
        self.sent: Callable[[], int] = int  # bytes that this worker has sent: counted, or for peers computed
        self.steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        """Train on windows of text x and their next characters y, int64[n, block] each."""
        for settings in (settings for optimizer in self.optimizers for settings in optimizer.param_groups):
            settings["lr"] = self.recipe.rate_at(self.steps)
        self.network.zero_grad()
        self.forward(x, y).backward()
        self.exchange()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1

    def ring(self, itemsize: int) -> int:
        """Return the bytes that a worker sends in a ring all-reduce of the parameters, at `itemsize` bytes each."""
        return ring_all_reduce(itemsize * sum(p.numel() for p in self.network.parameters()), self.workers).sent


@dataclass(frozen=True)
class Method:
    """How the workers of a training exchange: `set_up` adds it to one worker, and is collective."""

    set_up: Callable[[Worker], object]
    every: int = 1  # steps between two exchanges
    overlap: int = 0  # steps behind which an exchange runs
    is_simulated: bool = True  # False: it needs a process for each worker
    is_dense: bool = False  # True: in one process it is training with the windows of all workers

    def enter(self, network: GPT, recipe: Recipe, workers: int) -> Worker:
        """Return a worker that trains the network by this method; collective."""
        worker = Worker(network, recipe, workers)
        self.set_up(worker)
        return worker

    def next_quiet(self, step: int) -> int:
        """Return the first step, not before `step`, after which an exchange has just ended."""
        return step + (self.overlap - step) % self.every


def dense(bits: int = 32) -> Method:
    """DistributedDataParallel, with torch's hook for gradients in 16 bits if `bits` is 16."""

    def set_up(worker: Worker) -> None:
        worker.sent = lambda: worker.steps * worker.ring(bits // 8)
        if resolve(None).size > 1:
            model = _wrapped(worker.network)
            if bits == 16:
                model.register_comm_hook(None, fp16_compress_hook)
            worker.forward = model

    return Method(set_up, is_simulated=bits == 32, is_dense=True)


def local(every: int = EVERY, overlap: int = 0, **arguments: Any) -> Method:
    """packsaddle's LocalUpdates; `arguments` are further ones of its constructor."""

    def set_up(worker: Worker) -> None:
        updates = LocalUpdates(worker.optimizers, model=worker.network, every=every, overlap=overlap, **arguments)
        worker.local, worker.flush, worker.sent = updates, updates.flush, lambda: updates.ledger.total.sent

    return Method(set_up, every, overlap)


def hook(compressor: Compressor) -> Method:
    """packsaddle's hook of DistributedDataParallel; without processes, the same exchange of the whole gradient."""

    def set_up(worker: Worker) -> None:
        if torch.distributed.is_initialized():
            model = _wrapped(worker.network)
            ledger = register_ddp_hook(model, compressor, optimizer=worker.optimizers).ledger
            worker.forward = model
        else:
            averaged = _AveragedGradients(worker.network, compressor)
            worker.exchange, ledger = averaged.exchange, averaged.sgd.ledger
        start = ledger.total.sent
        worker.sent = lambda: ledger.total.sent - start

    return Method(set_up)


def algorithm_1(compressor: Compressor) -> Method:
    """packsaddle's CompressedSGD: the paper's Algorithm 1, with plain SGD in place of AdamW."""

    def set_up(worker: Worker) -> None:
        sgd = CompressedSGD(worker.network.parameters(), worker.recipe.rate, compressor)
        broadcast = sgd.ledger.total.sent  # of rank 0's parameters
        worker.optimizers, worker.sent = [sgd], lambda: sgd.ledger.total.sent - broadcast

    return Method(set_up)


def power_sgd(rank: int) -> Method:
    """torch's powerSGD_hook, which compresses after a tenth of the training, as torch advises."""

    def set_up(worker: Worker) -> None:
        start = max(2, worker.recipe.steps // 10)  # DDP makes its buckets again after the first step
        model, state = _wrapped(worker.network, _ONE_BUCKET), PowerSGDState(None, rank, start_powerSGD_iter=start)
        model.register_comm_hook(state, powerSGD_hook)
        worker.forward = model

        def sent() -> int:
            once = ring_all_reduce(4 * state.total_numel_after_compression, worker.workers).sent
            return min(worker.steps, start) * worker.ring(4) + once

        worker.sent = sent

    return Method(set_up, is_simulated=False)


def torchft_diloco(every: int) -> Method:
    """torchft's DiLoCo with its own Manager on gloo: each worker is a replica, and worker 0 runs the lighthouse.

    The outer optimizer is the published one (Douillard et al. 2023), of rate 0.7 with Nesterov momentum 0.9, and the
    exchange in float32. Raises MissingExtraError without torchft.
    """

    def set_up(worker: Worker) -> None:
        os.environ.setdefault("RUST_LOG", "warn")  # by default torchft's servers log several lines per round
        torchft: Any = require("torchft.local_sgd", "torchft", "torchft's DiLoCo")
        group, net = resolve(None), worker.network
        lighthouse, place = _lighthouse(group)
        manager = connect(place, name=f"worker-{group.rank}", min_workers=group.size)
        outer = torch.optim.SGD(net.parameters(), 0.7, momentum=0.9, nesterov=True)
        (inner,) = worker.optimizers
        rounds = torchft.DiLoCo(manager, [net], inner, outer, sync_every=every, pin_memory=False)
        rounds.__enter__()

        def end() -> None:
            rounds.__exit__(None, None, None)
            group.all_reduce(torch.zeros(1))  # no worker may leave while another one needs its Manager
            manager.shutdown(wait=False)
            if lighthouse is not None:
                lighthouse.shutdown()

        worker.end, worker.sent = end, lambda: worker.steps // every * worker.ring(4)

    return Method(set_up, every, is_simulated=False)


def _lighthouse(group: Group) -> tuple[Any, str]:
    """Start torchft's lighthouse on worker 0; return it (None on other workers) and its address."""
    server, port = None, torch.zeros(1, dtype=torch.int64)
    if group.rank == 0:
        coordination: Any = require("torchft.coordination", "torchft", "torchft's DiLoCo")
        server = coordination.LighthouseServer(bind="0.0.0.0:0", min_replicas=group.size, join_timeout_ms=_JOIN_MS)
        port[0] = int(server.address().rsplit(":", 1)[1])
    group.broadcast(port)
    return server, f"http://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{int(port)}"


def _wrapped(network: nn.Module, bucket: float | None = None) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch replaces bucket_cap_mb by two arguments
        return DistributedDataParallel(network, broadcast_buffers=False, bucket_cap_mb=bucket)


class _AveragedGradients:
    """Replaces gradients by their compressed mean over workers, as packsaddle's hook does with scope="model".

    Workers that are simulated in one process have no DistributedDataParallel. The mean is read from a step of SGD with
    rate 1 at zero.
    """

    def __init__(self, network: nn.Module, compressor: Compressor) -> None:
        self._pairs = [(p, nn.Parameter(torch.zeros_like(p))) for p in network.parameters()]
        self.sgd = CompressedSGD([zero for _, zero in self._pairs], 1.0, compressor)

    def exchange(self) -> None:
        for p, zero in self._pairs:
            zero.data.zero_()
            zero.grad = p.grad
        self.sgd.step()
        for p, zero in self._pairs:
            p.grad = -zero.data


@dataclass(frozen=True)
class Half(Compressor):
    """A compressor that sends all coordinates in float16, which an all-reduce in float16 averages.

    It is for local SGD that averages in 16 bits.
    """

    fixed_size: ClassVar[bool] = True

    @property
    def linear(self) -> bool:
        """True, except for rounding."""
        return True

    def mu(self, d: int) -> float:
        """Return the contraction for values in float16's normal range, whose relative error is at most 2^-11."""
        return 1 - 2.0**-22

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        """Round the vector to float16. Values below 6e-8 become 0; the error memory keeps the rounding error."""
        return Message({"values": v.half()})

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        """Add alpha times the values of a message to `out`, in place."""
        out.add_(message.parts["values"].to(out.dtype), alpha=alpha)


# Local SGD and DiLoCo send their updates in 16 bits and uncompressed, as their other implementations can. SparseLoCo is
# as in its published code: TopK 64 of 4,096 in 2 bits with error memory, outer SGD of rate 1, and each coordinate
# averaged over the workers that sent it.
_AGREEMENT, _TWO_BITS = OuterAgreement(0.5), Compression(Rounded())
_PEER: Mapping[str, Any] = {"mean_momentum": 0.0, "keep_unsent": False}
_WHOLE: Mapping[str, Any] = {"compressor": Compression(Half(), dense_below=0), **_PEER}
_SPARSE = Compression(TopK(64 / 4096, chunk=4096, values="int2"), exchange="senders", decay=0.95)
METHODS: Mapping[str, Method] = {
    "alone": Method(lambda worker: None),
    "dense": dense(),
    "dense, 16 bits": dense(16),
    "local": local(),
    "local, no mean momentum": local(mean_momentum=0.0),
    "local, agreement": local(outer=_AGREEMENT),
    "local, agreement, 16 bits": local(compressor=Compression(Half(), dense_below=0), outer=_AGREEMENT),
    "local 4, agreement": local(4, outer=_AGREEMENT),
    "local 4, two bits, agreement": local(4, compressor=_TWO_BITS, outer=_AGREEMENT),
    "local, two bits": local(compressor=_TWO_BITS),
    "local, overlap": local(overlap=2),
    "local, agreement, overlap": local(overlap=3, outer=_AGREEMENT),
    **{f"local SGD {every}, 16 bits": local(every, **_WHOLE) for every in (8, 32, 128)},
    **{f"DiLoCo {every}, 16 bits": local(every, outer=OuterSGD(0.7, 0.5), **_WHOLE) for every in (32, 128)},
    "SparseLoCo 32": local(32, compressor=_SPARSE, outer=OuterSGD(1.0, momentum=0.0), **_PEER),
    "hook, four bits": hook(Rounded("int4")),
    "hook, TopK 10%": hook(TopK(0.1)),
    "Algorithm 1, TopK 1%": algorithm_1(TopK(0.01)),
    "PowerSGD 4": power_sgd(4),
    "torchft DiLoCo 32": torchft_diloco(32),
}
