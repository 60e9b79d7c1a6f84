"""Several optimizers as one: groups, states, schedules and copies are those of its members."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from packsaddle import Compression, Identity, LocalUpdates, Overlap, simulate
from packsaddle.integrations import JoinedOptimizer

WHOLE = Compression(Identity(), dense_below=0)


class Counter(Optimizer):
    """An optimizer with a format of its own, as those with states in 8 bits have: integers, and a count beside them."""

    def __init__(self, parameters: Any) -> None:
        self.count = 0
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                sum_of_signs = self.state[p].setdefault("signs", torch.zeros(p.shape, dtype=torch.int8))
                sum_of_signs += p.grad.sign().to(torch.int8)
                p.sub_(sum_of_signs, alpha=group["lr"] / self.count)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        signs = {i: entry["signs"].clone() for i, entry in state["state"].items()}
        super().load_state_dict({name: state[name] for name in ("state", "param_groups")})
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if i in signs:
                self.state[p]["signs"] = signs[i]  # torch casts it to the parameter's dtype
        self.count = state["count"]


def made(own_format: bool = False) -> tuple[nn.Sequential, Optimizer, Optimizer]:
    net, rng = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5, generator=rng)
    rest = [{"params": [net[0].bias]}, {"params": [*net[2].parameters()]}]
    return net, Muon([net[0].weight], lr=0.01), Counter(rest) if own_format else AdamW(rest, lr=0.01)


def step(net: nn.Module, *optimizers: Optimizer, scale: float = 1.0) -> None:
    net.zero_grad()
    net(torch.full((3, 6), scale)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


@pytest.mark.parametrize("own_format", [False, True])
def test_a_loaded_state_continues_as_the_members_would(own_format: bool) -> None:
    net, *members = made(own_format)
    for _ in range(5):
        step(net, *members)
    expected = flat(net)
    net, *members = made(own_format)
    joined = JoinedOptimizer(members)
    for _ in range(3):
        step(net, joined)
    saved, weights = copy.deepcopy(joined.state_dict()), copy.deepcopy(net.state_dict())
    net, *members = made(own_format)
    joined = JoinedOptimizer(members)
    net.load_state_dict(weights)
    joined.load_state_dict(saved)
    for _ in range(2):
        step(net, joined)
    assert torch.equal(flat(net), expected)
    assert ("members" in saved) == own_format


def test_a_state_is_that_of_one_torch_optimizer() -> None:
    """Two AdamWs of different groups, joined, and one with all groups load each other's states."""
    net, _, adamw = made()
    both = JoinedOptimizer([AdamW([net[0].weight], lr=0.01), adamw])
    one = AdamW([{"params": group["params"], "lr": 0.01} for group in both.param_groups])
    step(net, one)
    both.load_state_dict(one.state_dict())
    ours, theirs = both.state_dict(), one.state_dict()
    assert ours["state"].keys() == theirs["state"].keys() == set(range(4))
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
    for i, entry in ours["state"].items():
        assert torch.equal(entry["exp_avg"], theirs["state"][i]["exp_avg"])
    with pytest.raises(ValueError, match="the state has 2 parameter groups, and there are 3"):
        both.load_state_dict(adamw.state_dict())


def test_states_loaded_into_members_are_the_joined_ones() -> None:
    """Also their groups, which a schedule of the joined optimizer goes on scaling."""
    net, muon, adamw = made()
    step(net, muon, adamw)
    saved = [copy.deepcopy(each.state_dict()) for each in (muon, adamw)]
    net, muon, adamw = made()
    joined = JoinedOptimizer([muon, adamw])
    schedule = torch.optim.lr_scheduler.LambdaLR(joined, lambda n: 0.5**n)
    for each, state in zip((muon, adamw), saved, strict=True):
        each.load_state_dict(state)
    assert len(joined.state_dict()["state"]) == 4
    for _ in range(2):
        step(net, joined)
        schedule.step()
    assert [g["lr"] for each in (muon, adamw) for g in each.param_groups] == [0.0025] * 3
    assert muon.state_dict()["state"].keys() == {0}


def test_a_copy_is_apart() -> None:
    net, muon, adamw = made()
    joined = JoinedOptimizer([muon, adamw])
    step(net, joined)
    other = copy.deepcopy(joined)
    other.param_groups[0]["lr"] = 1.0
    assert joined.param_groups[0]["lr"] == 0.01
    assert len(other.state) == 4
    assert not other.state.keys() & joined.state.keys()
    other.step()


