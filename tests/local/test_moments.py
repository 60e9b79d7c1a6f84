"""First moments mixed with the mean update: the formula by hand, what is left as it is, and where moments are missing.
Whole runs are compared with the twin in tests/feedback/engine/test_random_local_updates.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

from packsaddle import Compression, Identity, LocalUpdates, OuterAgreement, OuterSGD, simulate
from packsaddle.comm.sharding import Shards
from packsaddle.local.moments import MeanMomentum

Gloo = Callable[..., list[Any]]
WHOLE = Compression(Identity(), dense_below=0)


def stepped(optimizer_class: type[torch.optim.Optimizer] = AdamW, **options: object) -> tuple:  # type: ignore[type-arg]
    """A parameter, float32[4, 3], with the optimizer that has made three steps on it, and the state's entry."""
    rng = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3, generator=rng).to(options.pop("dtype", torch.float32)))  # type: ignore[arg-type]
    optimizer = optimizer_class([p], lr=0.1, **options)  # type: ignore[call-arg]
    for _ in range(3):
        p.grad = torch.randn(4, 3, generator=rng).to(p.dtype)
        optimizer.step()
    return p, optimizer, optimizer.state[p]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum() / (a.double().norm() * b.double().norm()))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"dtype": torch.bfloat16}], ids=["", "amsgrad", "bfloat16"])
def test_with_all_of_it_a_step_goes_along_the_mean_update(options: dict[str, object]) -> None:
    p, optimizer, state = stepped(**options)
    update, before = torch.arange(12.0).view(4, 3) - 5, state["exp_avg"].clone()
    MeanMomentum([optimizer], 1.0, Shards([p])).mix([p], [update.flatten().clone()])
    v = state["max_exp_avg_sq" if "amsgrad" in options else "exp_avg_sq"]
    assert cosine(state["exp_avg"] / v.sqrt(), update) == pytest.approx(1, abs=1e-4)
    assert float(state["exp_avg"].double().norm()) == pytest.approx(float(before.double().norm()), rel=1e-2)


def test_nothing_changes_without_an_update_or_without_moments() -> None:
    p, optimizer, state = stepped()
    q, other, muon = stepped(torch.optim.Muon)
    before = [state["exp_avg"].clone(), muon["momentum_buffer"].clone()]
    both = MeanMomentum([other, optimizer], 0.5, Shards([p, q]))
    both.mix([p, q], [torch.zeros(4, 3), torch.ones(4, 3)])
    assert torch.equal(state["exp_avg"], before[0])
    assert torch.equal(muon["momentum_buffer"], before[1])
    both.mix([torch.nn.Parameter(torch.ones(3))], [torch.ones(3)])  # which has not been trained yet
    both.mix([p], [None])  # which is frozen
    assert torch.equal(state["exp_avg"], before[0])


def test_what_is_not_finite_or_not_of_the_parameters_shape_stays_as_it_is() -> None:
    """An infinite second moment only stops its coordinate in AdamW; low-rank moments are of another basis."""
    p, optimizer, state = stepped()
    state["exp_avg_sq"][0, 0] = float("inf")
    m, update = state["exp_avg"].clone(), torch.ones(4, 3)
    momentum = MeanMomentum([optimizer], 0.5, Shards([p]))
    momentum.mix([p], [update])
    assert torch.equal(state["exp_avg"], m)
    state["exp_avg_sq"] = torch.ones(4)
    momentum.mix([p], [update])
    assert torch.equal(state["exp_avg"], m)
    assert bool((update == 1).all())  # an outer optimizer may have kept it


@pytest.mark.filterwarnings("ignore:mean_momentum raised the loss")
def test_an_outer_momentum_does_not_change_the_mean_update() -> None:
    """torch's foreach Nesterov, the default on a GPU, adds the momentum to its gradients in place."""

    def work(worker: int) -> list[float]:
        rng, p = torch.Generator().manual_seed(worker), torch.nn.Parameter(torch.ones(40, 3))
        optimizer = AdamW([p], lr=0.1)

        def outer(anchors: list[Any]) -> torch.optim.Optimizer:
            return torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True, foreach=True)

        local = LocalUpdates(optimizer, WHOLE, every=2, outer=outer, mean_momentum=1.0, keep_unsent=False)
        found = []
        for n in range(8):
            before = p.detach().clone()
            p.grad = torch.randn(40, 3, generator=rng)
            optimizer.step()
            if n % 2 == 0:
                start, anchor = before, local.anchor()["parameter 0"]
                assert torch.equal(start, anchor)
            else:  # u, the mean of start - x, follows from the outer step: a' = a - 0.7 (u + 0.9 b'), b' = 0.9 b + u
                state = optimizer.state[p]
                step, b = anchor - local.anchor()["parameter 0"], found[-1][1] if found else torch.zeros(40, 3)
                u = (step / 0.7 - 0.81 * b) / 1.9
                found.append((cosine(state["exp_avg"] / state["exp_avg_sq"].sqrt(), u), 0.9 * b + u))
        return [cos for cos, _ in found]

    for found in simulate(work, 2):
        assert found == pytest.approx([1.0] * 4, abs=1e-4)


