"""The hook between replicas of a sharded model, on four gloo processes: two shards, two replicas."""

import math
from collections.abc import Callable
from typing import Any

import fronts
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import packsaddle as ps

Gloo = Callable[..., list[Any]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 61), nn.Tanh(), nn.Linear(61, 60), nn.Tanh(), nn.Linear(60, 30)).double()


def sharded(mesh: Any, model: nn.Sequential | None = None) -> nn.Sequential:
    """Shard the network, a module for each layer."""
    from torch.distributed.fsdp import fully_shard

    model = network() if model is None else model
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh)
    return model


def meshes() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def loss(model: nn.Module, t: int) -> Tensor:
    batch = torch.randn(8, 30, generator=torch.Generator().manual_seed(10 * t + dist.get_rank()), dtype=torch.float64)
    return (model(batch) - batch).square().mean()


def local_shards(model: nn.Module, gradient: bool = False) -> Tensor:
    tensors = [p.grad if gradient else p for p in model.parameters()]
    return torch.cat([t.to_local().reshape(-1) for t in tensors]).detach().clone()  # type: ignore[union-attr]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for t in range(steps):
        optimizer.zero_grad()
        loss(model, t).backward()
        optimizer.step()


def beside_native_hsdp() -> tuple[Tensor, Tensor]:
    mesh = meshes()
    native, ours = sharded(mesh), sharded(mesh["shard"])
    hook = ps.register_fsdp_hook(ours, mesh["replicate"].get_group(), ps.Identity())
    for model in (native, ours):
        train(model, torch.optim.AdamW(model.parameters(), 1e-2), 8)
    assert hook.steps == 8
    return local_shards(native), local_shards(ours)


def test_uncompressed_it_is_hsdp(gloo: Gloo) -> None:
    for native, ours in gloo(beside_native_hsdp, 4):
        assert torch.allclose(native, ours, rtol=1e-9, atol=1e-12)


def compressed() -> dict[str, Any]:
    """Plain SGD: y = x - eta e moves as it would uncompressed, from the gradients at x."""
    mesh = meshes()
    native, ours, group = sharded(mesh), sharded(mesh["shard"]), mesh["replicate"].get_group()
    hook = ps.register_fsdp_hook(ours, group, ps.Compression(ps.TopK(0.05), exchange="two-way"))
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    start, total = local_shards(ours), torch.zeros_like(local_shards(ours))
    for t in range(10):
        for p, q in zip(native.parameters(), ours.parameters(), strict=True):
            p.to_local().detach().copy_(q.to_local().detach())  # type: ignore[attr-defined]
        native.zero_grad()
        optimizer.zero_grad()
        loss(native, t).backward()
        loss(ours, t).backward()
        total += local_shards(native, gradient=True)
        optimizer.step()
    e = torch.cat([error.reshape(-1) for error in hook.memory().values()])
    dist.all_reduce(e, group=group)
    # What has not been applied, whatever the order of the parameters in a shard.
    missing, pending = (start - 0.1 * total) - local_shards(ours), 0.1 * e / 2
    sent = sum(b.payload for k, b in hook.ledger.by_purpose.items() if k != "start")
    return {
        "x": local_shards(ours),
        "energies": (float(missing.square().sum()), float(pending.square().sum())),
        "sums": (float(missing.sum()), -float(pending.sum())),
        "share": sent / (10 * 8 * len(start)),
    }


def test_compressed_it_keeps_what_it_does_not_send(gloo: Gloo) -> None:
    """With two shards; other compressors and the direct exchange in tests/feedback/engine/test_conservation.py."""
    runs = gloo(compressed, 4)
    for rank, run in enumerate(runs):
        assert torch.equal(run["x"], runs[(rank + 2) % 4]["x"])  # replicas agree bit for bit
        assert run["energies"][0] == pytest.approx(run["energies"][1], rel=1e-9) != 0
        assert run["sums"][0] == pytest.approx(run["sums"][1], rel=1e-9)
        assert run["share"] < 0.3


FLAT = "compressor must act on flat shards, in which tensors are cut, and"
REFUSED: dict[str, Callable[[Any], tuple[nn.Module, ps.Compressor]]] = {
    "model must have been sharded by fully_shard, got Sequential": lambda mesh: (network(), ps.TopK(0.1)),
    "must be sharded on a mesh of one dimension, got 2": lambda mesh: (sharded(mesh), ps.TopK(0.1)),
    f"{FLAT} LowRank": lambda mesh: (sharded(mesh["shard"]), ps.LowRank(1)),
    f"{FLAT} Sign": lambda mesh: (sharded(mesh["shard"]), ps.Sign(per_tensor=True)),
}


def refusals() -> None:
    mesh = meshes()
    for message, made in REFUSED.items():
        model, compressor = made(mesh)
        with pytest.raises((TypeError, ValueError), match=message):
            ps.register_fsdp_hook(model, mesh["replicate"].get_group(), compressor)
    with pytest.raises((TypeError, ValueError), match=r"see packsaddle\.register_fsdp_hook"):
        ps.attach(sharded(mesh["shard"]), ps.TopK(0.1))


