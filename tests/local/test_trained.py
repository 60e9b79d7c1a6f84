"""Parameters that are frozen while another optimizer steps are trained, and lose nothing when they are frozen."""

import pytest
import torch
from local_updates import gradient
from torch import Tensor, nn

from packsaddle import Compression, Compressor, Identity, LocalUpdates, Rounded, Sign, TopK, simulate

LR = 0.1


def trained(freeze: str, compressor: Compressor, **options: object) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Train two parameters with an SGD each on three workers: return the parameters after a flush, the anchor minus
    error() before it, and the point that plain averages of gradients lead to.

    `freeze`: "never"; "while the other steps", as GANs do with the first parameter; or "for a while", steps 9 to 16.
    """

    def body(worker: int) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (nn.Parameter(torch.zeros(30, 40, dtype=torch.float64)) for _ in range(2))
        first, second = torch.optim.SGD([a], lr=LR), torch.optim.SGD([b], lr=LR)
        local = LocalUpdates([first, second], compressor, every=4, **options)  # type: ignore[arg-type]
        ends = [torch.zeros_like(a), torch.zeros_like(b)]
        for n in range(1, 25):
            rest = freeze == "for a while" and 9 <= n <= 16
            a.requires_grad_(not rest)
            for p, end, name in zip((a, b), ends, ("a", "b"), strict=True):
                p.grad = None if rest and p is a else gradient(name, torch.zeros_like(p), worker, n)
                if p.grad is not None:
                    end.sub_(p.grad, alpha=LR)
            first.step()
            a.requires_grad_(not rest and freeze != "while the other steps")
            second.step()
        common = torch.cat([each.flatten() for each in local.anchor().values()]) - local.error()
        if freeze != "for a while":
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


@pytest.mark.parametrize("keep_unsent", [True, False])
@pytest.mark.parametrize("compressor", [Sign(per_tensor=True), TopK(0.1)], ids=lambda c: type(c).__name__)
def test_what_was_not_sent_stays_while_frozen(compressor: Compressor, keep_unsent: bool) -> None:
    """Gathered: with owners some of it is in their residuals, which are exchanged."""
    found = trained("for a while", Compression(compressor, exchange="direct"), keep_unsent=keep_unsent)  # type: ignore[arg-type]
    mean = torch.stack([end for *_, end in found]).mean(0)
    for _, common, _ in found:
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
