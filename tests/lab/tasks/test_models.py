"""The transformer over characters: causal, and differentiable twice."""

import math

import pytest
import torch

from lab.tasks import DataConfig, ModelConfig
from lab.tasks.models import Task, make_task
from lab.tasks.text import Text, load_text

CPU = torch.device("cpu")


def load(context: int) -> Text:
    return load_text(DataConfig("text", context=context), None, train=True)


def tiny_task(data: Text) -> Task:
    return make_task(ModelConfig("char-transformer", width=8, depth=2, heads=2), data.shape, data.classes, 0)


def test_a_later_character_does_not_change_earlier_logits() -> None:
    data = load(16)
    network = tiny_task(data).network
    windows, _ = data.batch(torch.arange(4), CPU)
    before = network(windows)
    for place in (0, 9, 15):
        changed = windows.clone()
        changed[:, place] = (changed[:, place] + 1) % data.classes
        moved = (network(changed) != before).any(2).any(0)
        assert not moved[:place].any()
        assert moved[place:].all()
    # A shorter text's logits are the longer one's first, but for the order of sums in single precision.
    assert torch.allclose(network(windows[:, :5]), before[:, :5], atol=1e-5)


@torch.no_grad()
def test_the_task() -> None:
    """It starts near even odds, and counts loss and hits per character."""
    data = load(16)
    task = tiny_task(data)
    batch = data.batch(torch.arange(50), CPU)
    assert float(task(*batch)) == pytest.approx(math.log(data.classes), abs=0.1)
    logits, targets = task.network(batch[0]), batch[1]
    chances = [logits[i, j].softmax(0)[targets[i, j]].log() for i in range(50) for j in range(16)]
    assert float(task(*batch)) == pytest.approx(-float(sum(chances)) / 800, rel=1e-5)
    hits = sum(int(logits[i, j].argmax()) == int(targets[i, j]) for i in range(50) for j in range(16))
    assert float(task.correct(*batch)) == pytest.approx(hits / 16)
    assert len({p.data_ptr() for p in task.parameters()}) == len(list(task.parameters()))
