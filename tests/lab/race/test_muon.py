"""The inner optimizers of the race."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lab.race.gpt import muon

SHAPES = ((24, 16), (16, 16), (16, 40))


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
