"""Parameters that are frozen while another optimizer steps are trained; frozen ones keep their values."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from local_updates import gradient
from torch import Tensor, nn

from packsaddle import (
    Compression,
    Compressor,
    Identity,
    LocalUpdates,
    OuterSGD,
    Overlap,
    Rounded,
    Sign,
    TopK,
    Workers,
    simulate,
)
from packsaddle.comm.group import resolve
from packsaddle.local.options import Outer

LR = 0.1


def trained(freeze: str, compressor: Compressor, **options: object) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Train two parameters with an SGD each on three workers: return the parameters after a flush, the anchor minus
    error() before it, and the point that plain averages of gradients lead to.

    `freeze`: "never", or "while the other steps", as GANs do with the first parameter.
    """

    def body(worker: int) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (nn.Parameter(torch.zeros(30, 40, dtype=torch.float64)) for _ in range(2))
        first, second = torch.optim.SGD([a], lr=LR), torch.optim.SGD([b], lr=LR)
        local = LocalUpdates([first, second], compressor, every=4, **options)  # type: ignore[arg-type]
        ends = [torch.zeros_like(a), torch.zeros_like(b)]
        for n in range(1, 25):
            a.requires_grad_(True)
            for p, end, name in zip((a, b), ends, ("a", "b"), strict=True):
                p.grad = gradient(name, torch.zeros_like(p), worker, n)
                end.sub_(p.grad, alpha=LR)
            first.step()
            a.requires_grad_(freeze == "never")
            second.step()
        common = torch.cat([each.flatten() for each in local.anchor().values()]) - local.error()
        assert local.flush(Identity())
        xs = torch.cat([a.detach().flatten(), b.detach().flatten()])
        return xs, common, torch.cat([end.flatten() for end in ends])

    return simulate(body, 3)