def test_what_is_refused(gloo: Gloo) -> None:
    gloo(refusals, 4)


# ---- starting alike


def fill(model: nn.Module, value: float) -> None:
    """Set this worker's shards to a value that depends on the parameter as well."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.to_local().fill_(value + i)  # type: ignore[operator]


def values(model: nn.Module) -> list[float]:
    return [float(p.to_local().flatten()[0]) - i for i, p in enumerate(model.parameters()) if p.to_local().numel()]  # type: ignore[operator]


def different_starts() -> dict[str, list[float]]:
    mesh, rank, found = meshes(), dist.get_rank(), {}
    group = mesh["replicate"].get_group()
    model = sharded(mesh["shard"])
    fill(model, 0.01 * (1 + rank))
    ps.register_fsdp_hook(model, group)
    found["with weights"] = values(model)
    fill(model, 0.5)  # as loading a checkpoint does
    loss(model, 0).backward()
    found["loaded"] = values(model)

    model = sharded(mesh["shard"], on_meta())
    hook = ps.register_fsdp_hook(model, group)
    model.to_empty(device="cpu")
    fill(model, 0.01 * (1 + rank))
    with torch.no_grad():
        loss(model, 0)  # an evaluation
    found["evaluated"] = values(model)
    loss(model, 0).backward()
    found["without"] = values(model)
    fill(model, 0.5)
    loss(model, 1).backward()
    found["loaded later"] = values(model)
    assert hook.steps == 2
    return found


def test_replicas_start_from_rank_0s_parameters_and_loading_is_not_undone(gloo: Gloo) -> None:
    for rank, found in enumerate(gloo(different_starts, 4)):
        first = 0.01 * (1 + rank % 2)  # of replica 0, which has this shard
        for name, value in {
            "with weights": first,
            "loaded": 0.5,
            "evaluated": 0.01 * (1 + rank),
            "without": first,
            "loaded later": 0.5,
        }.items():
            assert found[name] == pytest.approx([value] * len(found[name]), abs=1e-9), name
            assert found[name]


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return network()


# ---- gradients that are not finite


def in_one_shard() -> dict[str, Any]:
    """Two passes; in the second the first row of the first layer, a row of the first shard, is NaN on worker 0."""
    mesh = meshes()
    model = sharded(mesh["shard"], fronts.network())
    hook = ps.register_fsdp_hook(model, mesh["replicate"].get_group(), ps.TopK(0.1))
    for t in range(2):
        model[0].value = math.nan if (t, dist.get_rank()) == (1, 0) else None  # type: ignore[assignment]
        loss(model, t).backward()
    gradients = [p.grad.to_local() for p in model.parameters()]  # type: ignore[union-attr]
    return {
        "NaN": {bool(g.isnan().all()) for g in gradients if g.numel()},
        "skips": [(skip.index, skip.workers, skip.parameter) for skip in hook.skips],
        "steps": hook.steps,
        "bytes": (hook.uncompressed.payload, 2 * 8 * sum(p.to_local().numel() for p in model.parameters())),  # type: ignore[attr-defined]
    }


def test_replicas_of_a_shard_agree_and_other_shards_do_not_know(gloo: Gloo) -> None:
    """That a bad pass leaves no trace: tests/feedback/engine/test_invalid_steps.py."""
    named = [[(1, (0,), "0")], [], [(1, (), "a gradient of another worker")], []]
    for rank, run in enumerate(gloo(in_one_shard, 4)):
        is_bad = rank % 2 == 0
        assert run["NaN"] == {is_bad}
        assert (run["skips"], run["steps"]) == (named[rank], 2 - is_bad)
        assert run["bytes"][0] == run["bytes"][1]


# ---- states


def loaded_wrongly() -> list[str]:
    mesh, found = meshes(), []
    model = sharded(mesh["shard"])
    hook = ps.register_fsdp_hook(model, mesh["replicate"].get_group(), ps.TopK(0.05))
    loss(model, 0).backward()
    state = hook.state_dict()
    identity = state["identity"]
    wrong: list[dict[str, Any]] = [
        state | {"identity": identity | {"replicas": 3}},
        state | {"identity": identity | {"shards": 4}},
        state | {"identity": identity | {"seed": 8}},
        {name: value for name, value in state.items() if name != "format"},
        state | {"error": {name: e[1:] for name, e in state["error"].items()}},
        state | {"error": state["error"] | {"other": torch.zeros(3)}},
    ]
    for bad in wrong:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 -- the messages are compared
            hook.load_state_dict(bad)
        found.append(str(raised.value))
    hook.load_state_dict(state)
    assert all(torch.equal(e, state["error"][name]) for name, e in hook.memory().items())
    return found


def test_states_that_do_not_fit_are_refused(gloo: Gloo) -> None:
    expected = (
        "replicas is 2 here, but the state was saved with replicas 3: an FSDP hook's error memories go back to",
        "shards is 2 here, but the state was saved with shards 4: an FSDP hook's",
        "seed is 0 here, but the state was saved with seed 8",
        "the state has no format; was it saved by register_fsdp_hook?",
        "error of 0 must have shape",
        "the state has error of other, and there is no such parameter here",
    )
    for messages in gloo(loaded_wrongly, 4):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def called_twice() -> str:
    """What is said where the model is called twice before one backward pass; a shared block comes twice as well."""
    mesh = meshes()
    model = sharded(mesh["shard"])
    ps.register_fsdp_hook(model, mesh["replicate"].get_group(), ps.TopK(0.1))
    with pytest.raises(RuntimeError, match="used twice") as raised:
        (loss(model, 0) + loss(model, 1)).backward()
    return str(raised.value)


def test_what_is_used_twice_in_a_pass_is_refused(gloo: Gloo) -> None:
    """FSDP hands over the gradient in parts."""
    for message in gloo(called_twice, 4, fresh=True):
        assert "is used twice in one backward pass" in message


def accumulated_over_a_bad_pass(empties: bool) -> tuple[bool, int, int]:
    """Two micro-batches for a step, both reduced, the first with a NaN on one replica; or dropped before the second."""
    mesh = meshes()
    model = sharded(mesh["shard"])
    hook = ps.register_fsdp_hook(model, mesh["replicate"].get_group(), ps.TopK(0.1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    hook.protect(optimizer)
    before = local_shards(model)
    for t in range(2):
        (loss(model, t) * (math.nan if t == 0 and dist.get_rank() == 2 else 1.0)).backward()
        if empties:
            optimizer.zero_grad()
    if empties:
        loss(model, 2).backward()
    optimizer.step()
    after = local_shards(model)
    return bool(after.isfinite().all()), int(not torch.equal(before, after)), hook.skipped


@pytest.mark.parametrize("empties", [False, True])
def test_a_bad_micro_batch_spoils_the_step_and_no_other(gloo: Gloo, empties: bool) -> None:
    for found in gloo(accumulated_over_a_bad_pass, 4, empties):
        assert found == (True, int(empties), 1)


def around_a_skipped_step(set_to_none: bool) -> list[bool]:
    """Whether each of three steps moved the parameters. The training script itself skips the second, whose gradients
    are NaNs. The last layer belongs to the root module."""
    from torch.distributed.fsdp import fully_shard

    mesh, model, moved = meshes(), network(), []
    for module in (model[0], model):
        fully_shard(module, mesh=mesh["shard"])
    hook = ps.register_fsdp_hook(model, mesh["replicate"].get_group(), ps.TopK(0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook.protect(optimizer)
    for t in range(3):
        optimizer.zero_grad(set_to_none)
        (loss(model, t) * (math.nan if t == 1 and dist.get_rank() == 2 else 1.0)).backward()
        before = local_shards(model)
        if local_shards(model, gradient=True).isfinite().all():
            optimizer.step()
        moved.append(not torch.equal(before, local_shards(model)))
    return moved


@pytest.mark.parametrize("set_to_none", [False, True])
def test_the_step_after_a_skipped_one_is_applied(gloo: Gloo, set_to_none: bool) -> None:
    for moved in gloo(around_a_skipped_step, 4, set_to_none):
        assert moved == [True, False, True]


class Branches(nn.Module):
    """Three blocks of one shape, of which a forward pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(30, 30) for _ in range(3))

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.blocks[branch](x)  # type: ignore[no-any-return]