def test_members_are_stepped_and_extended_by_the_joined_optimizer() -> None:
    net, muon, adamw = made()
    joined = JoinedOptimizer([muon, adamw])
    step(net, muon, adamw)  # without LocalUpdates as one likes
    extra = [nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
    with pytest.raises(RuntimeError, match="must be added to a member"):
        joined.add_param_group({"params": extra[:1]})
    muon.add_param_group({"params": extra[:1]})
    assert len(joined.param_groups) == 4
    local = LocalUpdates(joined, WHOLE)
    with pytest.raises(RuntimeError, match=r"Muon is a member of a JoinedOptimizer .* step the JoinedOptimizer"):
        step(net, muon, adamw)
    with pytest.raises(RuntimeError, match="optimizer already has LocalUpdates"):
        LocalUpdates([muon, adamw], WHOLE)
    step(net, joined)
    assert local.steps == 1
    muon.add_param_group({"params": extra[1:]})
    with pytest.raises(RuntimeError, match="added or unfrozen after LocalUpdates"):
        step(net, joined)
    with pytest.raises(ValueError, match="no parameter in common, but Muon and Muon have one"):
        JoinedOptimizer([muon, Muon([net[0].weight])])


@pytest.mark.filterwarnings("ignore:mean_momentum raised the loss")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_mean_momentum_looks_at_the_members(order: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    """With two fragments the first may be Muon's alone."""

    def body(worker: int) -> Tensor:
        net, *members = made()
        joined = JoinedOptimizer([members[i] for i in order])
        local = LocalUpdates(joined, WHOLE, every=2, mean_momentum=0.5, overlap=Overlap(fragments=2))
        for _ in range(4):
            step(net, joined, scale=worker + 1.0)
        assert local.flush()
        return flat(net)

    assert torch.equal(*simulate(body, 2))
    assert "mean_momentum has no effect" not in caplog.text
    _, muon, _ = made()
    with pytest.raises(ValueError, match=r"mean_momentum needs Adam's moments, .* and Muon has none"):
        LocalUpdates(JoinedOptimizer([muon]), WHOLE, mean_momentum=0.5)


class Wrapper(Optimizer):
    """Steps an optimizer, and then halves its parameters; its state has an entry that is of no parameter."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})
        self.state["all"] = {"steps": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        self.state["all"]["steps"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.5)


def test_a_wrapper_is_a_member_itself() -> None:
    """With entries of its state that are of no parameter."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def joined() -> JoinedOptimizer:
        return JoinedOptimizer([Wrapper(torch.optim.SGD([a], lr=1.0)), torch.optim.SGD([b], lr=1.0)])

    first = joined()
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    a.data.fill_(5.0)
    first.step()
    assert a.tolist() == [2.0] * 2
    assert b.tolist() == [0.0] * 2
    second = joined()
    second.load_state_dict(first.state_dict())
    assert second.members[0].state["all"] == {"steps": 1}


def test_keys_of_parameters_may_be_names() -> None:
    """As torch.distributed.checkpoint has them."""
    net, *members = made()
    step(net, joined := JoinedOptimizer(members))
    saved = joined.state_dict()
    names = {i: f"name {i}" for i in saved["state"]}
    for group in saved["param_groups"]:
        group["params"] = [names[i] for i in group["params"]]
    saved["state"] = {names[i]: entry for i, entry in saved["state"].items()}
    other = JoinedOptimizer(made()[1:])
    other.load_state_dict(saved)
    for p, q in zip(joined.state, other.state, strict=True):
        for name, value in joined.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][name]))


def test_frameworks_write_states_and_groups() -> None:
    net, muon, adamw = made()
    step(net, joined := JoinedOptimizer([muon, adamw]))
    joined.state[net[0].bias] = {"exp_avg": torch.ones(8)}
    assert adamw.state[net[0].bias]["exp_avg"].tolist() == [1.0] * 8
    joined.state = {net[0].weight: {"momentum_buffer": torch.zeros(8, 6)}}
    assert (len(muon.state), len(adamw.state), len(joined.state)) == (1, 0, 1)
    assert net[0].weight in joined.state
    assert net[0].bias not in joined.state
    joined.param_groups = [{**group, "lr": 0.5} for group in joined.param_groups]
    assert [group["lr"] for each in (muon, adamw) for group in each.param_groups] == [0.5] * 3
    with pytest.raises(ValueError, match="the state has 2 parameter groups, and there are 3"):
        joined.param_groups = joined.param_groups[:2]
