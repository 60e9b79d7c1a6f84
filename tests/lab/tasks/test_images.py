"""Datasets, shards and batches; and the networks on them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from lab.tasks.images import Images, load_images
from lab.tasks.models import autoencoder, mnist_autoencoder, resnet, seeded
from lab.tasks.sharding import Batches, shard
from packsaddle.errors import ConfigError


def test_digits() -> None:
    train, test = (load_images("digits", train=t) for t in (True, False))
    assert len(train) + len(test) == 1797
    assert train.levels.shape[1:] == (1, 8, 8)
    assert set(train.labels.tolist()) == set(range(10))
    pixels = train.pixels(torch.tensor([0, 5]))
    assert (pixels.dtype, float(pixels.min()), float(pixels.max())) == (torch.float32, 0.0, 1.0)
    assert len(load_images("digits", train=True, limit=100)) == 100
    with pytest.raises(ConfigError, match="limit must be at most 1498"):
        load_images("digits", train=True, limit=5000)


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
    with pytest.raises(ConfigError, match=r"worker 10 of 11 gets no examples with shards of kind 'class'"):
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
    ("make", "shape"),
    [
        (mnist_autoencoder, (1, 28, 28)),
        (partial(autoencoder, torch.Size((1, 8, 8)), (12, 3)), (1, 8, 8)),
        (partial(resnet, 18, 10, width=4), (3, 16, 16)),
    ],
)
def test_weights_depend_on_the_seed_alone(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    state = torch.random.get_rng_state()
    model, twin, other = (seeded(make, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    vectors = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, twin, other)]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    model(torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
