"""Parameters keep their values, shapes and memory format in the flat vector, and refusals name the parameter."""

import pytest
import torch
from torch import nn

from packsaddle import CompressedSGD, LocalUpdates, LowRank, TopK
from packsaddle.feedback.slices import FlatParameters, Place, Slice, check_no_shared_memory


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


def test_low_rank_matrices_are_as_in_memory() -> None:
    """Of a transposed matrix the transpose, which is compressed as well: rank 1 keeps an update of rank 1."""
    contiguous = torch.outer(torch.arange(1.0, 41), torch.arange(1.0, 61))
    for update in (contiguous, contiguous.t().contiguous().t()):
        x = torch.nn.Parameter(torch.empty_like(update).copy_(update))
        local = LocalUpdates(torch.optim.SGD([x], lr=1.0), LowRank(1), every=1)
        for _ in range(3):  # each is a power iteration
            x.grad = update.clone()
            local.optimizers[0].step()
        assert x.stride() == update.stride()
        assert float(local.pending().norm()) < 1e-3 * float(update.norm())


@pytest.mark.parametrize(
    ("parameter", "shape"),
    [
        (torch.ones(4, 6), (4, 6)),
        (torch.ones(6, 4).t(), (6, 4)),
        (torch.ones(1, 64, 32).permute(1, 2, 0), (64, 32, 1)),  # the stride of the 1 is the largest
        (torch.ones(8, 4, 3, 3).contiguous(memory_format=torch.channels_last), (8, 3, 3, 4)),
        (torch.ones(8, 4, 1, 1).contiguous(memory_format=torch.channels_last), (8, 4, 1, 1)),
    ],
)
def test_shapes_are_in_the_order_of_memory(parameter: torch.Tensor, shape: tuple[int, ...]) -> None:
    one = Slice([Place("x", torch.nn.Parameter(parameter), dense=False, start=0)], torch.device("cpu"))
    assert [tuple(s) for s in one.shapes] == [shape]


def test_parameters_with_gaps_become_contiguous() -> None:
    p = nn.Parameter(torch.arange(12.0).reshape(3, 4)[:, ::2])
    FlatParameters([{"params": [p]}], 0)
    assert p.is_contiguous()
    assert p.tolist() == [[0, 2], [4, 6], [8, 10]]


def test_ranges_follow_groups() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(n, 10)), nn.Parameter(torch.ones(n))]} for n in (20, 3)]
    flat = FlatParameters(groups, dense_below=100)  # order: 200 | 20, 30, 3
    assert [(r.group, r.start, r.stop) for r in flat.ranges] == [(0, 0, 220), (1, 220, 253)]


def test_refusals() -> None:
    def check(*parameters: torch.Tensor) -> None:
        FlatParameters([{"params": list(parameters)}], 0)

    with pytest.raises(ValueError, match="params must have at least one parameter"):
        check()
    with pytest.raises(ValueError, match=r"floating point, but parameter 1 is torch\.int64"):
        check(torch.ones(2), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one dtype and device, but parameter 0 is torch\.float32"):
        check(torch.ones(2), torch.ones(2, dtype=torch.float64))
    shared = torch.ones(4)
    with pytest.raises(ValueError, match="must not share memory, but parameter 0 and parameter 1 do"):
        check(shared, shared.view(2, 2))


BASE = torch.zeros(12, 10)
WITHOUT_GAPS = BASE.view(-1)


@pytest.mark.parametrize(
    "views",
    [
        (BASE, BASE),
        (BASE, BASE.t()),
        (BASE, BASE[3:5]),
        (BASE[:4], BASE[3:]),
        (WITHOUT_GAPS[::2], WITHOUT_GAPS[50:]),
        (BASE[:, :5], BASE[:, 0]),
        (BASE[:, :5], BASE[2:4, 1]),
        (torch.from_numpy(BASE.numpy()[:8]), torch.from_numpy(BASE.numpy()[7:])),
        (BASE, BASE.view(torch.int32)[3:]),
    ],
    ids=lambda views: " and ".join(str(tuple(v.shape)) for v in views),
)
def test_parameters_that_share_memory_are_refused(views: tuple[torch.Tensor, torch.Tensor]) -> None:
    for first, second in (views, views[::-1]):
        named = {"a": first, "empty": BASE[:0], "apart": torch.ones(2), "b": second}
        with pytest.raises(ValueError, match=r"params must not share memory, but [ab] and [ab] do"):
            check_no_shared_memory(named, "params")


@pytest.mark.parametrize(
    "views",
    [
        BASE.split(4, dim=1),
        BASE.split(5),
        [WITHOUT_GAPS[i::4] for i in range(4)],
        [BASE[:6], BASE[6:, ::2], BASE[6:, 1::2]],
    ],
    ids=["columns", "rows", "interleaved", "rows and columns"],
)
def test_views_without_a_common_element_are_accepted(views: list[torch.Tensor]) -> None:
    check_no_shared_memory({str(i): view for i, view in enumerate(views)}, "params")


def test_a_moved_parameter_is_noticed() -> None:
    module = nn.Linear(4, 3)
    flat = flatten(module)
    flat.check_attached()
    module.double()
    with pytest.raises(RuntimeError, match=r"weight was moved or replaced.*make the optimizer last"):
        flat.check_attached()


def test_factors_of_a_lora_are_compressed_by_default() -> None:
    """Rank 4 of a layer of 64 inputs; vectors of any size and tiny matrices are sent uncompressed."""
    ps = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 64), (2048,), (15, 17))]
    assert CompressedSGD(ps, 0.1, TopK(0.5)).compressed_numel == 4 * 64
