"""Elastic workers that are sites of two processes, with DistributedDataParallel or FSDP2 inside."""

import contextlib
import importlib.util
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from elastic_fakes import FakeGroup, FakeManager
from elastic_sites import Run
from nightly import thinned
from test_elastic_workers import crew, ended, reached, rounds
from test_sites import INSIDE, WHOLE, Training, batches, place
from torch import Tensor, nn

from packsaddle import Compression, Elastic, LocalUpdates, OuterSGD, TopK
from packsaddle.comm import Solo
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.comm.group import TorchGroup

Gloo = Callable[..., list[Any]]
needs_torchft = pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed")


# Simulated sites: threads that are killed, lose connections, and come back.


@pytest.mark.parametrize("seed", thinned(range(2), 2))
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("exchange", ["direct", "two-way"])
def test_nothing_is_lost_by_sites_that_come_and_go(
    exchange: str, sharded: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each round the anchor moves by the mean of what the processes there have sent, by their own accounts. In a
    two-way exchange an owner may be killed at any of its collectives."""
    from lab.bench.elastic import account

    monkeypatch.setattr("packsaddle.local.elastic.workers._PAUSE", 0.0)
    run = Run(seed, sharded=sharded, exchange=exchange)
    run.all(3)
    found = account(run.logs)
    assert found["wrong"] == []
    assert found["accounted"] >= 10
    if not sharded:  # all processes have one model
        anchors = {(line["history"], line["hash"]) for lines in run.logs for line in lines}
        assert len(anchors) == len({history for history, _ in anchors})


# Real processes, models and optimizers; votes that need no torchft.


class Site(Training):
    """One process's part of a site whose workers may come and go; `mesh` is that of all processes, to compare with."""

    def __init__(
        self, inside: str, broken: tuple[int, ...] = (), settings: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.mesh = mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sites", "site"))  # type: ignore[attr-defined]
        within = TorchGroup(mesh["site"].get_group())
        self.manager = FakeManager(TorchGroup(mesh["sites"].get_group()), site=within)
        elastic = Elastic(
            self.manager, group=FakeGroup(self.manager, broken), leave_on_sigterm=False, **(settings or {})
        )
        super().__init__(mesh, inside, workers=elastic, **options)


def elastic_and_fixed(inside: str, broken: tuple[int, ...], options: dict[str, Any]) -> tuple[list[Tensor], ...]:
    """Return the parameters and what is pending of a site in an elastic run, and of one of fixed workers; a collective
    of the second process of both elastic sites may break, after it was carried out."""
    (site, mine), every = place(), Compression(TopK(0.3, values="int8"), "direct", dense_below=4, compare_every=1)
    options = {"compressor": every} | options
    settings = {"clip": options.pop("clip", None)}
    ours = Site(inside, broken if mine else (), settings, **options)
    fixed = Training(ours.mesh, inside, **options, **settings)
    ours.local.join()
    for pair in batches(site, 13):
        for each in (ours, fixed):
            each.step(pair[mine])
    return [*ours.whole(), ours.local.pending()], [*fixed.whole(), fixed.local.pending()]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "Nesterov outside, clipped": {"outer": OuterSGD(), "clip": 1.0},
    "agreement": {"agreement": 0.5},
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", OPTIONS)
def test_they_are_fixed_sites_bit_for_bit(gloo: Gloo, inside: str, name: str) -> None:
    """Also if one process of a site is in a collective that fails: all roll back, and repeat the round."""
    for ours, fixed in gloo(elastic_and_fixed, 4, inside, (3, 9, 16), OPTIONS[name]):
        assert all(map(torch.equal, ours, fixed))


def joined(inside: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    """The first site trains alone; then the second joins, whose processes receive states of, say, different sites."""
    ours, (site, mine) = Site(inside), place()
    lane, ours.manager.group = ours.manager.group, Solo()
    if site == 0:
        ours.local.join()
        for pair in batches(0, 5):
            ours.step(pair[mine])
    state = ObjectCollectives(lane, torch.device("cpu")).send(ours.manager.save(), 0)
    ours.manager.group = lane
    if site == 0:
        ours.local.flush()
    else:
        state["steps"] += mine
        for moments in state["inner"][0]["state"].values() if inside == "DDP" and mine else ():
            moments["exp_avg"].add_(1.0)
        ours.manager.before_quorum = lambda: ours.manager.load(state)
        ours.local.join()
    moments = [ours.optimizer.state[p]["exp_avg"] for p in ours.model.parameters()]
    full = [getattr(m, "full_tensor", m.clone)() for m in moments]
    return ours.whole(), list(ours.local.anchor().values()), full, ours.local.steps


@pytest.mark.parametrize("inside", INSIDE)
def test_all_processes_of_a_site_that_joins_have_one_model_and_optimizer(gloo: Gloo, inside: str) -> None:
    found = gloo(joined, 4, inside)
    (first, _, theirs, steps), *_ = found
    for parameters, _, moments, counted in found:
        assert all(map(torch.equal, parameters, first))
        assert all(map(torch.equal, moments, theirs))
        assert counted == steps == 5
    for process in (0, 1):
        assert all(map(torch.equal, found[process][1], found[2 + process][1]))


def refused(inside: str) -> list[str]:
    """Return the errors of a model of which one parameter is not sharded, and of managers that do not fit."""
    errors: list[str] = []
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sites", "site"))  # type: ignore[attr-defined]

    def caught(work: Callable[[], object]) -> None:
        try:
            work()
        except ValueError as error:
            errors.append(str(error))

    def mixed() -> None:
        site = Site(inside)
        whole = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = torch.optim.SGD([*site.model.parameters(), whole], lr=0.1)
        elastic = Elastic(site.manager, group=FakeGroup(site.manager), leave_on_sigterm=False)
        LocalUpdates(optimizer, WHOLE, workers=elastic)

    caught(mixed)
    single = FakeManager(TorchGroup(mesh["sites"].get_group()))
    elastic = Elastic(single, group=FakeGroup(single), leave_on_sigterm=False)
    optimizer = torch.optim.SGD(Site(inside).model.parameters(), lr=0.1)
    caught(lambda: LocalUpdates(optimizer, WHOLE, workers=elastic))
    manager = FakeManager(Solo())
    manager._group_world_size, manager._init_sync = 2, True  # type: ignore[attr-defined]
    caught(lambda: Elastic(manager))
    return errors


def test_what_does_not_fit_is_refused(gloo: Gloo) -> None:
    for mixed, single, synced in gloo(refused, 4, "FSDP2"):
        assert "parameters must all be sharded in a site with a manager, or none" in mixed
        assert "parameters must be whole on each worker with a manager of one process" in single
        assert "manager of a site must have init_sync=False" in synced


# Sites under torchft.


def as_fixed(inside: str, rounds: int) -> list[str]:
    """Return digests of the anchor after each round of fixed sites, with the model and data of the benchmark."""
    from lab.bench import elastic

    mesh, (site, process) = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sites", "site")), place()  # type: ignore[attr-defined]
    model = elastic.inside(elastic.network(), inside, mesh["site"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    local, found = LocalUpdates(optimizer, elastic.compression(), every=4, workers=mesh), []
    for step in range(4 * rounds):
        x, y = elastic.batch(0, f"w{site} 0 {process}", step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if local.exchanging:
            found.append(elastic.digest(elastic.flat(list(local.anchor().values()))))
    return found


@needs_torchft
@pytest.mark.process
@pytest.mark.parametrize("inside", INSIDE)
def test_sites_under_torchft_are_fixed_sites_bit_for_bit(gloo: Gloo, inside: str, tmp_path: Path) -> None:
    expected = gloo(as_fixed, 4, inside, 4)
    with crew(tmp_path, 2, least=2, inside=inside, rounds=4, until=None) as (benchmark, workers):
        assert benchmark._until(lambda: not workers.alive(), 90), workers.read()
        logs = workers.read()
    for digests, log in zip(expected, logs, strict=True):
        assert [line["hash"] for line in rounds(log)[:4]] == digests


@needs_torchft
@pytest.mark.process
@pytest.mark.parametrize("inside", INSIDE)
def test_a_site_that_loses_a_process_comes_back(inside: str, tmp_path: Path) -> None:
    """torchrun ends the other process, and starts the site again: it joins as a new one, and the others have not
    waited."""
    with crew(tmp_path, 2, inside=inside) as (benchmark, workers):
        reached(benchmark, workers, 2, 2)
        workers.signal("w1.1", signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            workers.signal("w1.0", signal.SIGKILL)
        for name in ("w1.0", "w1.1"):
            workers.processes[name].join(20)
        reached(benchmark, workers, 0, 2)
        workers.start("w1")
        reached(benchmark, workers, 4, 2)
        logs = ended(benchmark, workers)
    for process in (0, 1):
        assert not any(logs[4 + process][0]["pending"])
        final = {rounds(logs[i])[-1]["hash"] for i in (process, 4 + process)}
        assert len(final) == 1


@needs_torchft
@pytest.mark.process
@pytest.mark.parametrize(("grace", "code"), [(60.0, 0), (1.0, 1)])
def test_a_site_leaves_while_it_waits_for_others(grace: float, code: int, tmp_path: Path) -> None:
    """Its processes, which cannot agree on it there, leave after the round, or at the end of their grace."""
    with crew(tmp_path, 1, inside="DDP", grace=grace) as (benchmark, workers):
        workers.start("w1", step=1.0)
        reached(benchmark, workers, 0, 1)
        time.sleep(1.0)  # in which it has done its steps, and the other not its first
        for process in (0, 1):
            workers.signal(f"w0.{process}", signal.SIGTERM)
        for process in (0, 1):
            workers.processes[f"w0.{process}"].join(60)
        logs = workers.read()
    assert [(lines[-1]["event"], lines[-1]["code"]) for lines in logs[:2]] == [("left", code)] * 2
