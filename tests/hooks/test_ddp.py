"""The hook behind DistributedDataParallel, in real gloo processes: beside CompressedSGD, dense averages and itself."""

import contextlib
import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_runs import COMPRESSORS, SEVERAL, WAYS, batches, loss, network, train, vector, wrapped
from forked_python import environment, python
from nightly import nightly
from specs import folded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch_loops import torch_only

import packsaddle as ps
from packsaddle.comm.group import resolve

Gloo = Callable[..., list[Any]]


# ---- the same run as CompressedSGD, and as its definition

STEPS = 6


def beside_compressed_sgd(options: dict[str, Any], scope: str, cap: float) -> dict[str, Any]:
    """Train both ways on the same batches."""
    ours, theirs = network(), wrapped(network(), cap)
    same = folded({"noise": 0.01, "seed": 3, "dense_below": 100, "monitor_every": 5, **options})
    a = ps.CompressedSGD(ours.parameters(), 0.2, **{**same, "noise": ps.Noise(same["noise"], lazy=False)})
    b = torch.optim.SGD(theirs.parameters(), 0.2)
    hook = ps.register_ddp_hook(theirs, scope=scope, optimizer=b, **same)
    for batch in batches(STEPS):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    memory = hook.memory()
    e = hook.channel.mean(torch.cat([memory[n].reshape(-1) for n, _ in theirs.module.named_parameters()]), "test")
    purposes = set(a.ledger.by_purpose) - {"start", "inspection"}
    return {
        "x": (vector(ours), vector(theirs)),
        "e": (a.error(), e),
        "bytes": tuple({k: h.ledger.by_purpose[k].sent for k in purposes} for h in (a, hook)),
        "steps": (hook.skipped, hook.steps),
        "mu": (a.monitor.whole, hook.contraction),
    }


def all_beside_compressed_sgd() -> dict[tuple[str, str], dict[str, Any]]:
    """In one bucket or in many, by turns, and both of each exchange; one worker alone has the exchanges only."""
    cases = [("many buckets, model", "model", SEVERAL), ("one bucket", "bucket", 1000.0)]
    alone = resolve(None).size == 1
    return {
        (way, name): beside_compressed_sgd(WAYS[way], scope, cap)
        for i, way in enumerate(EXCHANGES if alone else BESIDE)
        for name, scope, cap in (cases if way in EXCHANGES and not alone else cases[i % 2 : i % 2 + 1])
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_with_sgd_it_is_compressed_sgd(gloo: Gloo, workers: int) -> None:
    for rank, cases in enumerate(gloo(all_beside_compressed_sgd, workers)):
        for case, run in cases.items():
            for quantity in ("x", "e"):
                a, b = run[quantity]
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), (rank, case, quantity, (a - b).abs().max())
            ours, hooks = run["bytes"]
            flags = 0 if workers == 1 else STEPS * 8 * 2  # one number a step more in the dense part, for finiteness
            assert {k: v for k, v in hooks.items() if k != "dense"} == {k: v for k, v in ours.items() if k != "dense"}
            assert 0 <= hooks["dense"] - ours["dense"] <= flags, case
            assert run["steps"] == (0, STEPS)
            assert run["mu"][0] == pytest.approx(run["mu"][1], rel=1e-9), case


def by_bucket(compressor: ps.Compressor, decay: float) -> dict[str, Any]:
    """Buckets are compressed one by one: y moves as in SGD without compression, whatever the buckets are. The learning
    rate falls, which does not change the error memory, in units of a gradient."""
    model = wrapped(network(), SEVERAL)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    spec = ps.Compression(compressor, dense_below=100, decay=decay)
    hook = ps.register_ddp_hook(model, spec, noise=0.02, seed=5, optimizer=optimizer)
    sections = []
    for step, batch in enumerate(batches(12)):
        rate = optimizer.param_groups[0]["lr"] = 0.1 * 0.9**step
        y = vector(model) - rate * mean_memory(hook, model)
        expected = y - rate * (dense(model, batch) + noise_of(hook, model, seed=5))
        train(model, optimizer, [batch])
        sections.append(len(hook._slices))
        e = mean_memory(hook, model)
        assert torch.allclose(vector(model) - rate * e, expected, rtol=1e-9, atol=1e-12) or not decay
        assert bool(e.any()) == (decay > 0)
    return {"x": vector(model), "sections": sections}


