"""The benchmark's 0/1 Adam, compared with its two phases written out for both workers in one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FREEZE, STEPS, LR = 5, 12, 0.1


def gradients(worker: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(worker)
    return [torch.randn(3, 4, generator=rng) for _ in range(STEPS)]


def train() -> tuple[Tensor, float]:
    from benchmarks.zero_one_adam import ZeroOneAdam

    weight = nn.Parameter(torch.ones(3, 4))
    scalers = {"local_scaler": 3, "variance_scaler": 2, "longest": 2}
    optimizer = ZeroOneAdam([weight], LR, FREEZE, betas=(0.9, 0.99), weight_decay=0.1, **scalers)
    for gradient in gradients(torch.distributed.get_rank()):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.sent


class Phases:
    """Algorithm 1 of the paper: x_t' is the point of the last exchange, u the sum of rate times momentum."""

    def __init__(self) -> None:
        self.worker_errors = [torch.zeros(12) for _ in range(2)]
        self.owner_errors = [torch.zeros(6) for _ in range(2)]

    def one_bit(self, both: list[Tensor]) -> Tensor:
        """Workers send signs and their root mean square; the owner of each half sends the same of the mean."""

        def signs(vector: Tensor) -> Tensor:
            return vector.norm() / len(vector) ** 0.5 * (2.0 * (vector >= 0) - 1)

        wanted = [vector + e for vector, e in zip(both, self.worker_errors, strict=True)]
        self.worker_errors = [x - signs(x) for x in wanted]
        mean = (signs(wanted[0]) + signs(wanted[1])) / 2
        owned = [mean[:6] + self.owner_errors[0], mean[6:] + self.owner_errors[1]]
        self.owner_errors = [x - signs(x) for x in owned]
        return torch.cat([signs(x) for x in owned])

    def run(self) -> Tensor:
        pairs = [[g.flatten() for g in pair] for pair in zip(gradients(0), gradients(1), strict=True)]
        x, m, v = torch.ones(12), torch.zeros(12), torch.zeros(12)
        # Steps 1, 2 and 4 update the variance: its interval is 1 for two updates, then 2. Steps 3 and 5 send one bit.
        for step in range(1, FREEZE + 1):
            both = pairs[step - 1]
            if step in (1, 2, 4):
                gradient = (both[0] + both[1]) / 2
                v = 0.99 * v + 0.01 * gradient**2
            else:
                gradient = self.one_bit(both)
            m = 0.9 * m + 0.1 * gradient
            x = x - LR * (m / (v.sqrt() + 1e-8) + 0.1 * x)

        # Without the errors of gradients, steps 6, 7 and 8 exchange each, then steps 10 and 12.
        self.worker_errors, self.owner_errors = [torch.zeros(12) for _ in range(2)], [torch.zeros(6) for _ in range(2)]
        scale = v.sqrt() + 1e-8
        xs, ms, rates = [x, x], [m, m], 0.0
        for step in range(FREEZE + 1, STEPS + 1):
            ms = [0.9 * m + 0.1 * g for m, g in zip(ms, pairs[step - 1], strict=True)]
            xs = [y - LR * (m / scale + 0.1 * y) for y, m in zip(xs, ms, strict=True)]
            rates += LR
            if step in (6, 7, 8, 10, 12):
                mean = self.one_bit([(y - x) * scale for y in xs])
                x = x + mean / scale
                xs, ms, rates = [x, x], [-mean / rates, -mean / rates], 0.0
        return x.view(3, 4)


@pytest.mark.process
def test_zero_one_adam_is_its_two_phases(gloo: Callable[..., list[Any]]) -> None:
    for weight, sent in gloo(train, 2):
        torch.testing.assert_close(weight, Phases().run())
        assert sent == 3 * 4 * 12 + (2 + 5) * 12 / 8
