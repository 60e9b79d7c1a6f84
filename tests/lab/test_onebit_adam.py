"""The benchmark's 1-bit Adam, compared with its two phases written out for all workers in one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FREEZE, STEPS, LR = 3, 8, 0.1


def gradients(worker: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(worker)
    return [torch.randn(3, 4, generator=rng) for _ in range(STEPS)]


def train() -> tuple[Tensor, float]:
    from benchmarks.onebit_adam import OneBitAdam

    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = OneBitAdam([weight], LR, FREEZE, betas=(0.9, 0.99), weight_decay=0.1)
    for gradient in gradients(torch.distributed.get_rank()):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.sent


def by_phases() -> Tensor:
    """Workers send signs of m and their root mean square; the owner of each half sends the same of the mean."""
    w, m, v = torch.ones(12), torch.zeros(12), torch.zeros(12)
    worker_errors, owner_errors = [torch.zeros(12) for _ in range(2)], [torch.zeros(6) for _ in range(2)]

    def signs(vector: Tensor) -> Tensor:
        return vector.norm() / len(vector) ** 0.5 * (2.0 * (vector >= 0) - 1)

    for step, pair in enumerate(zip(gradients(0), gradients(1), strict=True)):
        both = [g.flatten() for g in pair]
        if step < FREEZE:
            mean = (both[0] + both[1]) / 2
            m, v = 0.9 * m + 0.1 * mean, 0.99 * v + 0.01 * mean**2
        else:
            wanted = [0.9 * m + 0.1 * g + e for g, e in zip(both, worker_errors, strict=True)]
            worker_errors = [x - signs(x) for x in wanted]
            mean = (signs(wanted[0]) + signs(wanted[1])) / 2
            owned = [mean[:6] + owner_errors[0], mean[6:] + owner_errors[1]]
            owner_errors = [x - signs(x) for x in owned]
            m = torch.cat([signs(x) for x in owned])
        w = w - LR * (m / (v.sqrt() + 1e-8) + 0.1 * w)
    return w.view(3, 4)


@pytest.mark.process
def test_one_bit_adam_is_its_two_phases(gloo: Callable[..., list[Any]]) -> None:
    for weight, sent in gloo(train, 2):
        torch.testing.assert_close(weight, by_phases())
        assert sent == FREEZE * 4 * 12 + (STEPS - FREEZE) * 12 / 8