def dense(model: DistributedDataParallel, batch: Tensor) -> Tensor:
    """The mean gradient at the model's present point, without DDP."""
    local = torch.autograd.grad(loss(model.module, batch), list(model.module.parameters()))
    return means([parameters_to_vector(local)])[0]


def mean_memory(hook: Any, model: DistributedDataParallel) -> Tensor:
    memory = hook.memory()
    return torch.cat([e.reshape(-1) for e in means([memory[name] for name, _ in model.module.named_parameters()])])


def noise_of(hook: Any, model: DistributedDataParallel, seed: int) -> Tensor:
    """xi_t in the order of the parameters: one draw for the whole vector, matrices first."""
    named = dict(model.module.named_parameters())
    order = sorted(named, key=lambda name: named[name].ndim < 2)
    like = torch.zeros(sum(p.numel() for p in named.values()), dtype=torch.float64)
    xi = ps.Noise(0.02).vector(like, seed=seed, step=hook.steps)
    assert xi is not None
    pieces = dict(zip(order, torch.split(xi, [named[name].numel() for name in order]), strict=True))
    return torch.cat([pieces[name] for name in named])


def test_nothing_is_lost_while_buckets_are_made_anew(gloo: Gloo) -> None:
    """With noise; by every kind of message in tests/feedback/engine/test_conservation.py."""
    first, second = gloo(by_bucket, 2, COMPRESSORS["TopK k"], 1.0)
    assert torch.equal(first["x"], second["x"])
    assert (first["sections"][0], first["sections"][-1]) == (1, 2)


def test_without_error_feedback_nothing_is_kept(gloo: Gloo) -> None:
    first, second = gloo(by_bucket, 2, ps.TopK(0.05), 0.0)
    assert torch.equal(first["x"], second["x"])


# An all-reduce, an all-gather, an all-to-all.
EXCHANGES = ("RandomK", "TopK", "two-way")
# With those, one of each other aggregator, private draws, and sizes that depend on the vector.
OTHERS = ("SharedTopK", "SketchTopK", "LowRank", "coordinator", "QSGD", "AdaptiveTopK")
BESIDE = (*EXCHANGES, *OTHERS)


def unlike_loops() -> str:
    other = torch_only() if torch.distributed.get_rank() else contextlib.nullcontext()
    with other, pytest.raises(ValueError, match="arithmetic") as raised:
        ps.register_ddp_hook(wrapped(network(torch.float32), SEVERAL), ps.TopK(0.1))
    return str(raised.value)


def test_workers_have_the_same_loops(gloo: Gloo) -> None:
    """Their sums of decoded messages differ in the last digit, and so would the replicas."""
    pytest.importorskip("numba")
    for message in gloo(unlike_loops, 2):
        assert "worker 0 has arithmetic='numba on cpu' and worker 1 has arithmetic='torch on cpu'" in message


def held_elsewhere() -> bool:
    """Return whether a hook of another `dense_below` has the error memory of the state that it loads."""
    hooks = []
    for below in (100, 0):
        model, spec = wrapped(network()), ps.Compression(ps.TopK(0.1), exchange="two-way", dense_below=below)
        hooks.append(ps.register_ddp_hook(model, spec, scope="model"))
        loss(model, batches(1)[0]).backward()
    hooks[1].load_state_dict(hooks[0].state_dict())
    before, after = (hook.memory() for hook in hooks)
    return before.keys() == after.keys() and all(torch.equal(after[name], e) for name, e in before.items())


def test_a_state_of_other_compressed_coordinates_keeps_all_of_the_error(gloo: Gloo) -> None:
    assert gloo(held_elsewhere, 2) == [True, True]


def accumulated() -> dict[str, Tensor]:
    """Accumulation gives what the whole batch gives; clipping acts on what was exchanged."""
    found = {}
    for kind in ("whole", "accumulated"):
        model = wrapped(network(), SEVERAL)
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        hook = ps.register_ddp_hook(model, ps.Compression(ps.TopK(0.05), dense_below=100))
        train(model, optimizer, batches(10), accumulate=kind == "accumulated", clip=0.01)
        assert hook.steps == 10
        assert repr(hook) == f"DDPHook(TopK(ratio=0.05), scope=bucket, workers={resolve(None).size}, steps=10)"
        assert math.isclose(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])), 0.01, rel_tol=1e-4)
        found[kind] = vector(model)
    return found


