"""The mean loss of a network that FSDP2 or tensor parallelism shards; each process has its part of every vector.

On each process, a vector is a float64[n]: the concatenation of the local shards (`DTensor.to_local()`) of all trainable
parameters. With R shards, n is about d / R for d coordinates. A dot product is an all-reduce of one double, in which
the replicas of a shard count once.

Gradients come from `backward`, in which FSDP averages over workers. FSDP's forward and backward passes are collective,
so workers with fewer batches than others repeat their last batch with weight 0. The workers of a tensor-parallel group
process the same batches, which count once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.sharding import local_part, part_of
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.mean_loss import LossFn, MeanLoss, batch_size, differentiating


class ShardedLoss(MeanLoss):
    """The `MeanLoss` of a model whose trainable parameters are sharded by FSDP2, tensor parallelism or both.

    `tensor_parallel` is the DeviceMesh of the workers that get the same batches, or None. If it contains all workers,
    parameters may be plain tensors. If it does not, every trainable parameter must be a DTensor. Its mesh, alone or
    combined with that of tensor parallelism, must span all workers. Meshes may have dimensions along which parameters
    are replicated (HSDP).

    Raises ValueError on all workers if a parameter violates these rules, if a parameter is a partial sum, or if a
    worker has no batches.
    """

    def _prepare(self) -> None:
        if self._tensor_parallel is not None:
            self._alike = self._tensor_parallel.size()
        group = self._channel.group
        for p in self.parameters:
            _check_mesh(p, group.size, self._tensor_parallel)
        self._copies = [_copies(p, group.size) for p in self.parameters]
        self._lengths = [t.numel() for t in self._tensors]

        # FSDP's passes are collective, so every worker processes as many batches as the worker that has the most.
        mine = torch.tensor([sum(1 for _ in self._batches) for _ in range(2)], device=self._tensors[0].device)
        counts, again = torch.stack(group.all_gather(mine)).T.tolist()
        if counts != again:
            raise ValueError("batches must be a list or a DataLoader, which can be read again, got an iterator")
        if not min(counts):
            raise ValueError(f"every worker of a sharded model needs batches, worker {counts.index(0)} has none")
        self._rounds = max(counts)

    def _cut(self, share: float) -> None:
        """Cut no batch: an error on one worker would leave the others in a collective of FSDP."""

    def longest(self, length: int) -> int:
        return max(int(n) for n in self._channel.group.all_gather(torch.tensor([length], device=self.device)))

    def gradient(self) -> tuple[Tensor, float]:
        """Return this worker's part of the gradient of the mean loss, float64[n], and the standard error of the whole
        gradient; collective.

        For the standard error, batches that different workers process at the same time count as one batch.
        """
        squares: list[float] = []
        losses: list[tuple[Tensor, int]] = []

        def look(part: Tensor, loss: Tensor, examples: int) -> None:
            losses.append((loss, examples))
            squares.append(float(self.dot(part, part)) / self.total(examples))

        self.passes += 1
        mean = self._mean_gradient(look)
        self._check_repeated(losses)
        return mean, self._standard_error(sum(squares), float(self.dot(mean, mean)), len(squares))

    def _gradient_here(self) -> Tensor:
        return self._mean_gradient()

    def _mean_gradient(self, look: Callable[[Tensor, Tensor, int], None] = lambda part, loss, n: None) -> Tensor:
        total = torch.zeros(sum(self._lengths), dtype=torch.float64, device=self.device)
        for part, loss, examples in self._backward():
            total += part
            look(part, loss, examples)
        return self._finite(total.div_(self.examples))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product <a, b> of two sharded vectors from this worker's parts, float64[], by an all-reduce
        of one double; collective."""
        pieces = zip(torch.split(a, self._lengths), torch.split(b, self._lengths), self._copies, strict=True)
        mine = sum((x @ y / copies for x, y, copies in pieces), torch.zeros((), dtype=torch.float64, device=a.device))
        return self._sum(mine.reshape(1)).squeeze(0)

    def random_vector(self, generator: torch.Generator | None) -> Tensor:
        """Return this worker's part of a Gaussian vector of d numbers, which is identical on all workers; collective.

        It is drawn from `generator` on rank 0. If that is None, a new generator is seeded by the operating system.
        """
        rng = self._shared_generator(generator)
        parts = []
        for p in self.parameters:
            whole = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            parts.append(part_of(whole, p).reshape(-1))
        return torch.cat(parts).to(self.device)

    def size_of_parameters(self) -> float:
        whole = torch.cat([self._doubles(t).reshape(-1) for t in self._tensors])
        return self.norm(whole)

    def _finite(self, mean: Tensor) -> Tensor:
        # An invalid shard makes this number invalid on all workers, so all raise.
        super()._finite(self.dot(mean, mean).reshape(1))
        return mean

    def _backward(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield gradients of the loss, in rounds in which each worker processes one of its batches; collective.

        The first item of a yield is this worker's part, float64[n], of the gradient of the loss summed over the round's
        examples on all workers. The others are the mean loss of this worker's batch, and the number of its examples, or
        0 if the batch is repeated. At the end p.grad of each parameter is restored.
        """
        parameters: list[Any] = self.parameters
        before = [p.grad for p in parameters]
        try:
            with differentiating(self._model):
                for batch, n in self._read():
                    for p in parameters:
                        p.grad = None
                    loss = self._loss_of(batch)
                    torch.autograd.backward(loss * n)
                    flat = [
                        self._doubles(_local_gradient(p, t).reshape(-1))
                        for p, t in zip(parameters, self._tensors, strict=True)
                    ]
                    # FSDP returns the average gradient of the workers that process different batches. Multiply it by
                    # the number of these workers to get the sum.
                    yield torch.cat(flat).mul_(self._channel.group.size / self._alike), loss.detach(), n
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad

    def _read(self) -> Iterator[tuple[Any, int]]:
        read = 0
        for batch in self._batches:
            read += 1
            yield batch, batch_size(batch)
            self.on_batch(1 / self._rounds)
        for _ in range(self._rounds - read):
            yield batch, 0

    def _loss_of(self, batch: Any) -> Tensor:
        # With tensor parallelism the loss is a DTensor.
        loss = super()._loss_of(batch)
        return loss.full_tensor() if hasattr(loss, "full_tensor") else loss

    def _totals(self, watch: AbstractContextManager[Any] | None = None) -> tuple[float, int]:
        try:
            return super()._totals(watch)
        finally:
            # After a forward pass without a backward pass, FSDP keeps the outermost module's parameters unsharded. The
            # next forward pass would reuse them, although the shards may have been moved to another point by then.
            modules: Iterable[Any] = self._model.modules()
            for module in modules:
                if hasattr(module, "reshard") and hasattr(module, "unshard"):
                    module.reshard()

    def _differs_from_rank_0(self) -> bool:
        # The workers' parameters cannot be compared, since the workers store different shards of them.
        return False


def mean_loss_of(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    channel: Communicator,
    *,
    tensor_parallel: Any = None,
    on_batch: Callable[[float], None] = lambda part: None,
) -> MeanLoss:
    """Return the mean loss of a model that may be sharded; collective. Raises ValueError if `tensor_parallel` is given
    for a model without sharded parameters."""
    kind = ShardedLoss if any(hasattr(p, "placements") for p in model.parameters()) else Curvature
    if tensor_parallel is not None and kind is Curvature:
        raise ValueError("tensor_parallel must be None for a model without sharded parameters")
    return kind(model, loss_fn, batches, channel, on_batch=on_batch, tensor_parallel=tensor_parallel)


def _check_mesh(p: Any, workers: int, tensor_parallel: Any) -> None:
    """Raise ValueError unless FSDP averages a parameter's gradient over all workers that process different batches."""
    # The mesh of a DTensor and that of tensor parallelism must together span all workers, with one worker in common.
    if hasattr(p, "placements"):
        size = p.device_mesh.size()
        if size == workers:
            return
        if tensor_parallel is None:
            raise ValueError(
                f"model must be sharded over the {workers} workers of the process group, got a mesh of {size}; name "
                f"the mesh of tensor parallelism as tensor_parallel"
            )
        shared = set(p.device_mesh.mesh.flatten().tolist()) & set(tensor_parallel.mesh.flatten().tolist())
        if size * tensor_parallel.size() == workers and len(shared) == 1:
            return
        raise ValueError(
            f"model must be sharded over the {workers // tensor_parallel.size()} workers with other batches, got a "
            f"mesh of {size} workers, {len(shared)} of them in this worker's tensor_parallel"
        )

    # The gradient of a plain tensor is equal on all workers only if all get the same batches.
    if tensor_parallel is None or tensor_parallel.size() != workers:
        raise ValueError("model must have all trainable parameters sharded, or none: some are not DTensors")


def _copies(p: Any, workers: int) -> int:
    """Return the number of workers that have the same shard of a parameter."""
    shards = 1
    for i, placement in enumerate(getattr(p, "placements", ())):
        if placement.is_partial():
            raise ValueError("model must not have parameters that are partial sums")
        if hasattr(placement, "dim"):  # a `Shard`, which has a `dim`, unlike `Replicate`
            shards *= p.device_mesh.size(i)
    return workers // shards


def _local_gradient(p: Any, local: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(local)
    return local_part(p.grad.redistribute(placements=p.placements) if hasattr(p, "placements") else p.grad)
