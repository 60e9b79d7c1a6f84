"""Hessian-vector products of a network's mean loss, by double backward.

A product takes two backward passes for each batch of this worker, and one all-reduce of d numbers, where d is the
number of trainable coordinates.
"""

import copy
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import Solo
from packsaddle.comm.ledger import Ledger
from packsaddle.curvature.custom_functions import graph_nodes
from packsaddle.curvature.mean_loss import MeanLoss, differentiating
from packsaddle.numerics.devices import device_of_doubles

# Parts of the messages that torch's errors have if the gradient of an operation, such as a fused kernel, has no
# derivative.
_NO_DOUBLE_BACKWARD = ("is not implemented", "double backward")
_UNDIFFERENTIABLE = "torch::autograd::Error"  # name of the autograd node of a function marked once_differentiable


class Curvature(MeanLoss):
    """The mean loss over all examples with its gradient, and with Hessian-vector products by double backward."""

    @sdpa_kernel(SDPBackend.MATH)  # torch's fused attention has no double backward
    def hessian_vector(self, v: Tensor, inspect: Callable[[Tensor], None] = lambda loss: None) -> Tensor:
        """Return the Hessian-vector product H v, float64[d], for v float64[d], by double backward; collective.
        `inspect` is called with the loss of every batch of this worker, before its graph is freed."""
        self.products += 1
        self.passes += 2
        vs = self._shaped(v)

        def derivative(loss: Tensor, _: int) -> tuple[Tensor, ...]:
            inspect(loss)
            return self._differentiate_twice(loss, vs)

        return self._mean(derivative)

    def _differentiate_twice(self, loss: Tensor, vs: list[Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        pairs = [(g, u) for g, u in zip(grads, vs, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(p) for p in self.parameters)
        inputs, outputs = [g for g, _ in pairs], [u for _, u in pairs]
        return torch.autograd.grad(inputs, self.parameters, grad_outputs=outputs, materialize_grads=True)

    def _shaped(self, v: Tensor) -> list[Tensor]:
        pieces = torch.split(v, [p.numel() for p in self.parameters])
        return [piece.view(p.shape).to(p.dtype).to(p.device) for piece, p in zip(pieces, self.parameters, strict=True)]

    @sdpa_kernel(SDPBackend.MATH)
    def why_no_double_backward(self) -> str | None:
        """Try double backward on the first batch of each worker, and return the message of torch's error if it fails on
        any worker; collective. Returns None if double backward succeeds on all workers."""
        reason, ones = None, [torch.ones_like(p) for p in self.parameters]
        with differentiating(self._model):
            for batch, _ in islice(self._read(), 1):
                try:
                    loss = self._loss_of(batch)
                    grads = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
                    # A function marked once_differentiable has no second derivative, which torch would omit without an
                    # error.
                    if any(node.name() == _UNDIFFERENTIABLE for node in graph_nodes(grads)):
                        reason = "a function is marked once_differentiable"
                    else:
                        self._differentiate_twice(self._loss_of(batch), ones)
                except RuntimeError as error:
                    if not any(text in str(error) for text in _NO_DOUBLE_BACKWARD):
                        raise
                    reason = str(error).splitlines()[0]
        if not self.on_any_worker(reason is not None):
            return None
        return reason or "another worker's batch has no double backward"

    def in_double(self) -> "Curvature | None":
        """Return a `Curvature` of a float64 copy of the model, over this worker's batches alone. Returns None if this
        worker has no examples. Not collective."""
        if not self._sizes:
            return None

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return self._loss_fn(model, _to_double(batch))

        model = copy.deepcopy(self._model).to(self.device).double()
        return Curvature(model, loss_fn, self._batches, Communicator(Solo(), Ledger()))

    def product_in_double(self, v: Tensor) -> Tensor | None:
        """Return the Hessian-vector product H v, float64[d], computed with a float64 copy of the model; collective.

        Returns None if the copy of any worker raises an error, as with kernels for 16 bits, or if the loss casts to a
        shorter dtype.
        """
        self.products += 1
        self.passes += 2
        total = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        dtypes, failed = {torch.float64}, False
        try:
            if (double := self.in_double()) is not None:
                total = double.hessian_vector(v, lambda loss: dtypes.add(loss.dtype)).mul_(double.examples)
                failed = len(dtypes) > 1 or double.precision > torch.finfo(torch.float64).eps
        except Exception:  # a loss may raise any error with dtypes that it was not written for
            failed = True
        return None if self.on_any_worker(failed) else self._sum(total).div_(self.examples)


def _to_double(batch: Any) -> Any:
    moved = tree_map_only(Tensor, lambda t: t.to(device_of_doubles(t.device)), batch)
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, moved)
