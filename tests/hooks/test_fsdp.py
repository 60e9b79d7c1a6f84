"""The hook between replicas of a sharded model, on four gloo processes: two shards, two replicas."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from packsaddle import (
    QSGD,
    Compression,
    Compressor,
    DriftError,
    Identity,
    LowRank,
    TopK,
    attach,
    register_fsdp_hook,
)

Gloo = Callable[..., list[Any]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 61), nn.Tanh(), nn.Linear(61, 60), nn.Tanh(), nn.Linear(60, 30)).double()


def sharded(mesh: Any) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
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


def beside_native_hsdp() -> tuple[Tensor, Tensor]:
    mesh = meshes()
    native, ours = sharded(mesh), sharded(mesh["shard"])
    hook = register_fsdp_hook(ours, mesh["replicate"].get_group(), Identity())
    for model in (native, ours):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for t in range(8):
            optimizer.zero_grad()
            loss(model, t).backward()
            optimizer.step()
    assert hook.steps == 8
    return local_shards(native), local_shards(ours)


def test_uncompressed_it_is_hsdp(gloo: Gloo) -> None:
    for native, ours in gloo(beside_native_hsdp, 4):
        assert torch.allclose(native, ours, rtol=1e-9, atol=1e-12)


def compressed(compressor: Compressor, exchange: str) -> dict[str, Any]:
    """Plain SGD: y = x - eta e moves as it would uncompressed, from the gradients at x."""
    mesh = meshes()
    native, ours = sharded(mesh), sharded(mesh["shard"])
    group = mesh["replicate"].get_group()
    hook = register_fsdp_hook(ours, group, Compression(compressor, exchange=exchange))
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    start, total = local_shards(ours), torch.zeros_like(local_shards(ours))
    for t in range(10):
        with torch.no_grad():
            for p, q in zip(native.parameters(), ours.parameters(), strict=True):
                p.to_local().copy_(q.to_local())
        native.zero_grad()
        optimizer.zero_grad()
        loss(native, t).backward()
        loss(ours, t).backward()
        total += local_shards(native, gradient=True)
        optimizer.step()
    e = {name: error.clone() for name, error in hook.memory().items()}
    for error in e.values():
        dist.all_reduce(error, group=group)
    # What has not been applied, whatever the order of the parameters in a shard.
    missing = (start - 0.1 * total) - local_shards(ours)
    return {
        "x": local_shards(ours),
        "missing": float(missing.square().sum()),
        "kept": sum(float((0.1 * error / 2).square().sum()) for error in e.values()),
        "sums": (float(missing.sum()), -0.1 * sum(float(error.sum()) / 2 for error in e.values())),
        "share": sum(b.payload for k, b in hook.ledger.by_purpose.items() if k != "start") / (10 * 8 * len(start)),
        "state": hook.state_dict(),
    }


def test_compressed_it_keeps_what_it_does_not_send(gloo: Gloo) -> None:
    """With two shards; other compressors and the direct exchange in tests/feedback/engine/test_conservation.py."""
    runs = gloo(compressed, 4, TopK(0.05), "two-way")
    for rank, run in enumerate(runs):
        assert torch.equal(run["x"], runs[(rank + 2) % 4]["x"])  # replicas agree bit for bit
        assert run["kept"] > 0
        assert run["missing"] == pytest.approx(run["kept"], rel=1e-9)
        assert run["sums"][0] == pytest.approx(run["sums"][1], rel=1e-9)
        assert run["share"] < 0.3


def resumed() -> list[Tensor]:
    found = []
    for stop in (None, 5):
        mesh = meshes()
        model = sharded(mesh["shard"])
        hook = register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.05), noise=0.01, start_step=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for t in range(9):
            if t == stop:
                state = hook.state_dict()
                hook = register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.05), noise=0.01, start_step=2)
                hook.load_state_dict(state)
            optimizer.zero_grad()
            loss(model, t).backward()
            optimizer.step()
        found.append(local_shards(model))
    return found


def test_a_loaded_state_goes_on_as_before(gloo: Gloo) -> None:
    for whole, again in gloo(resumed, 4):
        assert torch.equal(whole, again)


def refusals() -> list[str]:
    mesh, found = meshes(), []
    group = mesh["replicate"].get_group()
    attempts: list[Callable[[], object]] = [
        lambda: register_fsdp_hook(network(), group),
        lambda: register_fsdp_hook(sharded(mesh), group),
        lambda: register_fsdp_hook(sharded(mesh["shard"]), group, LowRank(1)),
        lambda: register_fsdp_hook(sharded(mesh["shard"]), group, TopK(0.1, per_tensor=True)),
        lambda: attach(sharded(mesh["shard"]), TopK(0.1)),
    ]
    for attempt in attempts:
        try:
            attempt()
            found.append("nothing was raised")
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def test_what_is_refused(gloo: Gloo) -> None:
    for messages in gloo(refusals, 4):
        for message, part in zip(
            messages,
            (
                "model must have been sharded by fully_shard, got Sequential",
                "must be sharded on a mesh of one dimension, got 2",
                "compressor must act on flat shards",
                "compressor must act on flat shards",
                "see packsaddle.register_fsdp_hook",
            ),
            strict=True,
        ):
            assert part in message


# ---- starting alike


def plain(model: nn.Module) -> nn.Module:
    """Shard it as `sharded` does, over all there are but two replicas."""
    from torch.distributed.fsdp import fully_shard

    mesh = meshes()["shard"]
    for layer in (model[0], model[2], model[4]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


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
    register_fsdp_hook(model, group)
    found["with weights"] = values(model)
    fill(model, 0.5)  # as loading a checkpoint does
    loss(model, 0).backward()
    found["loaded"] = values(model)

    with torch.device("meta"):
        model = network()
    plain(model)
    hook = register_fsdp_hook(model, group)
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


def on_meta() -> tuple[Tensor, Tensor]:
    """The same training, of a model that was made on the meta device and of one that was not."""
    mesh, found = meshes(), []
    for late in (False, True):
        if late:
            with torch.device("meta"):
                model = network()
            plain(model)
        else:
            model = sharded(mesh["shard"])
        hook = register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.1), noise=0.01)
        if late:
            model.to_empty(device="cpu")
        fill(model, 0.01)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for t in range(5):
            optimizer.zero_grad()
            loss(model, t).backward()
            optimizer.step()
        assert hook.steps == 5
        found.append(local_shards(model))
    return found[0], found[1]


def test_a_model_on_the_meta_device_trains_as_any_other(gloo: Gloo) -> None:
    for made, late in gloo(on_meta, 4):
        assert torch.equal(made, late)


# ---- gradients that are not finite


class Spoilt(torch.autograd.Function):
    """A tensor whose gradient gets a value in its first row, or in all."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, value: float, rows: int | None) -> Tensor:
        ctx.how = value, rows
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        value, rows = ctx.how
        g = g.clone()
        g[:rows] = value
        return g, None, None


