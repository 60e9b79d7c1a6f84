"""Another number of workers: x, y, the mean error and mean momenta stay; what cannot be carried is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from states import Small, begun, carried_over, in_turn

import packsaddle
from packsaddle import CheckpointError, load_checkpoint
from packsaddle.comm.simulation import simulate

Gloo = Callable[..., list[Any]]
Parts = dict[str, Any]

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},  # tests/feedback/engine/test_other_workers.py has momenta and owner errors
    "low rank": {"compressor": packsaddle.LowRank(2)},
    "lazy noise": {"compressor": packsaddle.RandomK(0.1)},
}
# `check` sees what is said.
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint of step . was saved by")
SUM = 1e-12  # of sums of a few doubles around 1


def check(before: dict[str, Any], outcomes: list[Any], old: int, new: int) -> None:
    for loaded, buffers, notes, ended in outcomes:
        for name in before:
            torch.testing.assert_close(loaded[name], before[name], rtol=0, atol=SUM, msg=name)
        for name, p in outcomes[0][3].items():
            assert torch.equal(ended[name], p)  # workers still have one x
            assert torch.isfinite(p).all()
        for name, buffer in outcomes[0][1].items():
            assert torch.equal(buffers[name], buffer)
        assert notes == (
            f"the checkpoint of step 6 was saved by {old} workers and is loaded by {new}: each loads the mean of "
            "parameters, optimizer states and error memories",
        )


@pytest.mark.parametrize(
    ("name", "old", "new"), [*((name, old, 5 - old) for name in VARIANTS for old in (3, 2)), ("topk", 4, 1)]
)
def test_the_mean_error_stays(name: str, old: int, new: int, tmp_path: Path) -> None:
    options = VARIANTS[name]
    (before, *others) = simulate(lambda rank: begun(str(tmp_path), options, 6), old)
    assert all(torch.equal(before["e"], other["e"]) for other in others)
    assert before["e"].norm() > 1e-3
    check(before, simulate(lambda rank: carried_over(str(tmp_path), options, 9), new), old, new)


@pytest.mark.nightly
def test_hooks_and_gloo(gloo: Gloo, tmp_path: Path) -> None:
    """The mean of e behind DistributedDataParallel, saved by three processes and loaded by two."""
    cases: list[dict[str, Any]] = [{"hook": "adam", "scope": "bucket", "exchange": "two-way"}, {"exchange": "two-way"}]
    first = gloo(in_turn, 3, [(begun, (str(tmp_path / str(i)), case, 6)) for i, case in enumerate(cases)])
    second = gloo(in_turn, 2, [(carried_over, (str(tmp_path / str(i)), case, 9)) for i, case in enumerate(cases)])
    for i in range(len(cases)):
        check(first[0][i], [worker[i] for worker in second], 3, 2)


def test_what_cannot_be_carried(tmp_path: Path) -> None:
    """A part whose workers differ has no known mean."""

    def own(rank: int) -> dict[str, Any]:
        part = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1 * (rank + 1))
        return {"plain": part}

    simulate(lambda rank: packsaddle.save_checkpoint(tmp_path / "b", own(rank), step=1), 2)
    with pytest.raises(CheckpointError, match=r"plain: param_groups\.0\.lr differs between the 2 workers"):
        simulate(lambda rank: load_checkpoint(tmp_path / "b", own(rank)), 1)
    simulate(lambda rank: begun(str(tmp_path / "c"), {}, 6), 2)
    with pytest.raises(CheckpointError, match="optimizer: seed is 6 here"):
        simulate(lambda rank: load_checkpoint(tmp_path / "c", Small(seed=6).parts), 3)


class Notes:
    """A part with what it is given."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def carried(
    folder: Path,
    made: Callable[[int], Parts],
    train: Callable[[Parts, int], None],
    old: int,
    new: int,
    look: Callable[[Parts], Any] = lambda parts: parts,
) -> list[Any]:
    """Save parts that `old` workers have made and trained; return a look at those of `new` workers that load them."""

    def save(rank: int) -> None:
        parts = made(rank)
        train(parts, rank)
        packsaddle.save_checkpoint(folder, parts, step=1)

    def load(rank: int) -> Any:
        parts = made(rank)
        load_checkpoint(folder, parts)
        return look(parts)

    simulate(save, old)
    return simulate(load, new)


