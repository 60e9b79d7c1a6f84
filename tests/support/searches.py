"""Certificates as tests ask for them: the fields of `Search` among the arguments, a seeded start, dense Hessians."""

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
    """A problem's variable as a model."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())


def arguments(*, seed: int | None = None, **given: Any) -> dict[str, Any]:
    """Return the arguments, with a Search of those that are its fields; `seed` makes its start, fresh if None."""
    if seed is not None:
        given["generator"] = torch.Generator().manual_seed(seed)
    others = {name: value for name, value in given.items() if name not in _FIELDS}
    return {**others, "search": Search(**{name: given[name] for name in given.keys() & _FIELDS})}


def certified(model: nn.Module, loss_fn: Callable[..., Tensor], batches: Any, **given: Any) -> Any:
    """Return a certificate; by default with a threshold that the gradient passes and hardly any curvature does."""
    default = {"epsilon": 1e3, "hessian_lipschitz": 1e-6, "seed": 0}
    return certify(model, loss_fn, batches, **arguments(**default | given))


def derivatives(model: nn.Module, loss_fn: Callable[..., Tensor], batches: Any) -> Curvature:
    """Return the derivatives of the mean loss, in the present group."""
    return Curvature(model, loss_fn, batches, Communicator(resolve(None), Ledger()))


class _Loss(nn.Module):
    """The loss of a batch as a module around the model."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def dense_hessian(model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    """Return the Hessian by the trainable parameters, float64[d, d], in evaluation mode, by autograd's own routine."""
    whole = _Loss(copy.deepcopy(model).double().eval(), loss_fn)
    named = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    inputs = tuple(part.double() if part.is_floating_point() else part for part in batch)

    def f(x: Tensor) -> Tensor:
        pieces = zip(named.items(), x.split([p.numel() for p in named.values()]), strict=True)
        found: Tensor = torch.func.functional_call(whole, {n: t.view(p.shape) for (n, p), t in pieces}, (inputs,))
        return found

    at = torch.cat([p.detach().reshape(-1) for p in named.values()])
    hessian: Tensor = torch.autograd.functional.hessian(f, at)  # type: ignore[no-untyped-call]
    return hessian
