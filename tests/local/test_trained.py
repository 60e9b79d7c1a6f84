"""Parameters that are frozen while another optimizer steps are trained; frozen ones keep their values."""

import torch
from torch import nn

from packsaddle import (
    Identity,
    LocalUpdates,
    Sign,
    simulate,
)

LR = 0.1


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
