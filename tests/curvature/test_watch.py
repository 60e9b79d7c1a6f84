"""Certificates of a training as it goes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import packsaddle
from packsaddle import simulate
from packsaddle.curvature import CertifyEvery


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch).square().mean()


def data(rank: int = 0) -> Tensor:
    return torch.randn(32, 4, generator=torch.Generator().manual_seed(rank))


def linear() -> nn.Module:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-0.3, 0.4, p.numel()).view(p.shape))
    return model


def test_certificates_are_those_of_the_points_that_are_due() -> None:
    model, seen = linear(), []
    options = {"epsilon": 0.5, "hessian_lipschitz": 1.0}
    watch = CertifyEvery(model, loss_fn, data().split(8), every=3, on_certificate=seen.append, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(1, 8):
        optimizer.zero_grad()
        loss_fn(model, data()).backward()
        optimizer.step()
        found = watch.step()
        assert (found is None) == (step % 3 != 0)
        if found is not None:
            there = packsaddle.certify(model, loss_fn, data().split(8), **options)  # type: ignore[arg-type]
            assert (found.loss, found.grad_norm) == (there.loss, there.grad_norm)
    assert [step for step, _ in watch.certificates] == [3, 6]
    assert seen == [c for _, c in watch.certificates]


def test_counting_goes_on_from_a_checkpoint() -> None:
    first, second = (CertifyEvery(linear(), loss_fn, data().split(8), every=3) for _ in range(2))
    assert first.step() is None
    second.load_state_dict(first.state_dict())
    assert second.step() is None
    assert second.step() is not None


def test_local_updates_are_certified_at_the_anchor() -> None:
    """Between rounds workers' parameters differ, which `certify` refuses; the anchor is one model, and comes back."""

    def work(rank: int) -> tuple[list[float], bool]:
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        how = packsaddle.Compression(packsaddle.TopK(0.25), dense_below=0)
        local = packsaddle.LocalUpdates(optimizer, every=4, compressor=how)
        watch = CertifyEvery(model, loss_fn, data(rank).split(8), every=3, at=local.at_anchor, epsilon=0.5)
        refused = False
        for step in range(6):
            optimizer.zero_grad()
            loss_fn(model, data(rank)).backward()
            optimizer.step()
            before = [p.detach().clone() for p in model.parameters()]
            if step == 0:
                try:
                    packsaddle.certify(model, loss_fn, data(rank).split(8), epsilon=0.5)
                except ValueError as error:
                    refused = "other parameters" in str(error)
            watch.step()
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        return [c.loss for _, c in watch.certificates], refused

    first, second = simulate(work, 2)
    assert first[0] == second[0]
    assert first[1]
    assert len(first[0]) == 2


def test_the_context_is_left_when_certifying_fails() -> None:
    entered: list[str] = []

    @contextmanager
    def there() -> Iterator[None]:
        entered.append("in")
        try:
            yield
        finally:
            entered.append("out")

    watch = CertifyEvery(linear(), loss_fn, [], every=1, at=there)
    with pytest.raises(ValueError, match="batches is empty"):
        watch.step()
    assert entered == ["in", "out"]


def test_an_interval_below_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        CertifyEvery(linear(), loss_fn, [data()], every=0)