def with_local(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Parts:
    local = packsaddle.LocalUpdates(optimizer, **{"every": 4, **options})
    return {"model": model, "optimizer": optimizer, "local": local}


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize(
    ("first", "second", "place"),
    [
        ({"a": 1}, {"a": 1, "b": torch.ones(2)}, "b"),
        ({"a": 1, "b": torch.ones(2)}, {"a": 1}, "b"),
        ({"b": [torch.ones(2)]}, {"b": [torch.ones(2), torch.ones(2)]}, "b.1"),
        ({"b": torch.ones(2)}, {"b": torch.ones(3)}, "b"),
    ],
)
def test_what_only_some_workers_have_is_not_lost(
    first: Parts, second: Parts, place: str, new: int, tmp_path: Path
) -> None:
    states = (first, second)
    simulate(lambda rank: packsaddle.save_checkpoint(tmp_path, {"n": Notes(**states[rank])}, step=1), 2)

    def load(rank: int) -> str:
        with pytest.raises(CheckpointError) as raised:
            load_checkpoint(tmp_path, {"n": Notes()})
        return str(raised.value)

    for message in simulate(load, new):
        assert f"n: {place} is missing, or has another shape, in the state of one of the 2 workers" in message


def test_an_optimizer_that_has_not_stepped_all_on_one_worker(tmp_path: Path) -> None:
    """Between exchanges of local updates a layer may have had no gradient on a worker."""

    def made(rank: int) -> Parts:
        layers = torch.nn.ModuleList([torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)])
        return with_local(layers, torch.optim.AdamW(layers.parameters(), 1e-3))

    def train(parts: Parts, rank: int) -> None:
        for p in parts["model"][: 1 + rank].parameters():
            p.grad = torch.ones_like(p)
        parts["optimizer"].step()

    with pytest.raises(CheckpointError, match=r"optimizer: state\.2\.\w+ is missing, or has another shape"):
        carried(tmp_path, made, train, 2, 3)


