"""Workers with different numbers of steps, by torch's `Join`: against the naive twin, in real processes."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from elastic_fakes import FakeGroup, FakeManager
from forked_python import environment, python
from local_updates import Case, Twin, flat, made
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from packsaddle import (
    QSGD,
    Compression,
    Elastic,
    Escape,
    Identity,
    LocalUpdates,
    RandomK,
    Sign,
    TopK,
    Workers,
    simulate,
)
from packsaddle.comm import Solo

Gloo = Callable[..., list[Any]]
Found = tuple[Tensor, dict[str, Tensor], int, int]
ENDS = (10, 13, 6)
CASES = [
    Case(every=3, compressor=TopK(0.1), steps=13),
    Case(every=3, compressor=TopK(0.1), keep_unsent=True, steps=13),
    Case(every=1, compressor=QSGD(), steps=13),
    Case(
        every=4, compressor=RandomK(0.2), fragments=2, delay=1, outer="nesterov", noise=0.01, keep_unsent=True, steps=13
    ),
    Case(every=3, compressor=Sign(), fragments=3, delay=2, decay=0.9, steps=13),
    Case(every=3, compressor=Sign(), keep_unsent=True, bad={10: 0}, steps=13),  # of an ended worker's last local update
    Case(every=8, compressor=TopK(0.2), keep_unsent=True, steps=13),
]


def ended(cases: list[Case], ends: tuple[int, ...]) -> list[Found]:
    """Train as this worker in each case; return x, the anchor, and the numbers of steps and rounds."""
    worker, found = dist.get_rank(), []
    for case in cases:
        training, local = made(case)
        with Join([local]):
            for n in range(1, ends[worker] + 1):
                training.step(n, worker)
        found.append((flat(training.parameters), local.anchor(), local.steps, local.rounds))
    return found


@pytest.mark.parametrize("workers", [2, 3])
def test_equal_to_the_twin(workers: int, gloo: Gloo) -> None:
    """Which goes on with zero updates of the workers that have ended; all anchors are bitwise identical."""
    found = gloo(ended, workers, CASES, ENDS)
    for i, case in enumerate(CASES):
        twin = Twin(case, workers)
        twin.run(ENDS)
        for worker in range(workers):
            x, anchor, steps, rounds = found[worker][i]
            torch.testing.assert_close(x, twin.x[worker], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(flat(anchor), twin.a, rtol=1e-9, atol=1e-11)
            for name, a in anchor.items():
                assert torch.equal(a, found[0][i][1][name])
            assert (steps, rounds) == (13, found[0][i][3])


def test_a_worker_without_data(gloo: Gloo) -> None:
    """It takes part from the first step's check on."""
    case = CASES[0]
    for (found,) in gloo(ended, 2, [case], (0, 13)):
        twin = Twin(case, 2)
        twin.run((0, 13))
        torch.testing.assert_close(flat(found[1]), twin.a, rtol=1e-9, atol=1e-11)


PACED = [
    Case(every=4, compressor=TopK(0.1), weight="steps", paces=(6, 2, 1), keep_unsent=True, steps=16),
    Case(every=4, compressor=RandomK(0.2), fragments=2, delay=1, weight="steps", paces=(3, 7, 2), steps=16),
]


