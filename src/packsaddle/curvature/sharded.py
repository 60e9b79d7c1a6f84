"""Derivatives of a network that FSDP2 shards: vectors are this worker's part, and no worker holds a whole one.

A vector is float64[n], the concatenation of the local shards of the trainable parameters (`DTensor.to_local()`); of R
shards each has about d / R numbers. Dot products are one all-reduce of one double, replicas counted once. Gradients
come from `backward`, in which FSDP averages over workers, and Hessian-vector products from differences of them: FSDP
has no double backward. As its passes are collective, workers with fewer batches go through their last one again, with
weight 0.

Whether a parameter is sharded is asked without importing torch.distributed.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.curvature.hessian import Curvature, LossFn, NotFiniteError, batch_size, evaluating
from packsaddle.curvature.narrow_convolutions import safe_derivatives


class ShardedCurvature(Curvature):
    """`Curvature` of a model whose trainable parameters are all DTensors on one mesh, that of the process group.

    The mesh may replicate (HSDP). Raises ValueError, on all workers, where some parameters are not sharded, where the
    mesh is not the whole group, where two of its dimensions share a tensor's, and for a worker without batches.
    """

    has_double_backward = False

    def __init__(self, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], channel: Communicator) -> None:
        parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        if not all(hasattr(p, "placements") for p in parameters):
            raise ValueError("model must have all trainable parameters sharded, or none: some are not DTensors")
        if any(p.device_mesh.size() != channel.group.size for p in parameters):
            raise ValueError(
                f"model must be sharded over the {channel.group.size} workers of the process group, got a mesh of "
                f"{parameters[0].device_mesh.size()}"
            )
        self._copies = [_copies(p) for p in parameters]
        mine = torch.tensor([sum(1 for _ in batches)], device=parameters[0].device)
        counts = [int(count) for count in channel.group.all_gather(mine)]
        if not min(counts):
            raise ValueError(f"every worker of a sharded model needs batches, worker {counts.index(0)} has none")
        self._rounds = max(counts)
        super().__init__(model, loss_fn, batches, channel)
        self._sizes = [t.numel() for t in self._tensors]
        self.held = max(int(n) for n in channel.group.all_gather(torch.tensor([sum(self._sizes)], device=self.device)))

    def gradient(self) -> tuple[Tensor, float]:
        """Return this worker's part of grad f and the standard error; collective.

        The batches that workers go through together count as one.
        """
        self.passes += 1
        spread, rounds = 0.0, 0
        total = torch.zeros(sum(self._sizes), dtype=torch.float64, device=self.device)
        for part, examples in self._backward():
            total += part
            seen = self._sum(examples)
            spread += self.dot(part, part) / seen
            rounds += 1
        mean = self._finite(total.div_(self.examples))
        if rounds == 1:
            return mean, math.inf
        within = max(0.0, spread - self.examples * self.dot(mean, mean)) / (rounds - 1)
        return mean, math.sqrt(within / self.examples)

    def gradient_at(self, direction: Tensor, distance: float) -> Tensor:
        """Return this worker's part of grad f(x + distance * direction), given that of the direction; collective."""
        self.passes += 1
        self._displaced += 1
        total = torch.zeros_like(direction)
        with self.moved(direction, distance, dither=self._displaced):
            for part, _ in self._backward():
                total += part
        return self._finite(total.div_(self.examples))

    def hessian_vector(self, v: Tensor) -> Tensor:
        """Raise NotImplementedError."""
        raise NotImplementedError("a sharded model has no double backward")

    def why_no_double_backward(self) -> str | None:
        """Return that parameters are sharded."""
        return "parameters are sharded"

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Return <a, b> of two vectors of which each worker has its part; collective, one double."""
        pieces = zip(torch.split(a, self._sizes), torch.split(b, self._sizes), self._copies, strict=True)
        return self._sum(sum(float(x @ y) / copies for x, y, copies in pieces))

    def size_of_parameters(self) -> float:
        """Return ||x||; collective."""
        pieces = zip(self._tensors, self._copies, strict=True)
        return math.sqrt(self._sum(sum(float(t.double().square().sum()) / copies for t, copies in pieces)))

    def random_vector(self, generator: torch.Generator | None) -> Tensor:
        """Return this worker's part of the vector that an unsharded model has; a parameter's at a time is whole."""
        rng = self._shared_generator(generator)
        parts = []
        for p in self.parameters:
            whole = torch.randn(p.shape.numel(), generator=rng, dtype=torch.float64).view(p.shape)
            parts.append(_part(whole, p).reshape(-1).to(self.device))
        return torch.cat(parts)

    def _sum(self, value: float) -> float:
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self._channel.mean(total, "certificate")) * self._channel.group.size

    def _finite(self, vector: Tensor) -> Tensor:
        if not math.isfinite(self.dot(vector, vector)):
            raise NotFiniteError("a derivative of the loss is not finite at the present parameters")
        return vector

    def _backward(self) -> Iterator[tuple[Tensor, int]]:
        """Yield, batch by batch, this worker's part of the gradient of the losses of all workers' examples, and the
        number of its own examples. Gradients that parameters had are put back afterwards."""
        parameters: list[Any] = self.parameters
        before = [p.grad for p in parameters]
        try:
            with torch.enable_grad(), evaluating(self._model), safe_derivatives(self._model):
                for batch, n in self._read():
                    for p in parameters:
                        p.grad = None
                    torch.autograd.backward(self._loss_fn(self._model, batch) * n)
                    flat = [
                        (torch.zeros_like(t) if p.grad is None else p.grad.to_local()).reshape(-1).double()
                        for p, t in zip(parameters, self._tensors, strict=True)
                    ]
                    yield torch.cat(flat).mul_(self._channel.group.size), n  # FSDP took the mean
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad

    def _read(self) -> Iterator[tuple[Any, int]]:
        read = 0
        for batch in self._batches:
            read += 1
            yield batch, batch_size(batch)
        for _ in range(self._rounds - read):
            yield batch, 0

    def _totals(self) -> tuple[float, int]:
        try:
            return super()._totals()
        finally:  # FSDP keeps the outermost parameters whole after a forward pass alone, and would use them again
            modules: Iterable[Any] = self._model.modules()
            for module in modules:
                if hasattr(module, "reshard") and hasattr(module, "unshard"):
                    module.reshard()

    def _differs_from_rank_0(self) -> bool:
        return False  # every worker has another part


def derivatives(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], channel: Communicator) -> Curvature:
    """Return the derivatives of a model, sharded or not; collective."""
    sharded = any(p.requires_grad and hasattr(p, "placements") for p in model.parameters())
    return (ShardedCurvature if sharded else Curvature)(model, loss_fn, batches, channel)


def _copies(p: Any) -> int:
    """Return the number of workers with the same shard. Raises ValueError if two mesh dimensions share a tensor's."""
    dims = [placement.dim for placement in p.placements if placement.is_shard()]
    if len(set(dims)) < len(dims):
        raise ValueError("model must not have a dimension of a parameter sharded along two dimensions of its mesh")
    sizes = [p.device_mesh.size(i) for i, placement in enumerate(p.placements) if not placement.is_shard()]
    return math.prod(sizes)


def _part(whole: Tensor, p: Any) -> Tensor:
    """This worker's shard of a tensor that is laid out like a DTensor p."""
    place = p.device_mesh.get_coordinate()
    for i, placement in enumerate(p.placements):
        if placement.is_shard():
            chunks = whole.chunk(p.device_mesh.size(i), placement.dim)
            nothing = whole.narrow(placement.dim, 0, 0)
            whole = chunks[place[i]] if place[i] < len(chunks) else nothing
    return whole
