"""Datasets, shards and batches; and the networks on them."""

import pytest
import torch

from lab.tasks import DataConfig, ModelConfig
from lab.tasks.images import Images, load_images
from lab.tasks.models import make_task, mnist_autoencoder
from lab.tasks.sharding import Batches, Calendar, deal, shard
from packsaddle.errors import ConfigError


def test_digits() -> None:
    train, test = (load_images(DataConfig("digits"), None, train=t) for t in (True, False))
    assert len(train) + len(test) == 1797
    assert train.levels.shape[1:] == (1, 8, 8)
    assert set(train.labels.tolist()) == set(range(10))
    pixels = train.pixels(torch.tensor([0, 5]))
    assert (pixels.dtype, float(pixels.min()), float(pixels.max())) == (torch.float32, 0.0, 1.0)
    assert len(load_images(DataConfig("digits", limit=100), None, train=True)) == 100
    with pytest.raises(ConfigError, match="limit must be at most 1498"):
        load_images(DataConfig("digits", limit=5000), None, train=True)


def labelled(labels: torch.Tensor) -> Images:
    return Images(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, 255, 10)


def test_iid_shards_partition_the_data() -> None:
    images = labelled(torch.arange(103) % 10)
    shards = [shard(images, "iid", worker=w, workers=4, seed=1) for w in range(4)]
    assert sorted(torch.cat(shards).tolist()) == list(range(103))
    assert {len(s) for s in shards} == {25, 26}
    assert not torch.equal(shards[0], shard(images, "iid", worker=0, workers=4, seed=2))


def test_class_shards() -> None:
    labels = torch.arange(50) % 10
    images = labelled(labels)
    for w in range(10):
        assert set(labels[shard(images, "class", worker=w, workers=10, seed=0)].tolist()) == {w}
    assert set(labels[shard(images, "class", worker=1, workers=4, seed=0)].tolist()) == {1, 5, 9}
    with pytest.raises(ConfigError, match=r"worker 10 of 11 gets no examples with data\.shard = 'class'"):
        shard(images, "class", worker=10, workers=11, seed=0)


def test_batches_visit_everything_once_a_pass_and_depend_on_the_step_alone() -> None:
    indices = torch.arange(100, 110)
    batches = Batches(indices, 4, worker=0, seed=3)
    order = torch.cat([batches[t] for t in range(10)]).tolist()  # four passes of ten
    for start in range(0, 40, 10):
        assert sorted(order[start : start + 10]) == indices.tolist()
    assert order[:10] != order[10:20]
    fresh = Batches(indices, 4, worker=0, seed=3)
    assert torch.equal(fresh[7], batches[7])
    assert torch.equal(fresh[2], batches[2])
    assert not torch.equal(Batches(indices, 10, worker=1, seed=3)[0], Batches(indices, 10, worker=0, seed=3)[0])
    assert len(Batches(indices, 25, worker=0, seed=3)[1]) == 25


def test_the_papers_autoencoder() -> None:
    """210,369 parameters: 160 + 4,640 + 100,416 and back 100,384 + 4,624 + 145."""
    model = mnist_autoencoder()
    by_layer = [sum(p.numel() for p in layer.parameters()) for layer in model]
    assert [n for n in by_layer if n] == [160, 4640, 100416, 100384, 4624, 145]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 1, 28, 28)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (ModelConfig("mnist-autoencoder"), (1, 28, 28)),
        (ModelConfig("autoencoder", (12, 3)), (1, 8, 8)),
        (ModelConfig("resnet18", width=4), (3, 16, 16)),
    ],
)
def test_tasks(config: ModelConfig, shape: tuple[int, ...]) -> None:
    state = torch.random.get_rng_state()
    task, twin, other = (make_task(config, torch.Size(shape), 10, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    vectors = [torch.nn.utils.parameters_to_vector(t.parameters()) for t in (task, twin, other)]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    loss = task(torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 9]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in task.parameters())


def drawn(batches: Batches, first: int, last: int) -> list[int]:
    return torch.cat([batches[step] for step in range(first, last)]).tolist()


@pytest.mark.parametrize("how", ["iid", "class"])
@pytest.mark.parametrize(("old", "new"), [(4, 3), (2, 5), (3, 1)])
def test_the_rest_of_a_pass_is_dealt_anew(how: str, old: int, new: int) -> None:
    """A pass that `old` workers begin and `new` end has every example once; then all have passes of their own."""
    images = labelled(torch.arange(403) % 10)
    size, seed, stop, n = 4, 7, 9, len(images)
    history, longer = [(0, old)], [(0, old), (stop, new)]
    before = deal(images, how, size, seed=seed, history=history, workers=range(old))
    after = deal(images, how, size, seed=seed, history=longer, workers=range(new))
    passes = [len(shard(images, how, worker=w, workers=old, seed=seed)) for w in range(old)]
    assert all(stop * size < length for length in passes)  # all are in their first pass
    seen = [example for batches in before for example in drawn(batches, 0, stop)]
    rest = []
    for worker, batches in enumerate(after):
        owned = shard(images, how, worker=worker, workers=new, seed=seed).tolist()
        left = len(set(owned) - set(seen))
        following = drawn(batches, stop, stop + 1 + (left + len(owned)) // size)
        rest += following[:left]
        assert sorted(following[left : left + len(owned)]) == sorted(owned)
    assert sorted(seen + rest) == list(range(n))
    again = deal(images, how, size, seed=seed, history=longer, workers=[new - 1])[0]
    assert torch.equal(again[stop + 5], after[-1][stop + 5])


def test_calendar() -> None:
    """Epochs of one number of workers are steps by a constant; a change keeps what was done."""
    always = Calendar.of([(0, 2)], 640, 16, 3.0)
    assert (always.per_epoch, always.steps) == (20, 60)
    assert [always.epoch(step) for step in (0, 7, 60)] == [0.0, 7 / 20, 3.0]
    assert [always.step_at(epoch) for epoch in (0.0, 0.5, 3.0)] == [0, 10, 60]
    changed = Calendar.of([(0, 2), (30, 4)], 640, 16, 3.0)
    assert (changed.per_epoch, changed.steps) == (10, 30 + 15)
    assert changed.epoch(30) == 1.5
    assert changed.epoch(45) == 3.0
    assert [changed.step_at(epoch) for epoch in (1.0, 2.0)] == [30, 35]
    assert Calendar.of([(0, 2), (59, 1)], 640, 16, 3.0).steps == 61
