"""The benchmark's 1-bit Adam and 0/1 Adam, compared with their two phases written out for both workers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

STEPS, LR = 12, 0.1
FREEZE = 5  # steps of the first phase


def gradients(worker: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(worker)
    return [torch.randn(3, 4, generator=rng) for _ in range(STEPS)]


def pairs() -> list[list[Tensor]]:
    """Return both workers' gradients of each step, float[12]."""
    return [[g.flatten() for g in pair] for pair in zip(gradients(0), gradients(1), strict=True)]


def train(name: str) -> tuple[Tensor, float]:
    from lab.bench.onebit_adam import OneBitAdam
    from lab.bench.zero_one_adam import ZeroOneAdam

    weight, options = nn.Parameter(torch.ones(3, 4)), {"betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = (
        OneBitAdam([weight], LR, FREEZE, **options)
        if name == "1-bit"
        else ZeroOneAdam([weight], LR, FREEZE, local_scaler=3, variance_scaler=2, longest=2, **options)
    )
    for gradient in gradients(torch.distributed.get_rank()):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.sent


class OneBitMean:
    """Workers send signs and their root mean square; the owner of each half sends the same of the mean."""

    def __init__(self) -> None:
        self.worker_errors = [torch.zeros(12) for _ in range(2)]
        self.owner_errors = [torch.zeros(6) for _ in range(2)]

    def __call__(self, both: list[Tensor]) -> Tensor:
        def signs(vector: Tensor) -> Tensor:
            return vector.norm() / len(vector) ** 0.5 * (2.0 * (vector >= 0) - 1)

        wanted = [vector + e for vector, e in zip(both, self.worker_errors, strict=True)]
        self.worker_errors = [x - signs(x) for x in wanted]
        mean = (signs(wanted[0]) + signs(wanted[1])) / 2
        owned = [mean[:6] + self.owner_errors[0], mean[6:] + self.owner_errors[1]]
        self.owner_errors = [x - signs(x) for x in owned]
        return torch.cat([signs(x) for x in owned])


def one_bit_adam() -> Tensor:
    w, m, v, one_bit = torch.ones(12), torch.zeros(12), torch.zeros(12), OneBitMean()
    for step, both in enumerate(pairs()):
        if step < FREEZE:
            mean = (both[0] + both[1]) / 2
            m, v = 0.9 * m + 0.1 * mean, 0.99 * v + 0.01 * mean**2
        else:
            m = one_bit([0.9 * m + 0.1 * g for g in both])
        w = w - LR * (m / (v.sqrt() + 1e-8) + 0.1 * w)
    return w.view(3, 4)


def zero_one_adam() -> Tensor:
    """Algorithm 1 of the paper: x is the point of the last exchange, xs are those of the workers."""
    x, m, v, one_bit = torch.ones(12), torch.zeros(12), torch.zeros(12), OneBitMean()
    # Steps 1, 2 and 4 update the variance: its interval is 1 for two updates, then 2. Steps 3 and 5 send one bit.
    for step, both in enumerate(pairs()[:FREEZE], 1):
        if step in (1, 2, 4):
            gradient = (both[0] + both[1]) / 2
            v = 0.99 * v + 0.01 * gradient**2
        else:
            gradient = one_bit(both)
        m = 0.9 * m + 0.1 * gradient
        x = x - LR * (m / (v.sqrt() + 1e-8) + 0.1 * x)

    # Without the errors of gradients, steps 6, 7 and 8 exchange each, then steps 10 and 12.
    one_bit, scale = OneBitMean(), v.sqrt() + 1e-8
    xs, ms, rates = [x, x], [m, m], 0.0
    for step, both in enumerate(pairs()[FREEZE:], FREEZE + 1):
        ms = [0.9 * m + 0.1 * g for m, g in zip(ms, both, strict=True)]
        xs = [y - LR * (m / scale + 0.1 * y) for y, m in zip(xs, ms, strict=True)]
        rates += LR
        if step in (6, 7, 8, 10, 12):
            mean = one_bit([(y - x) * scale for y in xs])
            x = x + mean / scale
            xs, ms, rates = [x, x], [-mean / rates, -mean / rates], 0.0
    return x.view(3, 4)


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "twin", "exact", "one_bit"), [("1-bit", one_bit_adam, FREEZE, 7), ("0/1", zero_one_adam, 3, 2 + 5)]
)
def test_it_is_its_two_phases(
    gloo: Callable[..., list[Any]], name: str, twin: Callable[[], Tensor], exact: int, one_bit: int
) -> None:
    """`exact` exchanges send 12 float32 numbers, and `one_bit` exchanges 12 bits."""
    for weight, sent in gloo(train, 2, name):
        torch.testing.assert_close(weight, twin())
        assert sent == exact * 4 * 12 + one_bit * 12 / 8
