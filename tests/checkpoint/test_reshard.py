"""Another number of workers: x, y, the mean error and mean momenta stay; what cannot be carried is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from states import Small, begun, carried_over, in_turn

import packsaddle
from packsaddle import CheckpointError, CompressedSGD, load_checkpoint
from packsaddle.comm.simulation import simulate

Gloo = Callable[..., list[Any]]

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},  # tests/feedback/engine/test_other_workers.py has momenta and owner errors
    "ef21": {"memory": "ef21"},
    "low rank": {"compressor": packsaddle.LowRank(2)},
    "lazy noise": {"compressor": packsaddle.RandomK(0.1)},
}
HOOKS: dict[str, dict[str, Any]] = {
    "sgd": {"hook": "sgd"},
    "two-way": {"hook": "sgd", "exchange": "two-way"},
    "buckets": {"hook": "adam", "scope": "bucket", "exchange": "two-way"},
}
SUM = 1e-12  # of sums of a few doubles around 1


def check(before: dict[str, Any], outcomes: list[Any], old: int, new: int) -> None:
    for loaded, buffers, mean, notes, ended in outcomes:
        for name in before:
            torch.testing.assert_close(loaded[name], before[name], rtol=0, atol=SUM, msg=name)
        for name, p in outcomes[0][4].items():
            assert torch.equal(ended[name], p)  # workers still have one x
            assert torch.isfinite(p).all()
        for name, buffer in outcomes[0][1].items():
            assert torch.equal(buffers[name], buffer)
        assert torch.allclose(mean, torch.full((2,), (old - 1) / 2))
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
    if name != "ef21":
        assert before["e"].norm() > 1e-3
    check(before, simulate(lambda rank: carried_over(str(tmp_path), options, 9), new), old, new)


def test_hooks_and_gloo(gloo: Gloo, tmp_path: Path) -> None:
    """The mean of e behind DistributedDataParallel, saved by three processes and loaded by two."""
    cases = {**HOOKS, "optimizer": {"exchange": "two-way"}}
    first = gloo(in_turn, 3, [(begun, (str(tmp_path / name), options, 6)) for name, options in cases.items()])
    second = gloo(in_turn, 2, [(carried_over, (str(tmp_path / name), options, 9)) for name, options in cases.items()])
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
    first: dict[str, Any], second: dict[str, Any], place: str, new: int, tmp_path: Path
) -> None:
    states = (first, second)
    simulate(lambda rank: packsaddle.save_checkpoint(tmp_path, {"n": Notes(**states[rank])}, step=1), 2)

    def load(rank: int) -> str:
        with pytest.raises(CheckpointError) as raised:
            load_checkpoint(tmp_path, {"n": Notes()})
        return str(raised.value)

    for message in simulate(load, new):
        assert message.startswith(f"n: {place} is missing, or has another shape, in the state of one of the 2 workers")


def test_an_optimizer_that_has_not_stepped_all_on_one_worker(tmp_path: Path) -> None:
    """Between exchanges of local updates a layer may have had no gradient on a worker: the mean is over the others."""

    def made() -> tuple[torch.nn.ModuleList, dict[str, Any]]:
        layers = torch.nn.ModuleList([torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)])
        optimizer = torch.optim.AdamW(layers.parameters(), 1e-3)
        local = packsaddle.LocalUpdates(optimizer, every=4)
        return layers, {"model": layers, "optimizer": optimizer, "local": local}

    def save(rank: int) -> None:
        layers, parts = made()
        for p in layers[: 1 + rank].parameters():
            p.grad = torch.full_like(p, 1.0 + rank)
        parts["optimizer"].step()
        packsaddle.save_checkpoint(tmp_path, parts, step=1)

    simulate(save, 2)

    def load(rank: int) -> dict[int, dict[str, Any]]:
        _, parts = made()
        load_checkpoint(tmp_path, parts)
        return parts["optimizer"].state_dict()["state"]  # type: ignore[no-any-return]

    with pytest.warns(UserWarning, match="saved by 2 workers and is loaded by 3"):
        states = simulate(load, 3)
    for state in states:
        for i, gradients in enumerate([(1.0, 2.0), (1.0, 2.0), (2.0,), (2.0,)]):
            assert float(state[i]["step"]) == 1
            mean = torch.full_like(state[i]["exp_avg"], 0.1 * sum(gradients) / len(gradients))
            torch.testing.assert_close(state[i]["exp_avg"], mean)


def test_an_optimizer_state_that_is_of_another_kind_on_one_worker(tmp_path: Path) -> None:
    def made(amsgrad: bool) -> dict[str, Any]:
        layer = torch.nn.Linear(40, 40)
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-3, amsgrad=amsgrad)
        unlike = packsaddle.Workers(compare_optimizers=False)
        local = packsaddle.LocalUpdates(optimizer, every=4, workers=unlike)
        return {"model": layer, "optimizer": optimizer, "local": local}

    def save(rank: int) -> None:
        parts = made(rank == 1)
        for p in list(parts["model"].parameters())[rank:]:
            p.grad = torch.ones_like(p)
        parts["optimizer"].step()
        packsaddle.save_checkpoint(tmp_path, parts, step=1)

    simulate(save, 2)
    with pytest.raises(CheckpointError, match=r"optimizer: state\.1\.\w+ is missing, or has another shape"):
        simulate(lambda rank: load_checkpoint(tmp_path, made(False)), 3)


def test_extra_is_averaged_where_all_have_it(tmp_path: Path) -> None:
    """The rest is worker 0's, of whatever shape others have it."""
    given = (
        {"mean": torch.ones(2), "best": torch.ones(3), "losses": torch.ones(3), "kind": torch.ones(2)},
        {"mean": 3 * torch.ones(2), "losses": torch.ones(4), "kind": torch.ones(2).int(), "other": 1},
    )
    part = {"n": Notes(a=1)}
    simulate(lambda rank: packsaddle.save_checkpoint(tmp_path, part, step=1, extra=given[rank]), 2)
    with pytest.warns(UserWarning, match="saved by 2 workers and is loaded by 3"):
        loaded = simulate(lambda rank: load_checkpoint(tmp_path, {"n": Notes()}), 3)
    for found in loaded:
        assert found is not None
        assert {name: value.tolist() for name, value in found.extra.items()} == {
            "mean": [2.0, 2.0],
            "best": [1.0] * 3,
            "losses": [1.0] * 3,
            "kind": [1.0] * 2,
        }


