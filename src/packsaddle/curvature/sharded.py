"""Derivatives of a network sharded by FSDP2 or tensor parallelism; each worker has its part of every vector.

On each worker, a vector is a float64[n]: the concatenation of the local shards (`DTensor.to_local()`) of all trainable
parameters. With R shards, n is about d / R for d coordinates. A dot product is an all-reduce of one double, in which
the replicas of a shard count once.

Gradients come from `backward`, in which FSDP averages over workers. Hessian-vector products come from differences of
gradients, since FSDP has no double backward. FSDP's forward and backward passes are collective, so workers with fewer
batches than others repeat their last batch with weight 0. The workers of a tensor-parallel group process the same
batches, which count once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.sharding import is_sharded, local_part, part_of
from packsaddle.curvature.hessian import UNWATCHED, Curvature, LossFn, batch_size, differentiating


class ShardedCurvature(Curvature):
    """The `Curvature` of a model whose trainable parameters are sharded by FSDP2, tensor parallelism or both.

    `tensor_parallel` is the DeviceMesh of the workers that get the same batches, or None. If it contains all workers,
    parameters may be plain tensors. If it does not, every trainable parameter must be a DTensor. Its mesh, alone or
    combined with that of tensor parallelism, must span all workers. Meshes may have dimensions along which parameters
    are replicated (HSDP).

    Raises ValueError on all workers if a parameter violates these rules, if a parameter is a partial sum, or if a
    worker has no batches.
    """

    has_double_backward = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        channel: Communicator,
        tensor_parallel: Any = None,
    ) -> None:
        self._alike = 1 if tensor_parallel is None else tensor_parallel.size()
        parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        workers = channel.group.size
        for p in parameters:
            _check_mesh(p, workers, tensor_parallel)
        self._copies = [_copies(p, workers) for p in parameters]

        # FSDP's passes are collective, so every worker processes as many batches as the worker that has the most.
        mine = torch.tensor([sum(1 for _ in batches) for _ in range(2)], device=parameters[0].device)
        counts, again = torch.stack(channel.group.all_gather(mine)).T.tolist()
        if counts != again:
            raise ValueError("batches must be a list or a DataLoader, which can be read again, got an iterator")
        if not min(counts):
            raise ValueError(f"every worker of a sharded model needs batches, worker {counts.index(0)} has none")
        self._rounds = max(counts)
        super().__init__(model, loss_fn, batches, channel)
        self._sizes = [t.numel() for t in self._tensors]
        self.held = max(int(n) for n in channel.group.all_gather(torch.tensor([sum(self._sizes)], device=self.device)))

    def gradient(self) -> tuple[Tensor, float]:
        """Return this worker's part of the gradient of the mean loss, float64[n], and the standard error of the whole
        gradient; collective.

        For the standard error, batches that different workers process at the same time count as one batch.
        """
        squares: list[float] = []

        def look(part: Tensor, examples: int) -> None:
            seen = self.sum_of(examples) / self._alike
            squares.append(self.dot(part, part) / seen)

        self.passes += 1
        mean = self._mean_gradient(look)
        return mean, self._standard_error(sum(squares), self.dot(mean, mean), len(squares))

    def _mean_gradient(self, look: Callable[[Tensor, int], None] = lambda part, examples: None) -> Tensor:
        total = torch.zeros(sum(self._sizes), dtype=torch.float64, device=self.device)
        for part, examples in self._backward():
            total += part
            look(part, examples)
        return self._finite(total.div_(self.examples))

    def why_no_double_backward(self) -> str | None:
        return "parameters are sharded"

    def inner(self, a: Tensor, b: Tensor) -> float:
        """Return the inner product <a, b> of two sharded vectors from this worker's parts, by an all-reduce of one
        double; collective."""
        pieces = zip(torch.split(a, self._sizes), torch.split(b, self._sizes), self._copies, strict=True)
        return self.sum_of(sum(float(x @ y) / copies for x, y, copies in pieces))

    def size_of_parameters(self) -> float:
        pieces = zip(self._tensors, self._copies, strict=True)
        return math.sqrt(self.sum_of(sum(float(self._doubles(t).square().sum()) / copies for t, copies in pieces)))

    def _is_finite(self, vector: Tensor) -> bool:
        return math.isfinite(self.dot(vector, vector))

    def _backward(self) -> Iterator[tuple[Tensor, int]]:
        """Yield gradients of the loss, in rounds in which each worker processes one of its batches; collective.

        Each yield is a pair. The first item is this worker's part, float64[n], of the gradient of the loss summed over
        the round's examples on all workers. The second is the number of examples in this worker's batch, or 0 if the
        batch is repeated. At the end p.grad of each parameter is restored.
        """
        parameters: list[Any] = self.parameters
        before = [p.grad for p in parameters]
        try:
            with differentiating(self._model):
                for batch, n in self.read():
                    for p in parameters:
                        p.grad = None
                    torch.autograd.backward(self._loss_of(batch) * n)
                    flat = [
                        self._doubles(_local_gradient(p, t).reshape(-1))
                        for p, t in zip(parameters, self._tensors, strict=True)
                    ]
                    # FSDP returns the average gradient of the workers that process different batches. Multiply it by
                    # the number of these workers to get the sum.
                    yield torch.cat(flat).mul_(self._channel.group.size / self._alike), n
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad

    def read(self) -> Iterator[tuple[Any, int]]:
        read = 0
        for batch in self._batches:
            read += 1
            yield batch, batch_size(batch)
        for _ in range(self._rounds - read):
            yield batch, 0

    def _totals(self, watch: AbstractContextManager[Any] = UNWATCHED) -> tuple[Tensor, int]:
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


def derivatives(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], channel: Communicator, tensor_parallel: Any = None
) -> Curvature:
    if is_sharded(model):
        return ShardedCurvature(model, loss_fn, batches, channel, tensor_parallel)
    if tensor_parallel is not None:
        raise ValueError("tensor_parallel must be None for a model without sharded parameters")
    return Curvature(model, loss_fn, batches, channel)


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
    shards = 1
    for i, placement in enumerate(getattr(p, "placements", ())):
        if placement.is_partial():
            raise ValueError("model must not have parameters that are partial sums")
        if hasattr(placement, "dim"):  # a `Shard`, which has a `dim`, unlike `Replicate`
            shards *= p.device_mesh.size(i)
    return workers // shards


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole (unsharded) tensors into a model that may be sharded.

    Raises RuntimeError, as torch's `load_state_dict` does, if names or shapes differ from those of the model.
    """
    own: dict[str, Any] = model.state_dict()
    if not any(hasattr(tensor, "placements") for tensor in own.values()):
        model.load_state_dict(weights)
        return
    for name, tensor in own.items():
        found = getattr(weights.get(name), "shape", None)
        if found != tensor.shape:
            raise RuntimeError(f"{name} must have the shape {tuple(tensor.shape)}, got {found and tuple(found)}")
    if unknown := sorted(set(weights) - set(own)):
        raise RuntimeError(f"the model has no {unknown[0]}")
    with torch.no_grad():
        for name, tensor in own.items():
            local_part(tensor).copy_(part_of(weights[name], tensor))


def _local_gradient(p: Any, local: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(local)
    return local_part(p.grad.redistribute(placements=p.placements) if hasattr(p, "placements") else p.grad)