def test_accumulation_is_the_whole_batch(gloo: Gloo) -> None:
    for run in gloo(accumulated, 2):
        assert torch.allclose(run["whole"], run["accumulated"], rtol=1e-9, atol=1e-12)


class Tied(nn.Module):
    """Two linear maps with one weight, an embedding's, and one that takes part in every other batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes, self.last = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30)
        self.last.weight = self.first.weight
        self.used = True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + self.sometimes(h) if self.used else h
        out: Tensor = self.last(h)
        return out


def options_of_ddp() -> dict[str, tuple[Tensor, Tensor]]:
    """Identity behind DDP's options must give what DDP alone gives."""

    def trained(name: str, hooked: bool) -> Tensor:
        torch.manual_seed(0)
        model = wrapped(Tied().double(), SEVERAL, **{name: True})
        if hooked:
            ps.register_ddp_hook(model, ps.Identity())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step, batch in enumerate(batches(12)):
            model.module.used = name != "find_unused_parameters" or step % 2 == 0
            train(model, optimizer, [batch])
        return vector(model)

    names = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view")
    return {name: (trained(name, False), trained(name, True)) for name in names}


def test_options_of_ddp(gloo: Gloo) -> None:
    for run in gloo(options_of_ddp, 2):
        for name, (alone, hooked) in run.items():
            assert torch.allclose(alone, hooked, rtol=1e-12, atol=1e-14), name