def test_names_of_attributes_have_no_meaning(tmp_path: Path) -> None:
    """An optimizer with a `channel` may have LocalUpdates, and a part with its own `saved_state` is a plain one."""

    def made() -> dict[str, Any]:
        layer, notes = torch.nn.Linear(40, 40), Notes(a=1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        optimizer.channel = notes.saved_state = notes.check_state_dict = "their own"  # type: ignore[attr-defined]
        return {"model": layer, "optimizer": optimizer, "local": packsaddle.LocalUpdates(optimizer), "notes": notes}

    simulate(lambda rank: packsaddle.save_checkpoint(tmp_path, made(), step=1), 2)
    with pytest.warns(UserWarning, match="saved by 2 workers and is loaded by 3"):
        assert simulate(lambda rank: load_checkpoint(tmp_path, made()).step, 3) == [1, 1, 1]  # type: ignore[union-attr]


def test_each_worker_its_own_disk(tmp_path: Path) -> None:
    """Files are read by whoever has them: ranks dealt anew, and three disks' files carried over to two workers."""

    def save(rank: int) -> Any:
        return begun(str(tmp_path / f"disk-{rank}"), {}, 6)

    (before, *_) = simulate(save, 3)
    straight = simulate(lambda rank: carried_over(str(tmp_path / f"disk-{rank}"), {}, 9), 3)
    turned = simulate(lambda rank: carried_over(str(tmp_path / f"disk-{(rank + 1) % 3}"), {}, 9), 3)
    for a, b in zip(straight, turned, strict=True):
        assert all(torch.equal(a[4][name], b[4][name]) for name in a[4])
    for file in (tmp_path / "disk-2").rglob("worker*"):
        target = tmp_path / "disk-1" / file.relative_to(tmp_path / "disk-2")
        target.write_bytes(file.read_bytes())
    check(before, simulate(lambda rank: carried_over(str(tmp_path / f"disk-{rank}"), {}, 9), 2), 3, 2)
    shutil.rmtree(tmp_path / "disk-1")
    with pytest.warns(UserWarning, match="the files of worker 1 of 3 are missing"):
        simulate(lambda rank: load_checkpoint(tmp_path / f"disk-{2 * rank}", Small().parts), 2)


def test_pending_updates_are_averaged_with_the_workers_weights(tmp_path: Path) -> None:
    def made(weight: float) -> tuple[torch.nn.Parameter, dict[str, Any]]:
        x = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = torch.optim.SGD([x], lr=1.0)
        workers = packsaddle.Workers(weight=weight)
        local = packsaddle.LocalUpdates(optimizer, packsaddle.Sign(), every=4, workers=workers)
        return x, {"model": torch.nn.ParameterList([x]), "optimizer": optimizer, "local": local}

    def save(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, parts = made(10.0**rank)
        for n in range(6):
            x.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(100 * rank + n))
            parts["optimizer"].step()
        packsaddle.save_checkpoint(tmp_path, parts, step=6)
        return parts["local"].error(), x.detach()

    def load(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, parts = made(1.0 + rank)
        load_checkpoint(tmp_path, parts)
        return parts["local"].error(), x.detach()

    saved = simulate(save, 3)
    mean = sum(weight * x for weight, (_, x) in zip((1, 10, 100), saved, strict=True)) / 111
    with pytest.warns(UserWarning, match="saved by 3 workers and is loaded by 2"):
        loaded = simulate(load, 2)
    for error, x in loaded:
        torch.testing.assert_close(error, saved[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x, mean)


def test_workers_of_unlike_weights(tmp_path: Path) -> None:
    """A worker's momentum counts by its weight in its own LocalUpdates; where it has none, the others' count."""

    def made(weight: float | None) -> tuple[list[torch.nn.Parameter], dict[str, Any]]:
        xs = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
        parts: dict[str, Any] = {}
        for i, (x, own) in enumerate(zip(xs, (None, weight), strict=True)):
            parts[f"optimizer {i}"] = torch.optim.SGD([x], lr=1.0, momentum=0.9)
            workers = packsaddle.Workers(weight=own)
            parts[f"local {i}"] = packsaddle.LocalUpdates(parts[f"optimizer {i}"], every=4, workers=workers)
        return xs, parts

    def save(rank: int) -> None:
        xs, parts = made((1.0, 2.0, 97.0)[rank])
        for i, x in enumerate(xs):
            if (i, rank) != (1, 0):
                x.grad = torch.full_like(x, 1.0 + rank)
            parts[f"optimizer {i}"].step()
        packsaddle.save_checkpoint(tmp_path, parts, step=1)

    def load(rank: int) -> list[float]:
        _, parts = made(1.0)
        load_checkpoint(tmp_path, parts)
        moments = [parts[f"optimizer {i}"].state_dict()["state"][0]["momentum_buffer"] for i in range(2)]
        return [float(m.mean()) for m in moments]

    simulate(save, 3)
    with pytest.warns(UserWarning, match="saved by 3 workers and is loaded by 2"):
        loaded = simulate(load, 2)
    assert loaded == [pytest.approx([2.0, (2 * 2 + 97 * 3) / 99])] * 2


def test_a_state_of_an_earlier_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> dict[str, Any]:
        layer = torch.nn.Linear(40, 40)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        return {"model": layer, "optimizer": optimizer, "local": packsaddle.LocalUpdates(optimizer, every=4)}

    now = packsaddle.LocalUpdates.state_dict

    def earlier(local: packsaddle.LocalUpdates) -> dict[str, Any]:
        return {key: value for key, value in now(local).items() if key != "share"} | {"format": 3}

    with monkeypatch.context() as patch:
        patch.setattr(packsaddle.LocalUpdates, "state_dict", earlier)
        simulate(lambda rank: packsaddle.save_checkpoint(tmp_path, made(), step=1), 3)
    for workers in (2, 3):
        with pytest.raises(
            CheckpointError, match="local: the state has format 3, and this version of packsaddle reads"
        ):
            simulate(lambda rank: load_checkpoint(tmp_path, made()), workers)


def test_a_module_of_workers_with_two_weights_has_no_mean(tmp_path: Path) -> None:
    def made(weight: float) -> dict[str, Any]:
        model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
        parts: dict[str, Any] = {"model": model}
        for i, own in enumerate((None, weight)):
            parts[f"optimizer {i}"] = torch.optim.SGD(model[i].parameters(), lr=1.0)
            workers = packsaddle.Workers(weight=own)
            parts[f"local {i}"] = packsaddle.LocalUpdates(parts[f"optimizer {i}"], every=4, workers=workers)
        return parts

    simulate(lambda rank: packsaddle.save_checkpoint(tmp_path, made(1.0 + rank), step=1), 3)
    with pytest.raises(CheckpointError, match="model: local 0 and local 1 have unlike weights of the workers"):
        simulate(lambda rank: load_checkpoint(tmp_path, made(1.0)), 2)


@pytest.mark.parametrize("is_local", [True, False])
def test_the_smallest_scale_of_the_workers_scalers_is_loaded(tmp_path: Path, is_local: bool) -> None:
    """Each worker has its own: one overflow on one worker halves that of this worker alone."""

    def made() -> dict[str, Any]:
        layer, scaler = torch.nn.Linear(40, 40), torch.amp.GradScaler("cpu", init_scale=8.0)
        if not is_local:
            return {"model": layer, "optimizer": CompressedSGD(layer.parameters(), 1.0), "scaler": scaler}
        optimizer = torch.optim.SGD(layer.parameters(), 1.0)
        local = packsaddle.LocalUpdates(optimizer, every=8, scaler=scaler)
        return {"model": layer, "optimizer": optimizer, "scaler": scaler, "local": local}

    def save(rank: int) -> None:
        parts = made()
        for n in range(3):
            value = torch.inf if (n, rank) == (1, 1) else 1.0 + rank
            parts["scaler"].scale(value * parts["model"](torch.ones(40)).sum()).backward()
            parts["scaler"].step(parts["optimizer"])
            parts["scaler"].update()
            parts["optimizer"].zero_grad()
        packsaddle.save_checkpoint(tmp_path, parts, step=3)

    def load(rank: int) -> tuple[float, int]:
        parts = made()
        load_checkpoint(tmp_path, parts)
        state = parts["scaler"].state_dict()
        return state["scale"], state["_growth_tracker"]

    simulate(save, 2)
    with pytest.warns(UserWarning, match="saved by 2 workers and is loaded by 3"):
        assert simulate(load, 3) == [(4.0, 1)] * 3
