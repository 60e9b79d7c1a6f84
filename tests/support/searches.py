"""Functions for tests of certificates: the fields of `Search` are plain arguments, with a seed; and dense Hessians."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle import certify
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.curvature import Curvature, Search

_FIELDS = {f.name for f in fields(Search)}


class Point(nn.Module):
    """A model whose only parameter is a problem's variable x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())


def arguments(*, seed: int | None = None, **given: Any) -> dict[str, Any]:
    """Return the arguments, of which the fields of `Search` are replaced by one argument `search`.

    `seed` determines the search's random start vector; None: it differs in each call.
    """
    if seed is not None:
        given["generator"] = torch.Generator().manual_seed(seed)
    others = {name: value for name, value in given.items() if name not in _FIELDS}
    return {**others, "search": Search(**{name: given[name] for name in given.keys() & _FIELDS})}


def certified(model: nn.Module, loss_fn: Callable[..., Tensor], batches: Any, **given: Any) -> Any:
    """Return a certificate. The default epsilon accepts every gradient, while nearly every curvature is beyond its
    threshold."""
    default = {"epsilon": 1e3, "hessian_lipschitz": 1e-6, "seed": 0, "progress": False}
    return certify(model, loss_fn, batches, **arguments(**default | given))


def derivatives(model: nn.Module, loss_fn: Callable[..., Tensor], batches: Any) -> Curvature:
    """Return the object that computes the derivatives of the mean loss, in the current group."""
    return Curvature(model, loss_fn, batches, Communicator(resolve(None), Ledger()))


def dense_hessian(model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    """Return the Hessian with respect to the trainable parameters, float64[d, d], by one backward pass for each row.

    The model is in evaluation mode.
    """
    whole = copy.deepcopy(model).double().eval()
    parameters = [p for p in whole.parameters() if p.requires_grad]
    inputs = tuple(part.double() if part.is_floating_point() else part for part in batch)
    gradients = torch.autograd.grad(loss_fn(whole, inputs), parameters, create_graph=True)
    rows = [
        torch.autograd.grad(element, parameters, retain_graph=True, materialize_grads=True)
        for element in torch.cat([g.reshape(-1) for g in gradients])
    ]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