def unlike_branches(compressor: ps.Compressor, at: int) -> tuple[list[str], int, bool]:
    """Replicas agree until pass `at`, where they take unlike branches; return errors, steps, and if memories stayed."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh, model, said = meshes(), Branches(), []
    for layer in (*model.blocks, model):
        fully_shard(layer, mesh=mesh["shard"])
    hook = ps.register_fsdp_hook(model, mesh["replicate"].get_group(), compressor)
    before: dict[str, Tensor] = {}
    for t in range(at + 1):
        before = {name: e.clone() for name, e in hook.memory().items()}
        try:
            model(torch.rand(4, 30), 1 + dist.get_rank() // 2 if t == at else 0).square().mean().backward()
        except RuntimeError as error:
            said.append(str(error))
    after = hook.memory()
    return said, hook.steps, all(torch.equal(e, after[name]) for name, e in before.items())


@pytest.mark.parametrize(("compressor", "at"), [(ps.TopK(0.1), 2), (ps.QSGD(127), 0), (ps.Identity(), 1)], ids=str)
def test_replicas_that_use_unlike_modules_of_one_shape_are_refused(
    gloo: Gloo, compressor: ps.Compressor, at: int
) -> None:
    """Their gradients would be averaged into each other's, as torch's hybrid sharding does."""
    for rank, (said, steps, kept) in enumerate(gloo(unlike_branches, 4, compressor, at, fresh=True)):
        assert len(said) == 1
        assert said[0].startswith("replicas must use the same modules in a backward pass")
        assert f"this one reduced blocks.{1 + rank // 2}, another" in said[0]
        assert (steps, kept) == (at, True)
