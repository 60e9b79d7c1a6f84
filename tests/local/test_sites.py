"""Local updates of sites: two workers of two processes each, that share a model by DistributedDataParallel or FSDP2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nightly import thinned
from specs import local_options
from torch import Tensor, nn

from packsaddle import Compression, Identity, LocalUpdates, Sign, TopK, load_checkpoint, save_checkpoint
from packsaddle.comm import Solo
from packsaddle.comm.sharding import local_part
from packsaddle.comm.sites import DeviceMesh, SiteGroup, group_of_workers

Gloo = Callable[..., list[Any]]
INSIDE = ("DDP", "FSDP2")
WHOLE = Compression(Identity(), dense_below=0)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()


def two_by_two() -> DeviceMesh:
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sites", "site"))  # type: ignore[attr-defined,no-any-return]


class Training:
    """One process's part of the training of a site's model."""

    def __init__(self, mesh: DeviceMesh, inside: str, **options: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        self.called = self.model = network()
        if inside == "FSDP2":
            for layer in (self.model[0], self.model[2], self.model):
                fully_shard(layer, mesh=mesh["site"])
        else:
            self.called = nn.parallel.DistributedDataParallel(self.model, process_group=mesh["site"].get_group())  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        options = {"compressor": WHOLE, "every": 3} | ({} if "workers" in options else {"group": mesh}) | options
        self.local = LocalUpdates(self.optimizer, model=self.model, warn_own_state=False, **local_options(**options))

    def backward(self, batch: Tensor) -> None:
        self.optimizer.zero_grad()
        self.called(batch).square().mean().backward()

    def step(self, batch: Tensor) -> None:
        self.backward(batch)
        self.optimizer.step()

    def whole(self) -> list[Tensor]:
        return [getattr(p, "full_tensor", p.detach)().detach().clone() for p in self.model.parameters()]


def batches(site: int, steps: int) -> list[list[Tensor]]:
    """Return the batches of both processes of a site; the second site's have larger numbers."""
    rng = torch.Generator().manual_seed(site)
    return [[(1 + 2 * site) * torch.randn(4, 6, generator=rng).double() for _ in range(2)] for _ in range(steps)]


def place() -> tuple[int, int]:
    return divmod(dist.get_rank(), 2)


