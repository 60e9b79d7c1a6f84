"""Parameters keep their values, shapes and memory format in the flat vector, and refusals name the parameter."""

import pytest
import torch
from torch import nn

from packsaddle.optim.layout import FlatParameters


def flatten(module: nn.Module, dense_below: int = 0) -> FlatParameters:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return FlatParameters([{"params": list(parameters), "param_names": list(names)}], dense_below)


def test_values_survive_and_parameters_are_views() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    before = module(images)
    vector = nn.utils.parameters_to_vector(module.parameters())
    flat = flatten(module, dense_below=100)
    assert torch.equal(module(images), before)
    assert torch.equal(flat.in_order(flat.x), vector)
    flat.x.zero_()
    assert all(not p.any() for p in module.parameters())


def test_small_tensors_and_vectors_come_last() -> None:
    module = nn.Sequential(nn.Linear(30, 10), nn.LayerNorm(10), nn.Linear(10, 2))  # 300, 10; 10, 10; 20, 2
    flat = flatten(module, dense_below=100)
    assert (flat.compressed_d, flat.d) == (300, 352)
    assert torch.equal(flat.x[:300].view(10, 30), module[0].weight)
    assert flatten(nn.Linear(30, 10)).compressed_d == 310  # dense_below=0 compresses vectors too


def test_channels_last_is_kept() -> None:
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    weight = conv.weight.clone()
    flat = flatten(conv)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv.weight, weight)
    assert torch.equal(flat.in_order(flat.x), torch.cat([weight.reshape(-1), conv.bias]))


def test_parameters_with_gaps_become_contiguous() -> None:
    p = nn.Parameter(torch.arange(12.0).reshape(3, 4)[:, ::2])
    FlatParameters([{"params": [p]}], 0)
    assert p.is_contiguous()
    assert p.tolist() == [[0, 2], [4, 6], [8, 10]]


def test_runs_follow_groups() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(n, 10)), nn.Parameter(torch.ones(n))]} for n in (20, 3)]
    flat = FlatParameters(groups, dense_below=100)  # order: 200 | 20, 30, 3
    assert [(r.group, r.start, r.stop) for r in flat.runs] == [(0, 0, 220), (1, 220, 253)]


def test_refusals() -> None:
    def check(*parameters: torch.Tensor) -> None:
        FlatParameters([{"params": list(parameters)}], 0)

    with pytest.raises(ValueError, match=r"floating point, but parameter 1 is torch\.int64"):
        check(torch.ones(2), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one dtype and device, but parameter 0 is torch\.float32"):
        check(torch.ones(2), torch.ones(2, dtype=torch.float64))
    shared = torch.ones(4)
    with pytest.raises(ValueError, match="must not share memory, but parameter 0 and parameter 1 do"):
        check(shared, shared.view(2, 2))


def test_a_moved_parameter_is_noticed() -> None:
    module = nn.Linear(4, 3)
    flat = flatten(module)
    flat.check_attached()
    module.double()
    with pytest.raises(RuntimeError, match=r"weight was moved or replaced.*make the optimizer last"):
        flat.check_attached()