class Layer(nn.Linear):
    """A layer of whose weight the gradient can be spoilt."""

    value: float | None = None
    rows: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight if self.value is None else Spoilt.apply(self.weight, self.value, self.rows)
        return nn.functional.linear(x, w, self.bias)


def spoilable(size: int) -> tuple[nn.Sequential, Any]:
    """A model whose first layer, the last that is reduced, can be spoilt; replicas of `size` shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Sequential(Layer(30, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 30)).double()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return model, mesh["replicate"].get_group()


BAD = (2, 3, 6)


def with_bad_batches(size: int, value: float, has_them: bool) -> dict[str, Any]:
    model, group = spoilable(size)
    hook = register_fsdp_hook(model, group, Compression(TopK(0.1), exchange="two-way", monitor_every=1), noise=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    hook.protect(optimizer)
    bad = []
    for t in range(8):
        if t in BAD and not has_them:
            continue
        model[0].value = value if t in BAD and dist.get_rank() < size else None
        optimizer.zero_grad()
        loss(model, t).backward()
        bad.append([bool(g.isnan().all()) for g in _gradients(model)])
        optimizer.step()
    return {
        "x": local_shards(model),
        "memory": hook.memory(),
        "steps": hook.steps,
        "skips": [(s.step, s.workers, s.parameter) for s in hook.skips],
        "NaN": [(all(found), any(found)) for found in bad],
        "contraction": hook.contraction,
        "bytes": (hook.uncompressed.payload, 8 * sum(g.numel() for g in _gradients(model, padded=True))),
    }


def _gradients(model: nn.Module, padded: bool = False) -> list[Tensor]:
    found = [p.to_local() if padded else p.grad.to_local() for p in model.parameters()]  # type: ignore[operator, union-attr]
    return [g for g in found if g.numel()]


def test_a_bad_pass_of_shards_leaves_no_trace(gloo: Gloo) -> None:
    """On the first replica the module that comes last is bad, as a sum over shards overflows."""
    size, value = 2, 1.7e308
    mine, twin = (gloo(with_bad_batches, 2 * size, size, value, has_them) for has_them in (True, False))
    for rank, (run, other) in enumerate(zip(mine, twin, strict=True)):
        assert torch.equal(run["x"], other["x"])
        assert run["memory"].keys() == other["memory"].keys()
        assert all(torch.equal(e, other["memory"][name]) for name, e in run["memory"].items())
        assert any(bool(e.any()) for e in run["memory"].values())
        assert run["steps"] == other["steps"] == 5
        named = ((0,), "0") if rank < size else ((), "a gradient of another worker")
        assert run["skips"] == [(step, *named) for step in (2, 2, 4)]
        assert other["skips"] == []
        assert run["NaN"] == [(t in BAD, t in BAD) for t in range(8)]
        assert run["contraction"] == other["contraction"]
        assert 0.1 < run["contraction"] < 1
        assert run["bytes"][0] == 8 * run["bytes"][1]  # eight exchanges, five of them taken


def in_one_shard() -> dict[str, Any]:
    model, group = spoilable(2)
    hook = register_fsdp_hook(model, group, TopK(0.1))
    model[0].rows = 1  # a row of the first shard
    model[0].value = math.nan if dist.get_rank() == 0 else None
    loss(model, 0).backward()
    return {"NaN": [bool(g.isnan().all()) for g in _gradients(model)], "skipped": hook.skipped, "steps": hook.steps}


def test_replicas_of_a_shard_agree_and_other_shards_do_not_know(gloo: Gloo) -> None:
    runs = gloo(in_one_shard, 4)
    for rank, run in enumerate(runs):
        is_bad = rank % 2 == 0
        assert set(run["NaN"]) == {is_bad}
        assert (run["skipped"], run["steps"]) == (int(is_bad), int(not is_bad))


def drifting() -> str:
    model, group = spoilable(2)
    register_fsdp_hook(model, group, Compression(TopK(0.1), compare_every=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    try:
        for t in range(9):
            optimizer.zero_grad()
            loss(model, t).backward()
            optimizer.step()
            if t == 3 and dist.get_rank() >= 2:
                model[2].weight.to_local().data[0, 0] += 1e-9
    except DriftError as error:
        return f"{t}: {error}"
    return "nothing was raised"


def test_replicas_that_drift_apart_are_found(gloo: Gloo) -> None:
    """Both shards of a replica have changed; compared after steps 2 and 5, at the end of the next pass."""
    for found in gloo(drifting, 4):
        assert found.startswith("6: after step 5: worker 1 differs from worker 0 in 2.weight. ")


# ---- states


def loaded_wrongly() -> list[str]:
    mesh, found = meshes(), []
    model = sharded(mesh["shard"])
    hook = register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.05))
    loss(model, 0).backward()
    state = hook.state_dict()
    identity = state["identity"]
    wrong: list[dict[str, Any]] = [
        state | {"identity": identity | {"replicas": 3}},
        state | {"identity": identity | {"shards": 4}},
        state | {"identity": identity | {"seed": 8}},
        {name: value for name, value in state.items() if name != "format"},
        state | {"format": 7},
        state | {"error": {name: e[1:] for name, e in state["error"].items()}},
        state | {"error": state["error"] | {"other": torch.zeros(3)}},
    ]
    for bad in wrong:
        try:
            hook.load_state_dict(bad)
            found.append("nothing was raised")
        except ValueError as error:
            found.append(str(error))
    hook.load_state_dict(state)
    assert all(torch.equal(e, state["error"][name]) for name, e in hook.memory().items())
    return found


def test_states_that_do_not_fit_are_refused(gloo: Gloo) -> None:
    for messages in gloo(loaded_wrongly, 4):
        for message, part in zip(
            messages,
            (
                "replicas is 2 here, but the state was saved with replicas 3: an FSDP hook's error memories go back to",
                "shards is 2 here, but the state was saved with shards 4: an FSDP hook's",
                "seed is 0 here, but the state was saved with seed 8",
                "the state has no format; was it saved by register_fsdp_hook?",
                "the state has format 7, and this version of packsaddle reads format 6",
                "error of 0 must have shape",
                "the state has error of other, and there is no such parameter here",
            ),
            strict=True,
        ):
            assert part in message


class Uneven(nn.Module):
    """Three matrices with Gaussian gradients, of which the first's are by far the largest; 61 rows are padded to 62."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(60, 61, bias=False) for _ in range(3))

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        parts = [(layer(x) * y).sum() for layer, x, y in zip(self.layers, inputs, outputs, strict=True)]
        return 30 * parts[0] + parts[1] + parts[2]