@pytest.mark.parametrize("ends", [(24, 3, 0), (3, 28, 8)])
def test_paces(ends: tuple[int, ...], gloo: Gloo) -> None:
    """Of workers that end in the middle of a round, one of them without a step; the first or the second is the last."""
    case = PACED[ends[0] == 3]
    found = gloo(ended, 3, [case], ends)
    twin = Twin(case, 3)
    twin.run(ends)
    for ((x, anchor, _, rounds),), expected in zip(found, twin.x, strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(flat(anchor), twin.a, rtol=1e-9, atol=1e-11)
        assert torch.equal(flat(anchor), flat(found[0][0][1]))
        assert rounds == found[0][0][3] > 0


def test_sampled_workers(gloo: Gloo) -> None:
    """With a sample of the workers in each round, anchors are bitwise identical too."""
    found = gloo(ended, 3, [replace(case, sample=0.5) for case in CASES[:2]], ENDS)
    for worker in found:
        for (_, anchor, steps, rounds), (_, first, _, _) in zip(worker, found[0], strict=True):
            assert (steps, rounds) == (13, 4)
            assert all(torch.equal(a, first[name]) for name, a in anchor.items())


def escaping() -> tuple[Tensor, list[Any], int]:
    """Noise leaves the saddle x[0]^2 - x[1]^2 of the objective, on the axis of negative curvature."""
    x = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    optimizer = torch.optim.SGD([x], lr=0.1)
    escape = Escape(20, 0.5, lambda: float((signs * x.detach() ** 2).sum()))
    kind = Compression(TopK(0.5), dense_below=0)
    local = LocalUpdates(optimizer, kind, every=1, noise=0.05, escape=escape, keep_unsent=False)
    rng = torch.Generator().manual_seed(dist.get_rank())
    with Join([local]):
        for _ in range((15, 40)[dist.get_rank()]):
            x.grad = 2 * signs * x.detach() + 0.1 * torch.randn(2, 1, generator=rng, dtype=torch.float64)
            optimizer.step()
    return x.detach().clone(), local.resets, local.steps


def test_the_escape_check(gloo: Gloo) -> None:
    """It fires on the ended worker as on the other, and both have one x."""
    (x, resets, steps), (x2, resets2, steps2) = gloo(escaping, 2)
    assert steps == steps2 == 40
    assert torch.equal(x, x2)
    assert resets == resets2
    assert any(reset.step >= 15 for reset in resets)


def epochs(delay: int, weighted: bool) -> tuple[Tensor, Tensor, int]:
    """Two epochs, of 10 and 13 and of 9 and 5 steps, then a flush; x, and x_0 plus the mean change of the workers."""
    worker = dist.get_rank()
    weight = (1.0, 3.0) if weighted else None
    training, local = made(Case(4, TopK(0.1), delay=delay, keep_unsent=True, inner="sgd", weight=weight))
    start = flat(training.parameters)
    for steps in ((10, 13), (9, 5)):
        with Join([local]):
            for n in range(1, steps[worker] + 1):
                training.step(n, worker)
    dist.all_reduce(training.moved.mul_((0.25, 0.75)[worker] if weighted else 0.5))
    assert local.flush(Identity())
    return flat(training.parameters), start - training.moved, local.steps


@pytest.mark.parametrize(("delay", "weighted"), [(0, False), (2, False), (0, True)])
def test_epochs_and_flush(delay: int, weighted: bool, gloo: Gloo) -> None:
    """The next epoch begins at one step on all workers, and no change of any worker is lost."""
    found = gloo(epochs, 2, delay, weighted)
    for x, expected, steps in found:
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-11)
        assert torch.equal(x, found[0][0])
        assert steps == 13 + 9


def clipped() -> list[float]:
    """Worker 1 ends after 16 of 64 steps, each of which moves all coordinates of x by about 1."""
    worker, rng = dist.get_rank(), torch.Generator().manual_seed(dist.get_rank())
    x = nn.Parameter(torch.zeros(64, 64))
    optimizer = torch.optim.SGD([x], lr=1.0)
    local = LocalUpdates(optimizer, Compression(Identity(), "direct"), every=4, workers=Workers(clip=2.0))
    means = []
    with Join([local]):
        for _ in range((64, 16)[worker]):
            x.grad = torch.randn(64, 64, generator=rng) * 0.1 - 1
            optimizer.step()
            means.append(float(local.anchor()["parameter 0"].mean()))
    local.flush()
    return [means[15], means[-1], float(x.mean())]


def test_workers_that_have_ended_do_not_limit_the_others(gloo: Gloo) -> None:
    """Their norms, 0, are not in the median to which `clip` compares."""
    first, _ = gloo(clipped, 2)
    assert first == pytest.approx([16.0, 40.0, 40.0], abs=0.2)


def call_inside(call: str) -> str:
    """Worker 0 has ended after 10 steps when worker 1 calls a collective function within `Join`."""
    worker = dist.get_rank()
    case = Case(every=4, compressor=TopK(0.1))
    training, local = made(case)
    try:
        with Join([local]):
            for n in range(1, 11 + worker):
                training.step(n, worker)
            if worker:
                getattr(local, call)(*[[training.parameters["w"].detach()]] * (call == "average"))
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("call", ["flush", "error", "average"])
def test_other_collectives_inside(call: str, gloo: Gloo) -> None:
    for said in gloo(call_inside, 2, call):
        assert f"worker 0 exchanges a round after step 12, and worker 1 calls {call}() after step 11" in said


def on_early_termination() -> str:
    case = Case(every=4, compressor=TopK(0.1))
    training, local = made(case)
    try:
        with Join([local], throw_on_early_termination=True):
            for n in range(1, 10 + 3 * dist.get_rank()):
                training.step(n, dist.get_rank())
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_throw_on_early_termination(gloo: Gloo) -> None:
    """Of torch's engine: all workers raise."""
    first, second = gloo(on_early_termination, 2)
    assert "Rank 0 exhausted all inputs" in first
    assert "Detected at least one rank that exhausted inputs" in second


