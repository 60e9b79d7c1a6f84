"""The transformer over characters: causal, near even odds at the start, and without shared parameters."""

import math

import pytest
import torch
from torch import nn

from lab.tasks.models import CharTransformer, seeded
from lab.tasks.text import load_text

TEXT = load_text(train=True, context=16)


def network() -> nn.Module:
    return seeded(lambda: CharTransformer(TEXT.classes, 16, width=8, depth=2, heads=2), 0)


def test_a_later_character_does_not_change_earlier_logits() -> None:
    model = network()
    windows, _ = TEXT.batch(torch.arange(4))
    before = model(windows)
    for place in (0, 9, 15):
        changed = windows.clone()
        changed[:, place] = (changed[:, place] + 1) % TEXT.classes
        moved = (model(changed) != before).any(2).any(0)
        assert not moved[:place].any()
        assert moved[place:].all()
    # A shorter text's logits are the longer one's first, but for the order of sums in single precision.
    assert torch.allclose(model(windows[:, :5]), before[:, :5], atol=1e-5)


def test_the_start() -> None:
    model = network()
    windows, following = TEXT.batch(torch.arange(50))
    loss = nn.functional.cross_entropy(model(windows).flatten(0, 1), following.flatten())
    assert loss.item() == pytest.approx(math.log(TEXT.classes), abs=0.1)
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
