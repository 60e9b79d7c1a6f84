"""The transformer over characters: causal, differentiable twice, and the same on processes as simulated."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lab.runs.config import DataConfig, ModelConfig
from lab.runs.tasks.models import Task, make_task, task_loss
from lab.runs.tasks.sharding import Batches, shard
from lab.runs.tasks.text import Text, load_text
from packsaddle import CompressedSGD, Compression, Compressor, Identity, RandomK, TopK, simulate
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import Solo, resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.curvature.hessian import Curvature

CPU = torch.device("cpu")
COMPRESSORS: dict[str, Compressor] = {"Identity": Identity(), "RandomK": RandomK(0.1), "TopK": TopK(0.1)}


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


def test_derivatives_against_finite_differences() -> None:
    """The first and the second, in float64: central differences err by about h^2 = 1e-8 of third derivatives."""
    data = load(12)
    task = tiny_task(data).double()
    curvature = Curvature(task, task_loss, [data.batch(torch.arange(6), CPU)], Communicator(Solo(), Ledger()))
    v = torch.randn(curvature.d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v, h = v / v.norm(), 1e-4
    gradients = []
    for step in (h, -h):
        with curvature.moved(v, step):
            gradients.append(curvature.gradient()[0])
    slope = (curvature.loss_at(v, h) - curvature.loss_at(v, -h)) / (2 * h)
    assert float(curvature.gradient()[0] @ v) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    product = curvature.hessian_vector(v)
    assert product.norm() > 0.01
    assert torch.allclose(product, (gradients[0] - gradients[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def text_run(compressor: Compressor) -> dict[str, Any]:
    """Some steps of the present group, each worker on its own stretch of the text."""
    group, data = resolve(None), load(16)
    task = tiny_task(data)
    mine = shard(data, "class", worker=group.rank, workers=group.size, seed=0)
    batches = Batches(mine, 4, worker=group.rank, seed=0)
    opt = CompressedSGD(task.named_parameters(), 0.3, Compression(compressor, dense_below=0))
    losses = []
    for step in range(12):
        opt.zero_grad()
        loss = task(*data.batch(batches[step], CPU))
        loss.backward()
        losses.append(loss.item())
        opt.step()
    return {
        "x": nn.utils.parameters_to_vector(task.parameters()).detach(),
        "losses": losses,
        "bytes": {name: (b.payload, b.sent, b.received) for name, b in opt.ledger.by_purpose.items()},
    }


def text_runs() -> dict[str, dict[str, Any]]:
    return {name: text_run(compressor) for name, compressor in COMPRESSORS.items()}


def test_processes_equal_the_simulation(gloo: Callable[..., list[Any]]) -> None:
    processes, simulated = gloo(text_runs, 2), simulate(lambda rank: text_runs(), 2)
    for name in COMPRESSORS:
        real, serial = [p[name] for p in processes], [s[name] for s in simulated]
        for a, b in zip(real, serial, strict=True):
            assert torch.equal(a["x"], real[0]["x"])
            # Single precision, twelve steps.
            assert torch.allclose(a["x"], b["x"], rtol=1e-4, atol=1e-5), name
            assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)
            assert a["bytes"] == b["bytes"]
        assert real[0]["losses"] != real[1]["losses"]  # of different stretches
        assert sum(real[0]["losses"][-3:]) < sum(real[0]["losses"][:3])