def test_other_optimizers_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """In the log, since they may have states later; not where torch's own have moments."""

    class Lion(torch.optim.Optimizer):
        """One moment, without a second."""

        def __init__(self, parameters: object, lr: float) -> None:
            super().__init__(parameters, {"lr": lr})  # type: ignore[arg-type]

    p = torch.nn.Parameter(torch.ones(3))
    for optimizers in ([Lion([p], 0.1)], [torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))]), AdamW([p])]):
        momentum = MeanMomentum(optimizers, 0.5, Shards([p]))
        for _ in range(2):
            momentum.mix([p], [torch.ones(3)])
    assert [r.message for r in caplog.records] == ["mean_momentum has no effect: Lion has no exp_avg and exp_avg_sq"]


def without_moments_on_a_shard() -> tuple[int, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def shards(whole: Tensor) -> Tensor:
        return distribute_tensor(whole, mesh, [Shard(0)])

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("worker", "shard"))
    mesh, rng = grid["shard"], torch.Generator().manual_seed(grid["worker"].get_local_rank())
    p, q = (torch.nn.Parameter(shards(torch.ones(4, 3))) for _ in range(2))
    optimizer = AdamW([p, q], lr=0.1)
    local = LocalUpdates(optimizer, WHOLE, every=1, mean_momentum=0.5, workers=grid["worker"].get_group())
    for n in range(4):
        of_p = torch.randn(4, 3, generator=rng)
        if n == 1:
            of_p[0, 0] = float("nan")  # the first shard's state of p is cleared
        p.grad = shards(of_p) if n != 2 else None  # and not made again at once
        q.grad = shards(torch.randn(4, 3, generator=rng))
        optimizer.step()
    return local.rounds, local.skipped


def test_a_shard_may_have_lost_its_moments(gloo: Gloo) -> None:
    assert gloo(without_moments_on_a_shard, 4) == [(3, 1)] * 4


def counted() -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6), torch.nn.LayerNorm(6))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return Shards(model.parameters()).total(torch.eye(4)[dist.get_rank()].clone()).tolist()  # type: ignore[no-any-return]


def test_each_process_of_two_meshes_counts_once(gloo: Gloo) -> None:
    assert gloo(counted, 4) == [[1.0] * 4] * 4


USUAL: dict[str, tuple[list[str], Any, float]] = {
    "AdamW": (["AdamW"], None, 0.5),
    "RAdam and SGD": (["RAdam", "SGD"], None, 0.5),
    "SGD": (["SGD"], None, 0.0),
    "Adamax": (["Adamax"], None, 0.0),
    "Muon and AdamW": (["Muon", "AdamW"], None, 0.0),
    "outer momentum": (["AdamW"], OuterSGD(), 0.0),
    "outer rate": (["AdamW"], OuterSGD(momentum=0.0), 0.5),
    "agreement": (["AdamW"], OuterAgreement(), 0.5),
    "agreement and momentum": (["AdamW"], OuterAgreement(then=OuterSGD()), 0.0),
    "a function": (["AdamW"], lambda anchor: torch.optim.SGD(anchor, lr=1.0), 0.0),
}


@pytest.mark.parametrize("name", USUAL)
def test_the_default(name: str) -> None:
    """Half with Adam alone; none with Muon, or with an outer momentum, which a function may have."""
    inner, outer, expected = USUAL[name]
    ps = [torch.nn.Parameter(torch.ones(4, 3)) for _ in inner]
    made = [getattr(torch.optim, name)([p], lr=0.1) for name, p in zip(inner, ps, strict=True)]
    assert LocalUpdates(made, WHOLE, outer=outer).options.mean_momentum == expected