def test_names_of_attributes_have_no_meaning(tmp_path: Path) -> None:
    """An optimizer with a `channel` may have LocalUpdates, and a part with its own `saved_state` is a plain one."""

    def made(rank: int) -> Parts:
        layer, notes = torch.nn.Linear(40, 40), Notes(a=1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        optimizer.channel = notes.saved_state = notes.check_state_dict = "their own"  # type: ignore[attr-defined]
        return with_local(layer, optimizer) | {"notes": notes}

    assert [parts["notes"].state for parts in carried(tmp_path, made, lambda *_: None, 2, 3)] == [{"a": 1}] * 3


def test_each_worker_its_own_disk(tmp_path: Path) -> None:
    """Files are read by whoever has them: ranks dealt anew, and three disks' files carried over to two workers."""

    def save(rank: int) -> Any:
        return begun(str(tmp_path / f"disk-{rank}"), {}, 6)

    (before, *_) = simulate(save, 3)
    straight = simulate(lambda rank: carried_over(str(tmp_path / f"disk-{rank}"), {}, 9), 3)
    turned = simulate(lambda rank: carried_over(str(tmp_path / f"disk-{(rank + 1) % 3}"), {}, 9), 3)
    for a, b in zip(straight, turned, strict=True):
        assert all(torch.equal(a[3][name], b[3][name]) for name in a[3])
    for file in (tmp_path / "disk-2").rglob("worker*"):
        target = tmp_path / "disk-1" / file.relative_to(tmp_path / "disk-2")
        target.write_bytes(file.read_bytes())
    check(before, simulate(lambda rank: carried_over(str(tmp_path / f"disk-{rank}"), {}, 9), 2), 3, 2)
    shutil.rmtree(tmp_path / "disk-1")
    with pytest.warns(UserWarning, match="the files of worker 1 of 3 are missing"):
        simulate(lambda rank: load_checkpoint(tmp_path / f"disk-{2 * rank}", Small().parts), 2)


def test_pending_updates_are_averaged_with_the_workers_weights(tmp_path: Path) -> None:
    saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def made(rank: int) -> Parts:
        x = torch.nn.Parameter(torch.zeros(64, 64))
        workers = packsaddle.Workers(weight=10.0**rank)
        optimizer = torch.optim.SGD([x], lr=1.0)
        return with_local(torch.nn.ParameterList([x]), optimizer, compressor=packsaddle.Sign(), workers=workers)

    def train(parts: Parts, rank: int) -> None:
        (x,) = parts["model"]
        for n in range(6):
            x.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(100 * rank + n))
            parts["optimizer"].step()
        saved[rank] = parts["local"].error(), x.detach().clone()

    loaded = carried(tmp_path, made, train, 3, 2, lambda parts: (parts["local"].error(), parts["model"][0].detach()))
    mean = sum(10**rank * x for rank, (_, x) in saved.items()) / 111
    for error, x in loaded:
        torch.testing.assert_close(error, saved[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x, mean)


def test_batch_statistics_of_workers_with_unequal_numbers_of_steps(tmp_path: Path) -> None:
    """Running statistics are averaged with the paces as weights, and the number of batches is worker 0's."""
    saved: dict[int, torch.Tensor] = {}

    def made(rank: int) -> Parts:
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 16))
        paces = [6, 2] if packsaddle.comm.resolve(None).size == 2 else None
        workers = packsaddle.Workers(weight="steps", steps=paces)
        return with_local(model, torch.optim.SGD(model.parameters(), lr=0.1), workers=workers)

    def train(parts: Parts, rank: int) -> None:
        while parts["local"].rounds < 2:
            parts["optimizer"].zero_grad()
            parts["model"](torch.randn(8, 16) + 10.0 * rank).sum().backward()
            parts["optimizer"].step()
        saved[rank] = parts["model"][0].running_mean.clone()

    for parts in carried(tmp_path, made, train, 2, 3):
        norm = parts["model"][0]
        torch.testing.assert_close(norm.running_mean, (6 * saved[0] + 2 * saved[1]) / 8)
        assert norm.num_batches_tracked == 12


@pytest.mark.parametrize("workers", [2, 3])
def test_a_state_of_an_earlier_format(workers: int, tmp_path: Path) -> None:
    def made(rank: int) -> Parts:
        layer = torch.nn.Linear(40, 40)
        return with_local(layer, torch.optim.SGD(layer.parameters(), lr=1.0))

    def as_before(parts: Parts, rank: int) -> None:
        state = {key: value for key, value in parts["local"].state_dict().items() if key != "share"} | {"format": 3}
        parts["local"].state_dict = lambda: state

    with pytest.raises(CheckpointError, match="local: the state has format 3, and this version of packsaddle reads"):
        carried(tmp_path, made, as_before, 3, workers)


def test_two_local_updates_of_unlike_weights_have_no_mean(tmp_path: Path) -> None:
    def made(rank: int) -> Parts:
        parts: Parts = {}
        for i, weight in enumerate((None, 1.0 + rank)):
            layer = torch.nn.Linear(64, 64)
            optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
            workers = packsaddle.Workers(weight=weight)
            parts |= {f"{name} {i}": part for name, part in with_local(layer, optimizer, workers=workers).items()}
        return parts

    with pytest.raises(CheckpointError, match="local 0 and local 1 have different weights of a worker"):
        carried(tmp_path, made, lambda *_: None, 3, 2)
