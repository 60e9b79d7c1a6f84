"""The inner optimizers of the race."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lab.race.inner import ProductsInFloat32, muon

SHAPES = ((24, 16), (16, 16), (16, 40))


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_products_in_float32_are_rounded_once() -> None:
    a, b, c = (drawn(shape, i).bfloat16() for i, shape in enumerate([(8, 300), (300, 8), (8, 8)]))
    exact, sum_of_two = a.double() @ b.double(), 0.5 * c.double() + 2 * (a.double() @ b.double())
    with ProductsInFloat32():
        pairs = [(a @ b, exact), (torch.matmul(a, b), exact), (torch.addmm(c, a, b, beta=0.5, alpha=2), sum_of_two)]
    for found, wanted in pairs:
        assert found.dtype == torch.bfloat16
        # A number may lie so close to the middle of two bfloat16 numbers that float32's rounding decides.
        assert (found == wanted.bfloat16()).double().mean() > 0.95
        torch.testing.assert_close(found.double(), wanted, rtol=2.0**-8, atol=1e-5)


def test_other_products_stay_as_they_are() -> None:
    a, b = drawn((8, 300), 0).double(), drawn((300, 8), 1).double()
    exact = a @ b
    with ProductsInFloat32():
        assert torch.equal(a @ b, exact)


def test_muon_steps_as_torchs_on_a_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    starts = [drawn(shape, i) for i, shape in enumerate(SHAPES)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    pair: list[torch.optim.Optimizer] = [
        muon(ours, 0.02),
        torch.optim.Muon(theirs, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    counted: list[type] = []
    pair[0].register_step_post_hook(lambda *step: counted.append(type(step[0])))
    for t in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = drawn(p.shape, 100 + t)
            q.grad = p.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert counted == [torch.optim.Muon] * 4
    for p, q, start in zip(ours, theirs, starts, strict=True):
        apart = torch.linalg.vector_norm(p - q) / torch.linalg.vector_norm(q - start)
        assert apart < 0.01  # eight bits
        assert not torch.equal(p, start)