def trained(inside: str, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[int], int]:
    """Return the parameters of a site and of its twin, one process with both processes' batches, and bytes of both."""
    ours, (site, process) = Training(two_by_two(), inside, **options), place()
    leaders = dist.new_group([0, 2], use_local_synchronization=True) if process == 0 else None
    alone = network()
    inner = torch.optim.AdamW(alone.parameters(), lr=0.05)
    given = local_options(**{"compressor": WHOLE, "every": 3, "group": leaders or Solo()} | options)
    twin = LocalUpdates(inner, **given)
    for pair in batches(site, 11):
        ours.step(pair[process])
        inner.zero_grad()
        (sum(alone(batch).square().mean() for batch in pair) / 2).backward()  # type: ignore[union-attr]
        inner.step()
    ours.local.wait()
    twin.wait()
    sent = [sum(b.sent for name, b in each.ledger.by_purpose.items() if name != "start") for each in (ours.local, twin)]
    return ours.whole(), [p.detach() for p in alone.parameters()], sent, ours.local.rounds


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip": 1.0},
    "agreement": {"agreement": 0.5},
    "delay": {"delay": 2, "weight": 2.0},
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", thinned([*OPTIONS, "TopK"], 2))
def test_a_site_is_a_worker(gloo: Gloo, inside: str, name: str) -> None:
    """Norms of clipping and of agreement are of the whole model. A process sends half of the bytes."""
    options = OPTIONS.get(name, {"compressor": Compression(TopK(0.2), dense_below=1)})
    found = gloo(trained, 4, inside, options)
    for rank, (ours, alone, (sent, sent_alone), rounds) in enumerate(found):
        assert rounds == 3
        assert all(map(torch.equal, ours, found[rank // 2 * 2][0]))
        if rank % 2 == 0:
            assert 0.5 <= sent / sent_alone < 0.7  # checks and padding are not halved
            if inside == "DDP" or name != "TopK":  # each shard has its own largest coordinates
                torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-11)


def not_finite(inside: str, process: int) -> tuple[list[str], int, list[Tensor]]:
    """One process of the second site has a NaN in the first of three rounds, and steps after the last one."""
    ours, (site, mine) = Training(two_by_two(), inside, every=2), place()
    for i, pair in enumerate(batches(site, 7)):
        ours.backward(pair[mine])
        if i == 1 and (site, mine) == (1, process):
            for p in ours.model.parameters():
                local_part(p.grad).fill_(torch.nan)
        ours.optimizer.step()
    return list(map(str, ours.local.skips)), ours.local.rounds, ours.whole()


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("process", [0, 1])
def test_a_number_that_is_not_finite_in_one_process(gloo: Gloo, inside: str, process: int) -> None:
    """The optimizers of all processes of that site are reset, so that they have one model still."""
    found = gloo(not_finite, 4, inside, process)
    for rank, (skips, rounds, model) in enumerate(found):
        assert skips == ["round 0: the local update of 0.weight is not finite on worker 1"]
        assert rounds == 2
        assert all(map(torch.equal, model, found[rank // 2 * 2][2]))
        assert all(bool(p.isfinite().all()) for p in model)


def invalid_message(inside: str) -> tuple[list[str], int, list[Tensor]]:
    """The second process of the first site receives a damaged message in the first round."""
    ours, (site, mine) = (
        Training(two_by_two(), inside, every=1, compressor=Compression(TopK(k=4), dense_below=1)),
        place(),
    )
    channel = ours.local._workers.channel
    gather = channel.gather

    def damaged(parts: Any, **options: Any) -> Any:
        found = gather(parts, **options)
        if "indices" in parts and (site, mine) == (0, 1) and not ours.local.rounds + ours.local.skipped:
            found[1]["indices"].fill_(-1)
        return found

    channel.gather = damaged  # type: ignore[method-assign]
    for pair in batches(site, 2):
        ours.step(pair[mine])
    return list(map(str, ours.local.skips)), ours.local.rounds, ours.whole()


def test_a_damaged_message_for_one_shard(gloo: Gloo) -> None:
    """The processes of other shards, which received no such message, reject the round as well."""
    for skips, rounds, _ in gloo(invalid_message, 4, "FSDP2"):
        assert len(skips) == 1
        assert rounds == 1


def unlike(inside: str) -> list[str]:
    """Return the errors of arguments that differ in a site, of equal gradients, and of an anchor that differs in one
    process."""
    mesh, (site, mine), errors = two_by_two(), place(), []

    def caught(work: Callable[[], object]) -> None:
        try:
            work()
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
        dist.barrier()

    caught(lambda: Training(mesh, inside, every=3 + mine))
    ours = Training(mesh, inside)
    caught(lambda: ours.step(batches(0, 1)[0][mine]))
    ours = Training(mesh, inside, every=1, compare_every=2)
    pairs = batches(site, 2)
    ours.step(pairs[0][mine])
    if dist.get_rank() == 3:
        next(iter(ours.local._fragments)).anchor.flat[0] += 1.0
    caught(lambda: ours.step(pairs[1][mine]))
    return errors


@pytest.mark.parametrize("inside", INSIDE)
def test_all_processes_raise_an_error(gloo: Gloo, inside: str) -> None:
    for arguments, gradients, drift in gloo(unlike, 4, inside):
        assert "the processes of a worker must be given the same arguments" in arguments
        assert "process 0 has every=3 and process 1 has every=4" in arguments
        assert "gradients are equal bit for bit on all 2 workers" in gradients
        assert "worker 1 differs from worker 0 in anchor of 0.weight" in drift


def equal_in_one_shard() -> int:
    """Both sites have the same gradients in the first shard, and others in the second."""
    ours, (site, mine) = Training(two_by_two(), "FSDP2"), place()
    ours.backward(batches(site, 1)[0][mine])
    for p in ours.model.parameters() if mine == 0 else ():
        grad = local_part(p.grad)
        grad.copy_(torch.arange(1.0, 1 + grad.numel()).view_as(grad))
    ours.optimizer.step()
    return ours.local.steps


def test_gradients_of_one_shard_may_be_equal(gloo: Gloo) -> None:
    assert gloo(equal_in_one_shard, 4) == [1, 1, 1, 1]


def resumed(inside: str, folder: Path) -> tuple[list[Tensor], list[Tensor], int]:
    """Return the parameters after 10 steps, and after 5, a checkpoint and 5 in new objects."""
    mesh, (site, mine) = two_by_two(), place()
    options = {"compressor": Compression(Sign(), dense_below=1), "delay": 2}
    straight, first, second = (Training(mesh, inside, **options) for _ in range(3))
    parts = [{"model": t.model, "optimizer": t.optimizer, "local": t.local} for t in (first, second)]
    for i, pair in enumerate(batches(site, 10)):
        straight.step(pair[mine])
        if i == 4:
            save_checkpoint(folder, parts[0], step=first.local.steps)
            load_checkpoint(folder, parts[1])
        (first if i < 4 else second).step(pair[mine])
    return straight.whole(), second.whole(), second.local.rounds


@pytest.mark.parametrize("inside", INSIDE)
def test_a_site_resumes(gloo: Gloo, inside: str, tmp_path: Path) -> None:
    for straight, again, rounds in gloo(resumed, 4, inside, tmp_path):
        assert rounds == 2
        assert all(map(torch.equal, straight, again))


def collectives(shape: tuple[int, ...]) -> list[bool]:
    """Return for three kinds of meshes if a site's collectives are those of its numbers."""
    found = []
    for sizes in ((2, 2), (4, 1), (2, 1, 2)):
        names = ("sites", "a", "b")[: len(sizes)]
        group = group_of_workers(dist.init_device_mesh("cpu", sizes, mesh_dim_names=names))  # type: ignore[attr-defined]
        assert isinstance(group, SiteGroup)
        n, rank = group.size, group.rank
        assert (n, group.processes) == (sizes[0], 4 // sizes[0])
        for dtype in (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16):
            of = [(torch.arange(torch.Size(shape).numel()) + 10 * i).view(shape).to(dtype) for i in range(n)]
            found += [torch.equal(a, b) for a, b in zip(group.all_gather(of[rank]), of, strict=True)]
            group.broadcast(first := of[rank].clone())
            found.append(torch.equal(first, of[0]))
            if dtype.is_floating_point and dtype != torch.bfloat16:
                group.all_reduce(total := of[rank].clone())
                found.append(torch.equal(total, torch.stack(of).sum(0)))
            if len(shape) == 1:
                sent = [of[rank][: len(of[rank]) - i] for i in range(n)]  # to the i-th worker i numbers less
                got = group.all_to_all(sent, [len(of[0]) - rank] * n)
                found += [torch.equal(a, b[: len(b) - rank]) for a, b in zip(got, of, strict=True)]
    return found


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0, 4), ()])
def test_collectives_of_sites(gloo: Gloo, shape: tuple[int, ...]) -> None:
    for found in gloo(collectives, 4, shape):
        assert found
        assert all(found)