def on_sites() -> tuple[list[Tensor], list[Tensor], int]:
    """Two sites of two processes, with 10 and 13 steps; DistributedDataParallel within the site."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sites", "site"))  # type: ignore[attr-defined]
    kind = Compression(TopK(0.2), dense_below=1)
    torch.manual_seed(0)
    model, alone = (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double() for _ in range(2))
    alone.load_state_dict(model.state_dict())
    wrapped = DistributedDataParallel(model, process_group=mesh.get_group(1))
    optimizer, inner = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, alone))
    local = LocalUpdates(optimizer, every=3, compressor=kind, workers=mesh)
    # The twin: process 0 of each site, with both processes' batches.
    leaders = dist.new_group([0, 2], use_local_synchronization=True) if dist.get_rank() % 2 == 0 else None
    other = LocalUpdates(inner, every=3, compressor=kind, workers=leaders or Solo())
    rngs = [torch.Generator().manual_seed(dist.get_rank() // 2 * 2 + i) for i in range(2)]
    steps = 10 + 3 * mesh.get_local_rank(0)
    batches = [[torch.randn(4, 6, generator=r, dtype=torch.float64) for r in rngs] for _ in range(steps)]
    with Join([local]):
        for pair in batches:
            optimizer.zero_grad()
            wrapped(pair[dist.get_rank() % 2]).square().mean().backward()
            optimizer.step()
    if leaders is not None:
        with Join([other]):
            for pair in batches:
                inner.zero_grad()
                (sum(alone(batch).square().mean() for batch in pair) / 2).backward()  # type: ignore[union-attr]
                inner.step()
    ours, theirs = ([p.detach() for p in m.parameters()] for m in (model, alone))
    return ours, theirs, local.steps


def test_sites_with_ddp(gloo: Gloo) -> None:
    """All processes of a site end at one step, and its DistributedDataParallel goes on as without `Join`."""
    found = gloo(on_sites, 4)
    for rank, (ours, alone, steps) in enumerate(found):
        assert steps == 13
        for a, b, c in zip(ours, found[rank // 2 * 2][0], alone, strict=True):
            assert torch.equal(a, b)
            if rank % 2 == 0:
                torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)


def two_joined() -> str:
    case = Case(every=3, compressor=TopK(0.1))
    training, local = made(case)
    _, other = made(case)
    with pytest.raises(RuntimeError) as caught, Join([other, local]):
        training.step(1, dist.get_rank())
    return str(caught.value)


def test_usage_errors(gloo: Gloo) -> None:
    for said in gloo(two_joined, 2):
        assert "Join must have one LocalUpdates and nothing else" in said
    manager = FakeManager(Solo())
    elastic = Elastic(manager, group=FakeGroup(manager))
    local = LocalUpdates(torch.optim.SGD([nn.Parameter(torch.ones(40, 50))]), workers=elastic)
    with pytest.raises(RuntimeError, match="with a manager, a worker that has ended calls leave"):
        Join([local])
    with pytest.raises(RuntimeError, match="call init_process_group before LocalUpdates"):
        simulate(lambda worker: Join([made(CASES[0])[1]]), 2)


def by_actives() -> None:
    Join([made(CASES[0])[1]], divide_by_initial_world_size=False)


def test_the_mean_is_of_all_workers(gloo: Gloo) -> None:
    with pytest.raises(AssertionError, match="divide_by_initial_world_size must be True"):
        gloo(by_actives, 1)


EXITS = """
import sys
import torch
import torch.distributed as dist
from packsaddle import LocalUpdates

rank, alone = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
x = torch.nn.Parameter(torch.zeros(40, 50))
optimizer = torch.optim.SGD([x], lr=0.1)
if rank or alone != "LocalUpdates":
    local = LocalUpdates(optimizer, every=4)
rng = torch.Generator().manual_seed(rank)
for _ in range(10 + 3 * rank * (alone == "exchanges a round")):
    x.grad = torch.randn(x.shape, generator=rng)
    optimizer.step()
if rank and alone == "calls flush()":
    local.flush()
"""


@pytest.mark.parametrize("alone", ["exchanges a round", "calls flush()", "LocalUpdates"])
def test_a_worker_that_has_exited(alone: str, tmp_path: Path) -> None:
    """Worker 1 makes more steps, a call or the LocalUpdates alone: it names the other, its own step, and remedies."""
    found = [
        subprocess.Popen(
            [python(), "-c", EXITS, str(rank), str(tmp_path / "store"), alone],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100)[1] for process in found]
    assert [process.returncode for process in found] == [0, 1]
    last = said[1].strip().splitlines()[-1]
    assert "PeerLostError: rank 1 of 2 lost rank 0" in last
    if alone == "LocalUpdates":
        assert last.endswith("It waited in LocalUpdates(...), which every worker must call")
        return
    step = 12 if alone == "exchanges a round" else 10
    assert f"It was when worker 1 {alone} after step {step}. If worker 1 alone made this call" in last
    assert "if the others ended after fewer steps, train within torch's Join([local])" in last
