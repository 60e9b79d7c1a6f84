"""Bounds in float32 where cancellation inside the network makes rounding errors far larger than the unit roundoff."""

from typing import Any

import pytest
import torch
from searches import arguments, certified, dense_hessian, derivatives
from torch import Tensor, nn

from packsaddle import Verdict, certify, simulate

cross_entropy = nn.functional.cross_entropy


def separated(scale: float) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a softmax classifier of separable examples; its loss is convex and nearly 0, so that 1 - p cancels."""
    rng = torch.Generator().manual_seed(0)
    model, x = nn.Linear(8, 3), torch.randn(256, 8, generator=rng)
    with torch.no_grad():
        model.weight.copy_(scale * torch.randn(3, 8, generator=rng))
        model.bias.zero_()
        best = model(x).topk(2).values
    x = x[best[:, 0] - best[:, 1] > scale]
    return model, x, model(x).argmax(1)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def in_single(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that no float64 copy of the model computes in float64."""
    return cross_entropy(model(batch[0]).float(), batch[1])


def of_float32_alone(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that raises an error with a float64 copy of the model."""
    return cross_entropy(batch[0].float() @ model.weight.T + model.bias, batch[1])


@pytest.mark.parametrize("loss_fn", [loss_fn, in_single, of_float32_alone])
def test_rounding_is_not_negative_curvature(loss_fn: Any) -> None:
    model, *batch = separated(14.0)
    for seed in range(2):
        for verdict in ({"epsilon": None}, {"epsilon": 1e-2, "hessian_lipschitz": 1e-20}):
            found = certify(model, loss_fn, [tuple(batch)], **arguments(seed=seed, **verdict))
            assert found.verdict is Verdict.UNDECIDED
            assert found.lambda_min_lower <= 0 <= found.lambda_min_upper


def test_bounds_hold_for_the_hessian_in_double() -> None:
    """A normalization of nearly equal activations amplifies rounding errors."""
    rng = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in (*model[0].parameters(), *model[3].parameters()):
            p.copy_(torch.randn(p.shape, generator=rng))
        model[0].weight.mul_(1e-3)  # type: ignore[operator, union-attr]
        model[0].bias.fill_(10.0)  # type: ignore[operator, union-attr]
    x, labels = torch.randn(64, 3, generator=rng), torch.randint(0, 3, (64,), generator=rng)
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, loss_fn, (x, labels)))
    found = certified(model, loss_fn, [(x, labels)], epsilon=None, hessian_lipschitz=None, max_hvps=60, tolerance=1e-4)
    assert found.lambda_min_lower <= eigenvalues[0] <= found.lambda_min_upper
    assert found.lambda_max_lower <= eigenvalues[-1] <= found.lambda_max_upper


def test_workers_agree_on_products_in_double() -> None:
    """One worker has no batch; with the second loss the copy of one worker fails, so none has a product."""
    model, x, labels = separated(1.0)
    v = torch.randn(27, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = dense_hessian(model, loss_fn, (x, labels)) @ v

    def work(rank: int) -> tuple[Tensor | None, ...]:
        own, *_ = separated(1.0)
        batches: list[Any] = [[(x[:30], labels[:30])], [(x[30:], labels[30:])], []]
        failing = of_float32_alone if rank == 1 else loss_fn
        return tuple(derivatives(own, f, batches[rank]).product_in_double(v) for f in (loss_fn, failing))

    for found, none in simulate(work, 3):
        assert found is not None
        assert float((found - exact).norm()) <= 1e-12 * float(exact.norm())
        assert none is None
