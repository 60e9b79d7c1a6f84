"""First moments mixed with the mean update: the formula by hand, what is left as it is, and where moments are missing.
Whole runs are compared with the twin in test_local_updates."""

import pytest
import torch
from elastic_fakes import FakeGroup, FakeManager
from torch import Tensor

from packsaddle import Compression, Elastic, Identity, LocalUpdates, simulate
from packsaddle.comm import resolve
from packsaddle.local.inner import Shards
from packsaddle.local.moments import MeanMomentum

WHOLE = Compression(Identity(), dense_below=0)


def stepped(optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: object) -> tuple:  # type: ignore[type-arg]
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


def test_a_fraction_is_between() -> None:
    p, optimizer, state = stepped()
    update, m = torch.ones(4, 3), state["exp_avg"].clone()
    d = state["exp_avg_sq"].sqrt()
    MeanMomentum([optimizer], 0.25, Shards([p])).mix([p], [update])
    torch.testing.assert_close(state["exp_avg"], 0.75 * m + 0.25 * m.norm() / d.norm() * d)


def test_nothing_changes_without_an_update_or_without_moments() -> None:
    p, optimizer, state = stepped()
    q, other, muon = stepped(torch.optim.Muon)
    before = [state["exp_avg"].clone(), muon["momentum_buffer"].clone()]
    both = MeanMomentum([other, optimizer], 0.5, Shards([p, q]))
    both.mix([p, q], [torch.zeros(4, 3), torch.ones(4, 3)])
    assert torch.equal(state["exp_avg"], before[0])
    assert torch.equal(muon["momentum_buffer"], before[1])
    both.mix([torch.nn.Parameter(torch.ones(3))], [torch.ones(3)])  # which has not been trained yet


def test_other_optimizers_are_refused_when_their_state_is_known() -> None:
    """Not while they have none: a GradScaler may have skipped all steps."""

    class Lion(torch.optim.Optimizer):
        """One moment, without a second."""

        def __init__(self, parameters: object, lr: float) -> None:
            super().__init__(parameters, {"lr": lr})  # type: ignore[arg-type]

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                self.state[p]["exp_avg"] = p.grad.clone()

    p = torch.nn.Parameter(torch.ones(3))
    lion = Lion([p], 0.1)
    momentum = MeanMomentum([lion], 0.5, Shards([p]))
    momentum.mix([p], [torch.ones(3)])
    p.grad = torch.ones(3)
    lion.step()
    with pytest.raises(ValueError, match=r"mean_momentum needs an optimizer with Adam's moments, .* and Lion has none"):
        momentum.mix([p], [torch.ones(3)])


def trained(worker: int, elastic: bool) -> tuple[list[Tensor], list[Tensor]]:
    """First moments after each of five steps, two of them rounds, and after a flush; the anchor's change in rounds."""
    rng = torch.Generator().manual_seed(worker)
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    manager = FakeManager(resolve(None)) if elastic else None
    workers = Elastic(manager, group=FakeGroup(manager), leave_on_sigterm=False) if elastic else None
    local = LocalUpdates(optimizer, WHOLE, every=2, mean_momentum=1.0, workers=workers)
    if elastic:
        local.join()
    moments, changes = [], []
    for n in range(5):
        before = local.anchor()
        p.grad = torch.randn(4, 3, generator=rng)
        optimizer.step()
        moments.append(optimizer.state[p]["exp_avg"] / optimizer.state[p]["exp_avg_sq"].sqrt())
        if n % 2:
            changes.append(before["parameter 0"] - local.anchor()["parameter 0"])
    local.flush()
    moments.append(optimizer.state[p]["exp_avg"] / optimizer.state[p]["exp_avg_sq"].sqrt())
    return moments, changes


@pytest.mark.parametrize("elastic", [False, True], ids=["fixed", "elastic"])
def test_after_a_round_workers_step_along_the_anchors_change(elastic: bool) -> None:
    """But not after a flush, which may exchange little."""
    for moments, changes in simulate(lambda worker: trained(worker, elastic), 2):
        assert [cosine(moments[n], change) for n, change in zip((1, 3), changes, strict=True)] == pytest.approx([1, 1])
        assert cosine(moments[0], changes[0]) < 0.99
        assert torch.equal(moments[-1], moments[-2])