def uneven() -> tuple[float, float, int, list[int]]:
    """Return the error's norm beside that of one choice among all coordinates, their number, and what was sent."""
    from torch.distributed.fsdp import fully_shard

    mesh, model, plain = meshes(), Uneven(), Uneven()
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=mesh["shard"])
    hook = register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.05))
    shard, shards = mesh["shard"].get_local_rank(), mesh["shard"].size()
    e, sent = torch.zeros(3, 31 * 60), [0]
    for t in range(40):
        rng = torch.Generator().manual_seed(100 * t + mesh["replicate"].get_local_rank())
        inputs, outputs = torch.randn(3, 80, 60, generator=rng), torch.randn(3, 80, 61, generator=rng)
        for network in (model, plain):
            network.zero_grad()
            network(inputs, outputs).backward()
        sent.append(hook.ledger.by_purpose["values"].payload // 4)
        gradients = [layer.weight.grad for layer in plain.layers]
        padded = [torch.cat([g, torch.zeros(1, 60)]) for g in gradients]  # type: ignore[list-item]
        v = e + torch.stack([p.chunk(shards)[shard].reshape(-1) for p in padded])
        e = v.clone()
        e.view(-1)[v.abs().view(-1).topk(round(0.05 * v.numel())).indices] = 0
    found = torch.cat([x.reshape(-1) for x in hook.memory().values()])
    return float(found.norm()), float(e.norm()), len(found), [b - a for a, b in pairwise(sent)]


def test_modules_choose_as_one(gloo: Gloo) -> None:
    """TopK's k is of the shards of all modules, as it is of all of DDP's buckets."""
    for ours, chosen_as_one, d, sent in gloo(uneven, 4):
        assert d == 3 * 31 * 60
        assert set(sent) == {279}
        assert ours < 1.1 * chosen_as_one


def called_twice() -> str:
    """What is said where the model is called twice before one backward pass; a shared block comes twice as well."""
    mesh = meshes()
    model = sharded(mesh["shard"])
    register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.1))
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
    hook = register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.1))
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