def unused_in_turn(options: dict[str, Any], scope: str, by_one: bool) -> float:
    """How far y is from the sum of all updates if a branch is used every other step, or by one worker alone in two of
    three steps (`by_one`), and later frozen."""
    torch.manual_seed(0)
    views = options.pop("gradient_as_bucket_view", False)
    model = wrapped(Tied().double(), SEVERAL, find_unused_parameters=True, gradient_as_bucket_view=views)
    named = dict(model.module.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = ps.register_ddp_hook(model, **folded({"dense_below": 100, **options}), optimizer=optimizer, scope=scope)
    y, far, rate = {name: p.detach().clone() for name, p in named.items()}, 0.0, 0.1
    for step, batch in enumerate(batches(9)):
        model.module.used = step % 2 == 0 if not by_one else step % 3 == resolve(None).rank
        model.module.sometimes.weight.requires_grad_(step < 6)
        of = {name: p for name, p in named.items() if p.requires_grad}
        local = torch.autograd.grad(loss(model.module, batch), list(of.values()), materialize_grads=True)
        for name, g in zip(of, means(local), strict=True):
            y[name] -= rate * g
        train(model, optimizer, [batch])
        memory = hook.memory()
        for (name, p), e in zip(named.items(), means([memory[name] for name in named]), strict=True):
            far = max(far, float((p.detach() - rate * e - y[name]).abs().max()))
    return far


def means(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Means over workers, by one all-reduce."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    resolve(None).all_reduce(flat)
    pieces = torch.split(flat / resolve(None).size, [tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def unused_in_all_ways(ways: list[dict[str, Any]], scope: str) -> list[float]:
    return [unused_in_turn(dict(way), scope, by_one) for way in ways for by_one in (False, True)]


@pytest.mark.parametrize("scope", ["bucket", nightly("model")])
def test_no_update_of_a_parameter_is_lost_that_some_workers_do_not_use(gloo: Gloo, scope: str) -> None:
    """DDP discards the mean of a parameter that no worker used. Of one that some used, it delivers the others' C(0)
    too, which is not 0 with Sign. Other ways by turns."""
    ways = list(WAYS.values())[scope == "bucket" :: 2]
    ways += [{"compressor": ps.RandomK(0.2), "gradient_as_bucket_view": True}]
    ways += [{"compressor": ps.Sign(per_tensor=True)}]
    ways += [{"compressor": ps.Sign(), "exchange": "two-way"}]
    for run in gloo(unused_in_all_ways, 2, ways, scope):
        assert max(run) < 1e-12, run


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(9, 9), nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])

    def forward(self, x: Tensor, head: int) -> Tensor:
        out: Tensor = self.heads[head](torch.tanh(self.trunk(x)))
        return out


def passes_with_one_head_each(scope: Any, views: bool, by_one: bool) -> float:
    """How far the delivered gradients and the mean memory are from the sum of all mean gradients. Each of 9 steps has
    two backward passes, both exchanged. Each pass uses one head, and with `by_one` each worker another one."""
    torch.manual_seed(0)
    model = wrapped(Heads().double(), SEVERAL, find_unused_parameters=True, gradient_as_bucket_view=views)
    parameters = list(model.module.parameters())
    hook = ps.register_ddp_hook(model, ps.Compression(ps.TopK(0.1), dense_below=0), scope=scope)
    total, delivered = torch.zeros(2, parameters_to_vector(parameters).numel(), dtype=torch.float64)
    for batch in torch.randn(9, 5, 9, dtype=torch.float64) + resolve(None).rank:
        model.zero_grad()
        for i in range(2):
            head = (i + by_one * resolve(None).rank) % 2
            local = torch.autograd.grad(model.module(batch, head).square().sum(), parameters, materialize_grads=True)
            total += parameters_to_vector(means(local))
            model(batch, head).square().sum().backward()
        delivered += parameters_to_vector([p.grad for p in parameters if p.grad is not None])
    return float((total - delivered - mean_memory(hook, model)).abs().max() / total.abs().max())


def passes_with_one_head_each_in_all_ways() -> list[float]:
    ways = itertools.product(("bucket", "model"), (False, True), (False, True))
    return [passes_with_one_head_each(*way) for way in ways]


def test_no_update_is_lost_if_passes_before_a_step_use_other_parameters(gloo: Gloo) -> None:
    for run in gloo(passes_with_one_head_each_in_all_ways, 2):
        assert max(run) < 1e-12, run


def sixteen_bit() -> tuple[Tensor, Tensor]:
    """bfloat16 parameters: what a gradient cannot hold of the mean goes to the memory, so that y is exact."""
    model = wrapped(network(torch.bfloat16), SEVERAL)
    hook = ps.register_ddp_hook(model, ps.Compression(ps.RandomK(0.1), dense_below=100))
    total, delivered = torch.zeros(2, sum(p.numel() for p in model.parameters()))
    for batch in batches(10, torch.bfloat16):
        model.zero_grad()
        local = torch.autograd.grad(loss(model.module, batch), list(model.module.parameters()))
        total += torch.cat([g.reshape(-1).float() for g in local])
        loss(model, batch).backward()
        delivered += torch.cat([p.grad.reshape(-1).float() for p in model.parameters() if p.grad is not None])
    return means([total])[0], delivered + mean_memory(hook, model)


def test_sixteen_bit_gradients_lose_nothing(gloo: Gloo) -> None:
    for total, kept in gloo(sixteen_bit, 2):
        assert float((total - kept).abs().max()) < 1e-5 * float(total.abs().max())


def under_ddp() -> tuple[str, str]:
    """CompressedSGD on the parameters of a DistributedDataParallel over all workers, and within a machine of one."""
    said = []
    mine = [torch.distributed.new_group([rank]) for rank in range(2)][resolve(None).rank]
    for group in (None, mine):
        plain = network()
        optimizer = ps.CompressedSGD(plain.parameters(), 0.1)
        model = DistributedDataParallel(plain, process_group=group)
        loss(model, batches(1)[0]).backward()
        try:
            optimizer.step()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
        del model
    return said[0], said[1]


def test_compressed_sgd_after_an_uncompressed_exchange_is_refused(gloo: Gloo) -> None:
    for everywhere, within in gloo(under_ddp, 2):
        assert "a DistributedDataParallel has these parameters and sends every gradient uncompressed" in everywhere
        assert within == ""


def beside_local_updates(first: bool) -> None:
    """A step of LocalUpdates on a model with the hook, which is registered first or last."""
    model = wrapped(network(torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = ps.register_ddp_hook(model) if first else None
    ps.LocalUpdates(optimizer)
    hook = hook or ps.register_ddp_hook(model, optimizer=optimizer)
    loss(model, batches(1)[0].float()).backward()
    message = r"a hook of packsaddle exchanges them \(register_ddp_hook\), .*: use either the hook or LocalUpdates"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert hook.steps == 1


@pytest.mark.parametrize("first", [True, False])
def test_local_updates_under_the_hook_are_refused(first: bool, gloo: Gloo) -> None:
    gloo(beside_local_updates, 2, first)


# ---- gradients that are not finite


def behind_a_scaler(way: str, scope: Any, bad: float | None) -> tuple[Tensor, Tensor]:
    """x and e after 7 steps; at step 4 worker 1 has `bad` in one layer, and None leaves that step out."""
    model = wrapped(network(torch.float32), SEVERAL)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    spec = ps.Compression(**WAYS[way], dense_below=100)
    hook = ps.register_ddp_hook(model, spec, noise=0.01, scope=scope, scaler=scaler, optimizer=optimizer)
    factor = [1.0]
    model.module[2].weight.register_hook(lambda g: g * factor[0])  # in one of the buckets, not in the last
    for step, batch in enumerate(batches(7, torch.float32)):
        factor[0] = bad if bad is not None and step == 4 and resolve(None).rank == 1 else 1.0
        if bad is not None or step != 4:
            train(model, optimizer, [batch], scaler=scaler)
    assert (hook.steps, hook.skipped) == (6, int(bad is not None))
    assert scaler.get_scale() == (1024.0 if bad is None else 512.0)
    return vector(model), torch.cat([e.reshape(-1) for e in hook.memory().values()])


def with_and_without_a_bad_batch() -> dict[tuple[str, str], bool]:
    """True if x and e are equal. A NaN in one scope, an Inf in the other; without a scaler, and with every kind of
    message: tests/feedback/engine/test_invalid_steps.py."""
    cases = [(way, scope) for way in ("TopK", "LowRank", "two-way") for scope in ("bucket", "model")]
    values = (math.nan, math.inf, math.inf, math.nan, math.nan, math.inf)
    return {
        case: all(map(torch.equal, behind_a_scaler(*case, bad), behind_a_scaler(*case, None)))
        for case, bad in zip(cases, values, strict=True)
    }


def test_a_bad_batch_behind_a_scaler_leaves_no_trace(gloo: Gloo) -> None:
    for found in gloo(with_and_without_a_bad_batch, 2):
        assert len(found) == 6
        assert all(found.values()), found


def bad_step_of_an_unused_parameter() -> dict[str, Any]:
    """The last bucket begins with a parameter that no worker uses: DDP does not copy what the hook returns for it."""
    torch.manual_seed(0)
    model = wrapped(Tied(), SEVERAL, find_unused_parameters=True)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    hook = ps.register_ddp_hook(model, ps.TopK(0.1), scaler=scaler)
    model.module.used = False
    data = batches(3, torch.float32)
    train(model, optimizer, data[:2], scaler=scaler)
    before = vector(model)
    poison = data[2] * (math.nan if resolve(None).rank else 1.0)
    train(model, optimizer, [poison], scaler=scaler)
    return {"same": torch.equal(before, vector(model)), "scale": scaler.get_scale(), "skipped": hook.skipped}


def test_a_bad_step_is_skipped_with_unused_parameters_too(gloo: Gloo) -> None:
    for found in gloo(bad_step_of_an_unused_parameter, 2):
        assert found == {"same": True, "scale": 512.0, "skipped": 1}


def read_in_the_middle() -> float:
    """What is lost of the gradient by reading the hook in a backward pass."""
    model = wrapped(network(), SEVERAL)
    hook = ps.register_ddp_hook(model, ps.Compression(ps.TopK(0.05), dense_below=100))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.module[0].weight.register_hook(lambda g: None if hook.memory() else g.new_zeros(hook.steps))
    train(model, optimizer, batches(2))
    (batch,) = batches(1)
    y, g = vector(model) - 0.1 * mean_memory(hook, model), dense(model, batch)
    train(model, optimizer, [batch])
    return float((vector(model) - 0.1 * mean_memory(hook, model) - (y - 0.1 * g)).abs().max())


def test_reading_in_a_backward_pass_changes_nothing(gloo: Gloo) -> None:
    assert max(gloo(read_in_the_middle, 2)) < 1e-12


# ---- the noise schedule, warm-up, state


def warmed_up() -> list[int]:
    model = wrapped(network())
    spec = ps.Compression(lambda t: ps.RandomK(0.5 * 0.02 ** min(1.0, t / 10)), dense_below=100)
    hook = ps.register_ddp_hook(model, spec, start_step=2)
    train(model, torch.optim.SGD(model.parameters(), 0.1), batches(13))
    return [hook.ledger.at(t)["values"].payload // 8 for t in range(13)]


def test_warm_up_is_dense_then_a_falling_ratio(gloo: Gloo) -> None:
    d = 30 * 60 + 60 * 60 + 60 * 30
    sent = gloo(warmed_up, 1)[0]
    assert sent[:2] == [d, d]
    assert sent[10:] == [d // 100] * 3
    expected = [0.5 * (0.01 / 0.5) ** (t / 10) * d for t in range(2, 10)]
    assert all(abs(a - b) <= max(8, 0.1 * b) for a, b in zip(sent[2:10], expected, strict=True)), (sent, expected)


# ---- overlap, and what is refused


def overlapping() -> bool:
    """The first bucket's exchange waits for the gradient that comes last: a hook that blocks the pass never ends."""
    model = wrapped(network(), SEVERAL)
    hook = ps.register_ddp_hook(model, ps.Compression(ps.RandomK(0.1), dense_below=100))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, batches(2))  # DDP makes its buckets anew
    reached, original, waited = threading.Event(), hook.channel.group.all_reduce, []
    model.module[0].weight.register_hook(lambda g: reached.set())

    def all_reduce(tensor: Tensor) -> None:
        waited.append(reached.wait(30))
        original(tensor)

    hook.channel.group.all_reduce = all_reduce  # type: ignore[method-assign]
    train(model, optimizer, batches(1))
    return len(waited) == 2 and all(waited)


def test_exchanges_go_on_beside_the_backward_pass(gloo: Gloo) -> None:
    assert gloo(overlapping, 2) == [True, True]


def passed(model: nn.Module) -> None:
    loss(model, batches(1)[0]).backward()


def refusals() -> None:
    """Compression's own fields are in tests/sgd/test_sgd.py."""
    unlike = ps.RandomK(0.1 if resolve(None).rank else 0.2)
    plain: Any = network()
    added, second = wrapped(network()), wrapped(network())
    sparse = DistributedDataParallel(nn.Embedding(9, 4, sparse=True))
    ps.register_ddp_hook(second, ps.RandomK(0.1))
    ps.register_ddp_hook(added, ps.RandomK(0.1))
    ps.register_ddp_hook(sparse, ps.Compression(ps.RandomK(0.1), dense_below=0))
    passed(added)
    added.module.extra = nn.Parameter(torch.zeros(3))
    other: Any = torch.optim.SGD(network().parameters(), 0.1)
    frozen, unfrozen = wrapped(network()), network()
    next(frozen.module.parameters()).requires_grad_(False)
    next(unfrozen.parameters()).requires_grad_(False)
    unfrozen = wrapped(unfrozen)
    next(unfrozen.module.parameters()).requires_grad_(True)

    def made(**options: Any) -> Callable[[], object]:
        return lambda: ps.register_ddp_hook(wrapped(network()), **folded(options, ps.TopK(0.1)))

    calls: dict[str, Callable[[], object]] = {
        "function of the step that returns one, got 0.01": made(compressor=lambda step: 0.01),
        "made, as RandomK\\(0.01\\) or Sign\\(\\) is, got the class TopK itself": made(compressor=ps.TopK),
        "k of TopK must be at most d = 7200": made(compressor=ps.TopK(k=10**6)),
        'scope must be "bucket" or "model", got \'layer\'': made(scope="layer"),
        "start_step must be an integer of at least 0, got 1.5": made(start_step=1.5),
        "exchange must be one of .*got 'two-ways'": made(exchange="two-ways"),
        "scaler must be a torch.amp.GradScaler, got float": made(scaler=1024.0),
        "optimizer must have all parameters of the model, and lacks": made(optimizer=other),
        "the same arguments, but worker 0 has compressor=RandomK.* and worker 1 has": made(compressor=unlike),
        "already has a communication hook, .*; for another hook, wrap model.module in": lambda: ps.attach(second),
        "must be a DistributedDataParallel, got Sequential: wrap the model first": lambda: ps.register_ddp_hook(plain),
        r"exchanges 6 parameters, but 5 are trainable now": lambda: ps.register_ddp_hook(frozen),
        r"exchanges 5 parameters, but 6 are trainable now": lambda: ps.register_ddp_hook(unfrozen),
        "extra was added, replaced or unfrozen after DistributedDataParallel": lambda: passed(added),
        "has a sparse gradient, which is not supported": lambda: sparse(torch.tensor([1, 2])).sum().backward(),
    }
    for message, call in calls.items():
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()


def test_what_is_refused_and_how(gloo: Gloo) -> None:
    gloo(refusals, 2)


def attachments() -> None:
    compiled = torch.compile(wrapped(network()), backend="aot_eager")
    hook = ps.attach(compiled, ps.RandomK(0.1))
    assert hook is not None
    train(compiled, torch.optim.SGD(compiled.parameters(), 0.1), batches(3))
    assert hook.steps == 3
    past = wrapped(network())
    ps.register_ddp_hook(past, ps.RandomK(0.1))
    passed(past.module)  # a framework that runs the model itself
    with pytest.raises(RuntimeError, match="DistributedDataParallel never called the hook"):
        passed(past.module)
    anew = wrapped(past.module)
    again = ps.register_ddp_hook(anew, ps.RandomK(0.1))
    train(anew, torch.optim.SGD(anew.parameters(), 0.1), batches(2))
    assert again.steps == 2
    late, quiet = wrapped(network()), wrapped(network())
    hooks = [ps.register_ddp_hook(model, ps.RandomK(0.1)) for model in (late, quiet)]
    for _ in range(2):
        with late.no_sync():
            value = loss(late, batches(1)[0])
        value.backward()  # torch goes by the forward pass
        with quiet.no_sync():
            passed(quiet)
    for model in (late, quiet):
        passed(model)
    assert [hook.steps for hook in hooks] == [1, 1]
    with pytest.raises(TypeError, match="model must have one DistributedDataParallel in it, got Sequential with 0"):
        ps.attach(network(), ps.RandomK(0.1))


def test_attach_finds_the_model_and_notices_a_hook_that_is_never_called(gloo: Gloo) -> None:
    gloo(attachments, 2)


def test_attach_without_workers_has_nothing_to_do() -> None:
    assert ps.attach(network(), ps.RandomK(0.1)) is None


def test_a_worker_that_fails_ends_though_its_exchange_cannot(tmp_path: Path) -> None:
    """Its process must not wait for a collective that will not come about: a launcher would not see that it failed."""
    script = str(Path(__file__).parents[1] / "support" / "failing_worker.py")
    workers = [
        subprocess.Popen(
            [interpreter, script, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank, interpreter in enumerate((sys.executable, python()))
    ]
    try:
        _, error = workers[0].communicate(timeout=120)
        assert workers[0].returncode != 0
        assert "ValueError: this batch is bad" in error
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def broken_exchange() -> str:
    model = wrapped(network())
    hook = ps.register_ddp_hook(model, ps.RandomK(0.1))

    def all_reduce(tensor: Tensor) -> None:
        raise RuntimeError("connection closed by peer")

    hook.channel.group.all_reduce = all_reduce  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="connection closed by peer") as raised:
        passed(model)
    return str(raised.value)


def test_an_error_in_the_exchange_is_that_of_the_backward_pass(gloo: Gloo) -> None:
    for message in gloo(broken_exchange, 2):
        assert "cast" not in message


def one_failed_bucket() -> tuple[list[str], list[int], list[int], bool]:
    """The hook's second bucket of the third pass fails on all workers, and the loop goes on after it."""
    model = wrapped(network(), SEVERAL / 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = ps.register_ddp_hook(model, ps.Compression(ps.TopK(0.05), dense_below=0, monitor_every=0))
    attempt, calls = hook._exchange, [0] * 5  # in each pass
    steps: list[int] = []
    errors: list[str] = []

    def failing(*args: Any, **options: Any) -> Tensor:
        calls[len(steps)] += 1
        if hook._steps == 2 and len(hook._pass) == 1 and not errors:
            raise ValueError("a bucket's own error")
        return attempt(*args, **options)

    hook._exchange = failing  # type: ignore[method-assign]
    for batch in batches(5):
        kept = hook.memory()
        try:
            train(model, optimizer, [batch])
        except RuntimeError as error:
            errors.append(str(error))
            for thread in hook._background._threads:  # what is left of the pass
                thread.join()
        steps.append(hook.steps)
        if steps[-1] == 2 and errors:
            hook._settle(interrupted=True)
            unchanged = all(torch.equal(e, kept[name]) for name, e in hook.memory().items())
    return errors, steps, calls, unchanged


def test_a_pass_of_which_a_bucket_failed_is_not_taken(gloo: Gloo) -> None:
    for errors, steps, calls, unchanged in gloo(one_failed_bucket, 2):
        assert len(errors) == 1
        assert "a bucket's own error" in errors[0]
        assert steps == [1, 2, 2, 3, 4]
        assert calls[1:] == [3, 2, 3, 3]  # buckets after the one that failed are not exchanged
        assert unchanged