@pytest.mark.parametrize(
    "options", [{}, {"overlap": 2}, {"keep_unsent": False}], ids=["by default", "delayed", "at the anchor"]
)
@pytest.mark.parametrize("compressor", [Sign(per_tensor=True), TopK(0.1), Rounded()], ids=lambda c: type(c).__name__)
def test_frozen_while_another_optimizer_steps(compressor: Compressor, options: dict[str, object]) -> None:
    """As if never frozen, bit for bit; and all workers have the mean."""
    found = trained("while the other steps", compressor, **options)
    for ours, plain in zip(found, trained("never", compressor, **options), strict=True):
        for tensor, other in zip(ours, plain, strict=True):
            assert torch.equal(tensor, other)
    mean = torch.stack([end for *_, end in found]).mean(0)
    for xs, common, _ in found:
        torch.testing.assert_close(xs, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(common, mean, rtol=1e-9, atol=1e-9)


def test_a_frozen_parameter_keeps_its_value() -> None:
    """From the exchange on after which all of its optimizer's steps were without it; a flush moves what stepped."""

    def body(worker: int) -> None:
        a, b = nn.Parameter(torch.zeros(40, 40)), nn.Parameter(torch.zeros(40, 40))
        optimizer = torch.optim.SGD([a, b], lr=LR)
        local = LocalUpdates(optimizer, Sign(per_tensor=True), every=2)

        def train(steps: int) -> None:
            for _ in range(steps):
                a.grad = torch.full_like(a, worker + 1.0) if a.requires_grad else None
                b.grad = torch.full_like(b, worker + 1.0)
                optimizer.step()

        train(5)
        a.requires_grad_(False)
        train(1)
        assert local.flush(Identity())  # the fifth step of a is exchanged
        torch.testing.assert_close(a.detach(), torch.full_like(a, -LR * 5 * 1.5))
        before = a.detach().clone()
        train(4)
        assert local.flush()
        assert torch.equal(a, before)
        assert torch.equal(a, local.anchor()["parameter 0"])
        torch.testing.assert_close(b.detach(), torch.full_like(b, -LR * 10 * 1.5))

    simulate(body, 2)


WAYS: dict[str, dict[str, Any]] = {
    "by default": {},
    "at the anchor": {"keep_unsent": False},
    "delayed": {"overlap": 2},
    "delayed, at the anchor": {"overlap": 2, "keep_unsent": False},
    "fragments": {"overlap": Overlap(1, fragments=2)},
    "direct": {"compressor": Compression(TopK(0.1), exchange="direct"), "keep_unsent": False},
    "two-way": {"compressor": Compression(Sign(), exchange="two-way"), "keep_unsent": False},
    "two-way, delayed": {"compressor": Compression(TopK(0.05), exchange="two-way"), "overlap": 3},
    "clipped": {"compressor": Sign(), "workers": Workers(clip=1)},
}


def unfrozen(way: str, seed: int, is_same: bool) -> list[tuple[float, float, float]]:
    """Freeze and unfreeze two of three parameters at random, at the same steps on all workers if `is_same`. Return by
    worker the largest distance of the anchor less error() from plain averages of the gradients, the largest move of a
    parameter that was frozen in the last exchange, and the distance of the parameters from the averages at the end."""

    def body(worker: int) -> tuple[float, float, float]:
        rng = random.Random(seed if is_same else seed + 100 * worker)
        ps = [nn.Parameter(torch.zeros(30, 40, dtype=torch.float64)) for _ in range(3)]
        optimizer = torch.optim.SGD(ps, lr=LR)
        local = LocalUpdates(optimizer, **{"compressor": Sign(), "every": 4, **WAYS[way]})
        expected = [torch.zeros_like(p) for p in ps]
        far = moved = 0.0
        frozen_since = [0, 0, 0]
        for n in range(1, 29):
            for i, p in enumerate(ps):
                if i and rng.random() < 0.2:
                    p.requires_grad_(not p.requires_grad)
                    frozen_since[i] = n
                p.grad = gradient(f"p{i}", torch.zeros_like(p), worker, n) if p.requires_grad else None
                step = torch.zeros_like(p) if p.grad is None else p.grad.clone()
                resolve(None).all_reduce(step)
                expected[i].sub_(step, alpha=LR / 3)
            before = [p.detach().clone() for p in ps]
            optimizer.step()
            for p, old, since in zip(ps, before, frozen_since, strict=True):
                if not p.requires_grad and n > since + 8:  # an exchange with its last steps has ended
                    moved = max(moved, float((p - old).abs().max()))
            if n % 2:
                common = torch.cat([a.flatten() for a in local.anchor().values()]) - local.error()
                far = max(far, float((common - torch.cat([e.flatten() for e in expected])).abs().max()))
        # Train everything up to a round, since a flush does not send what was frozen.
        for _ in range(8):
            for p in ps:
                p.requires_grad_(True)
                p.grad = torch.zeros_like(p)
            optimizer.step()
        while not local.flush(Identity()):
            pass
        local.flush(Identity())  # the excess of clipped updates
        end = max(float((p.detach() - e).abs().max()) for p, e in zip(ps, expected, strict=True))
        return far, moved, end

    return simulate(body, 3)


@pytest.mark.parametrize("is_same", [True, False], ids=["on all workers", "on each worker"])
@pytest.mark.parametrize("way", WAYS)
def test_no_update_is_lost_by_freezing(way: str, is_same: bool) -> None:
    """Also in the steps of an exchange that runs, and on some workers only."""
    for seed in range(2):
        for far, moved, end in unfrozen(way, seed, is_same):
            assert far < 1e-12
            assert moved == 0
            assert end < 1e-12 or way == "clipped"


OUTERS: dict[str, Outer | None] = {
    "none": None,
    "momentum": OuterSGD(),
    "weight decay": lambda anchors: torch.optim.AdamW(anchors, lr=0.1, weight_decay=0.5),
}


@pytest.mark.parametrize("keep_unsent", [True, False])
@pytest.mark.parametrize("compressor", [Identity(), Sign(), Rounded()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("outer", OUTERS)
def test_the_anchor_of_a_frozen_parameter_stays(outer: str, compressor: Compressor, keep_unsent: bool) -> None:
    """Against an outer momentum or weight decay, and zeros that Sign() does not decode to zeros."""

    def body(worker: int) -> None:
        a, b = nn.Parameter(torch.ones(40, 40)), nn.Parameter(torch.ones(40, 40))
        optimizer = torch.optim.SGD([a, b], lr=LR)
        spec = Compression(compressor, compare_every=1)
        local = LocalUpdates(optimizer, spec, every=2, outer=OUTERS[outer], keep_unsent=keep_unsent)
        for n in range(1, 25):
            for name, p in zip("ab", (a, b), strict=True):
                p.grad = gradient(name, torch.zeros_like(p), worker, n) if p.requires_grad else None
            optimizer.step()
            if n == 7:
                local.flush(Identity())
                a.requires_grad_(False)
                before = a.detach().clone()
        anchor = local.anchor()
        assert torch.equal(a, before)
        assert torch.equal(anchor["parameter 0"], before)
        assert not torch.equal(anchor["parameter 1"], before)

    simulate(body, 2)


@pytest.mark.parametrize("compressor", [Sign(), TopK(0.1)], ids=lambda c: type(c).__name__)
def test_workers_that_freeze_at_different_steps_have_one_anchor(compressor: Compressor) -> None:
    """Also if they are resumed during the exchange in which one has frozen a parameter and the other has not."""

    def body(worker: int, stop: int) -> list[Tensor]:
        ps = [nn.Parameter(torch.ones(40, 40)) for _ in range(2)]

        def made() -> tuple[torch.optim.Optimizer, LocalUpdates]:
            optimizer = torch.optim.SGD(ps, lr=LR)
            spec = Compression(compressor, compare_every=1)  # raises DriftError
            return optimizer, LocalUpdates(optimizer, spec, every=4, overlap=2, outer=OuterSGD())

        optimizer, local = made()
        for n in range(1, 25):
            if n == stop:
                state, xs = local.state_dict(), [p.detach().clone() for p in ps]
                ps = [nn.Parameter(x.clone()) for x in xs]
                optimizer, local = made()
                local.load_state_dict(state)
                for p, x in zip(ps, xs, strict=True):
                    p.data.copy_(x)
            ps[0].requires_grad_(n < 7 + 4 * worker)
            for name, p in zip("ab", ps, strict=True):
                p.grad = gradient(name, torch.zeros_like(p), worker, n) if p.requires_grad else None
            optimizer.step()
        return list(local.anchor().values())

    straight = simulate(partial(body, stop=0), 2)
    for found in (straight, simulate(partial(body, stop=14), 2)):
        for worker in found:
            for anchor, expected in zip(worker, straight[0], strict=True):
                assert torch.equal(anchor, expected)


@pytest.mark.parametrize("at", [5, 7, 9])
def test_frozen_parameters_after_a_resume(at: int) -> None:
    """a is frozen from step 7 on, within a round of four steps: the next exchange has its update, also if resumed."""

    def body(worker: int) -> list[Tensor]:
        ends = []
        for stops in (False, True):
            ps, local, optimizer = None, None, None
            for n in range(1, 14):
                if n == 1 or (stops and n == at + 1):
                    state = None if local is None else local.state_dict()
                    xs = [torch.zeros(40, 40) if ps is None else p.detach().clone() for p in ps or (0, 0)]
                    ps = [nn.Parameter(x.clone()) for x in xs]
                    optimizer = torch.optim.SGD(ps, lr=LR)
                    local = LocalUpdates(optimizer, Sign(per_tensor=True), every=4, overlap=2)
                    if state is not None:
                        local.load_state_dict(state)
                        for p, x in zip(ps, xs, strict=True):  # the worker's own, where it started from rank 0's
                            p.data.copy_(x)
                assert ps is not None
                assert optimizer is not None
                ps[0].requires_grad_(n < 7)
                for name, p in zip("ab", ps, strict=True):
                    p.grad = gradient(name, torch.zeros_like(p), worker, n) if p.requires_grad else None
                optimizer.step()
            assert ps is not None
            assert local is not None
            local.flush(Identity())
            ends += [*(p.detach().clone() for p in ps), *local.anchor().values()]
        return ends

    for ends in simulate(body, 2):
        for straight, resumed in zip(ends[:4], ends[4:], strict=True):
            assert torch.equal(straight, resumed)