class Branches(nn.Module):
    """Three blocks of one shape, of which a forward pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(30, 30) for _ in range(3))

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.blocks[branch](x)  # type: ignore[no-any-return]


def unlike_branches(compressor: Compressor, at: int) -> tuple[list[str], int, bool]:
    """Replicas agree until pass `at`, where they take unlike branches; return errors, steps, and if memories stayed."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh, model, said = meshes(), Branches(), []
    for layer in (*model.blocks, model):
        fully_shard(layer, mesh=mesh["shard"])
    hook = register_fsdp_hook(model, mesh["replicate"].get_group(), compressor)
    before: dict[str, Tensor] = {}
    for t in range(at + 1):
        before = {name: e.clone() for name, e in hook.memory().items()}
        try:
            model(torch.rand(4, 30), 1 + dist.get_rank() // 2 if t == at else 0).square().mean().backward()
        except RuntimeError as error:
            said.append(str(error))
    after = hook.memory()
    return said, hook.steps, all(torch.equal(e, after[name]) for name, e in before.items())


@pytest.mark.parametrize(("compressor", "at"), [(TopK(0.1), 2), (QSGD(127), 0), (Identity(), 1)], ids=str)
def test_replicas_that_use_unlike_modules_of_one_shape_are_refused(gloo: Gloo, compressor: Compressor, at: int) -> None:
    """Their gradients would be averaged into each other's, as torch's hybrid sharding does."""
    for rank, (said, steps, kept) in enumerate(gloo(unlike_branches, 4, compressor, at, fresh=True)):
        assert len(said) == 1
        assert said[0].startswith("replicas must use the same modules in a backward pass")
        assert f"this one reduced blocks.{1 + rank // 2}, another" in said[0]
        assert (steps, kept) == (at, True)
