"""Workers with different numbers of steps, by torch's `Join`: against the naive twin, in real processes."""

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from elastic_fakes import FakeGroup, FakeManager
from forked_python import environment, python
from local_updates import Case, Training, Twin, flat, made
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


def check(found: list[list[Found]], case: Case, ends: tuple[int, ...], i: int = 0) -> None:
    """Compare all workers' results of case i with the twin, which goes on with zero updates of those that ended."""
    twin = Twin(case, len(ends))
    twin.run(ends)
    for rows, expected in zip(found, twin.x, strict=True):
        x, anchor, steps, rounds = rows[i]
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(flat(anchor), twin.a, rtol=1e-9, atol=1e-11)
        assert torch.equal(flat(anchor), flat(found[0][i][1]))
        assert rounds == found[0][i][3] > 0
        assert steps == 13 or case.paces


def test_equal_to_the_twin(gloo: Gloo) -> None:
    found = gloo(ended, 3, CASES, ENDS)
    for i, case in enumerate(CASES):
        check(found, case, ENDS, i)


def test_a_worker_without_data(gloo: Gloo) -> None:
    """It takes part from the first step's check on."""
    check(gloo(ended, 2, CASES[:1], (0, 13)), CASES[0], (0, 13))


PACED = [
    Case(every=4, compressor=TopK(0.1), weight="steps", paces=(6, 2, 1), keep_unsent=True, steps=16),
    Case(every=4, compressor=RandomK(0.2), fragments=2, delay=1, weight="steps", paces=(3, 7, 2), steps=16),
]


@pytest.mark.parametrize(("case", "ends"), [(PACED[0], (24, 3, 0)), (PACED[1], (3, 28, 8))])
def test_paces(case: Case, ends: tuple[int, ...], gloo: Gloo) -> None:
    """Of workers that end in the middle of a round, one of them without a step; the first or the second is the last."""
    check(gloo(ended, 3, [case], ends), case, ends)


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


def paced_epochs(resumes: bool) -> tuple[Tensor, Tensor, int]:
    """Two epochs with paces; worker 0 ends the first, and worker 1 the second. With `resumes`, each is its own run."""
    worker = dist.get_rank()
    case = Case(4, TopK(0.1), keep_unsent=True, inner="sgd", weight="steps", paces=(5, 3))
    training, local = made(case)
    for steps in ((9, 8), (14, 5)):
        with Join([local]):
            for n in range(1, steps[worker] + 1):
                training.step(n, worker)
        if resumes:
            model, state = training.model.state_dict(), local.state_dict()
            training, local = made(case)
            training.model.load_state_dict(model)
            local.load_state_dict(state)
    return flat(training.parameters), flat(local.anchor()), local.rounds


def test_an_ended_worker_has_its_pace_after_a_checkpoint(gloo: Gloo) -> None:
    straight, resumed = (gloo(paced_epochs, 2, resumes) for resumes in (False, True))
    for (x, anchor, rounds), (x2, anchor2, rounds2) in zip(straight, resumed, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(anchor, anchor2)
        assert rounds == rounds2 == straight[0][2]


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


# ---- mistakes


def call_inside(call: str, training: Training, local: LocalUpdates, worker: int) -> None:
    """Worker 0 has ended after 10 steps when worker 1 calls a collective function within `Join`."""
    with Join([local]):
        for n in range(1, 11 + worker):
            training.step(n, worker)
        if worker:
            getattr(local, call)(*[[training.parameters["w"].detach()]] * (call == "average"))


def throw_early(training: Training, local: LocalUpdates, worker: int) -> None:
    with Join([local], throw_on_early_termination=True):
        for n in range(1, 10 + 3 * worker):
            training.step(n, worker)


def join_two(training: Training, local: LocalUpdates, worker: int) -> None:
    with Join([made(CASES[0])[1], local]):
        training.step(1, worker)


INSIDE = "worker 0 exchanges a round after step 12, and worker 1 calls {}() after step 11"
MISTAKES: dict[str, tuple[Callable[[Training, LocalUpdates, int], None], list[str]]] = {
    **{call: (partial(call_inside, call), [INSIDE.format(call)] * 2) for call in ("flush", "error", "average")},
    "early termination": (  # of torch's engine
        throw_early,
        ["Rank 0 exhausted all inputs", "Detected at least one rank that exhausted inputs"],
    ),
    "two": (join_two, ["Join must have one LocalUpdates and nothing else"] * 2),
    "mean": (
        lambda training, local, worker: Join([local], divide_by_initial_world_size=False),  # type: ignore[dict-item,return-value]
        ["divide_by_initial_world_size must be True"] * 2,
    ),
}


def message(name: str) -> str:
    worker = dist.get_rank()
    training, local = made(Case(every=4, compressor=TopK(0.1)))
    with pytest.raises((RuntimeError, ValueError)) as caught:
        MISTAKES[name][0](training, local, worker)
    return str(caught.value)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_to_all_workers(name: str, gloo: Gloo) -> None:
    for found, expected in zip(gloo(message, 2, name), MISTAKES[name][1], strict=True):
        assert expected in found


def test_workers_that_cannot_join() -> None:
    manager = FakeManager(Solo())
    elastic = Elastic(manager, group=FakeGroup(manager))
    local = LocalUpdates(torch.optim.SGD([nn.Parameter(torch.ones(40, 50))]), workers=elastic)
    with pytest.raises(RuntimeError, match="with a manager, a worker that has ended calls leave"):
        Join([local])
    with pytest.raises(RuntimeError, match="call init_process_group before LocalUpdates"):
        simulate(lambda worker: Join([made(CASES[0])[1]]), 2)


# ---- sites, and workers that have exited


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
for _ in range(10 + 3 * rank):
    x.grad = torch.randn(x.shape, generator=rng)
    optimizer.step()
"""


@pytest.mark.parametrize("alone", ["exchanges a round", "LocalUpdates"])
def test_a_worker_that_has_exited(alone: str, tmp_path: Path) -> None:
    """Worker 1 makes more steps, or the LocalUpdates alone: it names the other, its own step, and remedies."""
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
    assert "It was when worker 1 exchanges a round after step 12. If worker 1 alone made this call" in last
    assert "if the others ended after fewer steps, train within torch's Join([local])" in last
