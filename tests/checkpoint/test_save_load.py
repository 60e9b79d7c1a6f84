"""save_checkpoint and load_checkpoint: bit-equal on the same workers, refused in one line, and whole or not at all."""

import errno
import json
import math
import resource
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states import Small, by_torchs_own_checkpoints, saved_by, straight_and_resumed

import packsaddle
from packsaddle import CheckpointError, LocalUpdates, Workers, load_checkpoint, save_checkpoint
from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.comm.failures import PeerLostError
from packsaddle.comm.group import Solo, resolve
from packsaddle.comm.simulation import simulate

Gloo = Callable[..., list[Any]]


def everything(folder: str) -> list[Any]:
    cases: list[dict[str, Any]] = [{}, {"hook": "sgd"}, {"hook": "adam", "exchange": "two-way"}]
    return [straight_and_resumed(f"{folder}/{i}", options, 7, 13) for i, options in enumerate(cases)]


def test_goes_on_bit_for_bit_in_processes(gloo: Gloo, tmp_path: Path) -> None:
    for found in gloo(everything, 2, str(tmp_path)):
        assert found == 3 * [{"differ": [], "bytes": True}]


def through_torch(folder: str) -> list[list[str]]:
    cases: list[dict[str, Any]] = [{"momentum": 0.9}, {"hook": "sgd"}]
    return [by_torchs_own_checkpoints(f"{folder}/{i}", options, 5, 8) for i, options in enumerate(cases)]


def test_torch_distributed_checkpoint(gloo: Gloo, tmp_path: Path) -> None:
    """The documented recipe: every worker's state under a key of its own."""
    assert gloo(through_torch, 2, str(tmp_path)) == [[[], []], [[], []]]


def loaded(folder: Path, parts: Any) -> packsaddle.Checkpoint:
    found = load_checkpoint(folder, parts)
    assert found is not None
    return found


@pytest.mark.parametrize("each", [False, True], ids=["one folder", "a folder each"])
def test_workers_save_the_same_step_or_nothing(each: bool, tmp_path: Path) -> None:
    """Files of different steps would rotate the last whole checkpoint away."""

    def worker(rank: int) -> list[str]:
        folder, parts, errors = tmp_path / str(rank * each), Small().parts, []
        save_checkpoint(folder, parts, step=1)
        for step in range(2, 8, 2):
            with pytest.raises(CheckpointError) as caught:
                save_checkpoint(folder, parts, step=step + rank)
            errors.append(str(caught.value).split(":")[0])
        assert loaded(folder, parts).step == 1
        return errors

    said = [f"step must be equal on all workers, got {n} on worker 0 and {n + 1} on worker 1" for n in (2, 4, 6)]
    assert simulate(worker, 2) == [said] * 2
    assert {p.name for p in tmp_path.glob("*/*")} == {"step-00000001"}


def paced(folder: Path, late: int, found: bool) -> tuple[list[int], torch.Tensor]:
    """Train with six steps of worker 0 in the time of two steps of worker 1. If not `found`, save `late` steps after
    each exchange began, until the third; else continue from there. Return the steps that were saved, and the end."""
    rank = resolve(None).rank
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    workers = Workers(weight="steps", steps=[6, 2])
    local = LocalUpdates(optimizer, every=4, overlap=2, model=model, workers=workers)
    parts, saved = {"model": model, "optimizer": optimizer, "local": local}, []
    if found:
        loaded(folder, parts)
    for step in range(local.steps, 4 * local.paces[rank]):
        optimizer.zero_grad()
        model(torch.randn(8, 20, generator=torch.Generator().manual_seed(2 * step + rank))).square().mean().backward()
        optimizer.step()
        if not found and (step + 1 - late) % local.paces[rank] == 0 and 8 <= local.position <= 24:
            assert local.exchanging == (late == 0)
            save_checkpoint(folder, parts, step=local.position)
            saved.append(local.position)
    local.flush()
    return saved, model.weight.detach()


@pytest.mark.parametrize("late", [0, 1])
def test_paced_workers_save_their_position(late: int, tmp_path: Path) -> None:
    """One step later, worker 1 has applied the delayed exchange and worker 0 has not, so `local.rounds` differ."""
    straight = simulate(lambda rank: paced(tmp_path, late, found=False), 2)
    assert [saved for saved, _ in straight] == [[8, 16, 24]] * 2
    for _, weight in simulate(lambda rank: paced(tmp_path, late, found=True), 2):
        assert torch.equal(weight, straight[0][1])


def test_folder_of_two_steps(tmp_path: Path) -> None:
    """The newest `keep` stay; there is nothing else in the folder, and files of other kinds are left alone."""
    one = Small()
    assert load_checkpoint(tmp_path / "none", one.parts) is None
    (tmp_path / "mine.txt").write_text("mine")
    for step in range(5):
        assert save_checkpoint(tmp_path, one.parts, step=step) == tmp_path / f"step-{step:08d}"
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["mine.txt", "step-00000003", "step-00000004", *2 * ["worker-0.json", "worker-0.pt"]]
    )
    manifest = json.loads((tmp_path / "step-00000004" / "worker-0.json").read_text())
    assert manifest["shapes"]["model"]["0.weight"] == "float64[20, 8]"
    assert (manifest["workers"], manifest["packsaddle"]) == (1, packsaddle.__version__)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "seed": (lambda: Small(seed=6).parts, "optimizer: seed is 6 here, but the state was saved with seed 5"),
    "momentum": (lambda: Small(momentum=0.9).parts, "optimizer: direction is momentum here"),
    "dtype": (
        lambda: Small(dtype=torch.float32).parts,
        "model: 0.weight is float32[20, 8] here, but float64[20, 8] in the checkpoint",
    ),
    "model": (
        lambda: {**Small().parts, "model": torch.nn.Sequential(torch.nn.Linear(8, 20)).double()},
        "model has no 1.weight here",
    ),
    "layer": (
        lambda: {**Small().parts, "model": torch.nn.Sequential(torch.nn.Linear(8, 21)).double()},
        "model: 0.weight is float64[21, 8] here, but float64[20, 8] in the checkpoint",
    ),
    "parts": (lambda: {"model": Small().model}, "the parts are model here, but model, optimizer, scheduler in the"),
    "kind": (
        lambda: {**Small().parts, "optimizer": torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)},
        "optimizer: SGD has groups of [1] parameters, and the state of [6]",
    ),
    "no part": (lambda: {"model": 3}, "part 'model' must have state_dict and load_state_dict, got int"),
}


def as_text(part: Any) -> str:
    return json.dumps(part.state_dict(), default=lambda t: t.tolist())


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_change_nothing(name: str, tmp_path: Path) -> None:
    saved_by(tmp_path)
    make, message = REFUSED[name]
    parts = make()
    with_states = {n: part for n, part in parts.items() if part != 3}
    before = {n: as_text(part) for n, part in with_states.items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, parts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {n: as_text(part) for n, part in with_states.items()} == before
    assert (tmp_path / "step-00000004").is_dir()


class Alone(Solo):
    """A group of two of which the other never comes."""

    size = 2

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        raise PeerLostError("rank 0 of 2 lost the others")


@pytest.mark.parametrize("act", [partial(save_checkpoint, step=1), load_checkpoint], ids=["save", "load"])
def test_a_worker_that_waits_alone_says_in_which_call(act: Any, tmp_path: Path) -> None:
    """As where a script saves on worker 0 only."""
    parts = {"model": torch.nn.Linear(2, 2)}
    name = "save_checkpoint" if isinstance(act, partial) else "load_checkpoint"
    with pytest.raises(PeerLostError, match=f"lost the others. It waited in {name}, which every worker must call"):
        act(tmp_path, parts, process_group=Alone())


def test_local_updates_may_not_be_left_out(tmp_path: Path) -> None:
    """Anchor and error memory are theirs: without them a worker would begin again somewhere else."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    local = LocalUpdates(optimizer, every=2)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
    for act in (partial(save_checkpoint, step=1), load_checkpoint):
        with pytest.raises(CheckpointError, match="part 'optimizer' is an optimizer with LocalUpdates, which must be"):
            act(tmp_path, parts)
        with pytest.raises(CheckpointError, match=r"parts must be by name, .* got a list"):
            act(tmp_path, [model])
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path, {**parts, "local": local}, step=1)


def test_all_optimizers_of_local_updates_or_none(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    muon, adamw = torch.optim.Muon([model.weight]), torch.optim.AdamW([model.bias])
    parts: dict[str, Any] = {"model": model, "local": LocalUpdates([muon, adamw], every=2), "muon": muon}
    for act in (partial(save_checkpoint, step=1), load_checkpoint):
        with pytest.raises(CheckpointError, match="part 'local' is LocalUpdates, and its AdamW must be a part as well"):
            act(tmp_path, parts)
    save_checkpoint(tmp_path, {**parts, "adamw": adamw}, step=1)


class Late:
    """A part that finds out only when it is filled."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": 1}

    def load_state_dict(self, state: Any) -> None:
        if state != {"value": 1} or self.broken:
            self.broken = False
            raise RuntimeError("not\nthis one")

    broken = True


def test_parts_loaded_before_one_that_fails_are_restored(tmp_path: Path) -> None:
    one, late = saved_by(tmp_path), Late()
    save_checkpoint(tmp_path, {**one.parts, "late": late}, step=5)
    one.train(4, 6)
    before = one.vectors()
    with pytest.raises(CheckpointError, match="late: not this one"):
        load_checkpoint(tmp_path, {**one.parts, "late": late})
    assert all(torch.equal(t, before[name]) for name, t in one.vectors().items())
    assert one.optimizer.steps == 6


def spoil(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step-00000004" / name
    raw = path.read_bytes()
    half = len(raw) // 2
    path.write_bytes(raw[:half] if path.suffix == ".json" else raw[:half] + bytes([raw[half] ^ 1]) + raw[half + 1 :])


@pytest.mark.parametrize("name", ["worker-0.pt", "worker-0.json"])
def test_damage_falls_back_with_a_warning(name: str, tmp_path: Path) -> None:
    saved_by(tmp_path)
    spoil(tmp_path, name)
    one = Small()
    with pytest.warns(UserWarning, match=rf"step 4 is incomplete or damaged, and is set aside: .*{name} is damaged"):
        assert loaded(tmp_path, one.parts).step == 2
    assert (tmp_path / "step-00000004.unusable" / name).exists()
    one.train(2, 4)
    straight = Small()
    straight.train(0, 4)
    assert all(torch.equal(t, straight.vectors()[n]) for n, t in one.vectors().items())
    save_checkpoint(tmp_path, one.parts, step=4)
    assert loaded(tmp_path, Small().parts).step == 4
    save_checkpoint(tmp_path, one.parts, step=6)
    save_checkpoint(tmp_path, one.parts, step=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]


def test_all_steps_damaged_is_an_error(tmp_path: Path) -> None:
    saved_by(tmp_path)
    for name in ("step-00000002", "step-00000004"):
        (tmp_path / name / "worker-0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has no intact checkpoint: step 4: .* No such file"):
        load_checkpoint(tmp_path, Small().parts)


def test_a_newer_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packsaddle.checkpoint.files.FORMAT", 6)
    save_checkpoint(tmp_path, Small().parts, step=1)
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"has format 6, written by packsaddle .*; this one reads format 5: use that"
    ):
        load_checkpoint(tmp_path, Small().parts)


def test_the_first_step_of_which_a_worker_has_nothing(tmp_path: Path) -> None:
    """The run ended while it was being saved: it begins again. An earlier step, which was whole once, is lost."""
    simulate(lambda rank: saved_by(tmp_path), 2)
    for step in (2, 4):
        (tmp_path / f"step-0000000{step}" / "worker-1.json").unlink()
    with pytest.raises(CheckpointError, match=r"step 4: the files of worker 1 of 2 are missing; step 2: "):
        simulate(lambda rank: load_checkpoint(tmp_path, Small().parts), 2)
    for file in (tmp_path / "step-00000002").iterdir():
        file.unlink()
    (tmp_path / "step-00000002").rmdir()
    with pytest.warns(
        UserWarning, match="step 4 is incomplete or damaged, and is set aside: the files of worker 1 of 2"
    ):
        assert simulate(lambda rank: load_checkpoint(tmp_path, Small().parts), 2) == [None, None]


def test_a_later_step_that_was_not_loaded_is_not_overwritten(tmp_path: Path) -> None:
    one = saved_by(tmp_path)
    with pytest.raises(CheckpointError, match=r"has a checkpoint of step 4, after this one of step 1: load"):
        save_checkpoint(tmp_path, one.parts, step=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    one = Small()
    for message, arguments in {
        "keep must be at least 2 checkpoints, got 1": {"step": 1, "keep": 1},
        "step must be an integer of 0 or more, got -1": {"step": -1},
        r"extra\['f'\] is a function": {"step": 1, "extra": {"f": saved_by}},
    }.items():
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(tmp_path, one.parts, **arguments)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: Not a directory"):
        save_checkpoint(tmp_path / "file", one.parts, step=1)


class Twelve(torch.Tensor):
    """A tensor of a class that no loader knows."""


Pair = namedtuple("Pair", "a b")
NOT_PLAIN: dict[str, Any] = {
    r"\['h'\] is a defaultdict.*: make it a dict": {"h": defaultdict(list)},
    r"\['h'\] is a ChainMap": {"h": ChainMap({"a": 1})},
    r"\['h'\] is a UserDict": {"h": UserDict({"a": 1})},
    r"has a key Pair\(a=1, b=2\) of type Pair": {Pair(1, 2): 1},
    r"has a key \(frozenset\(\),\) of type tuple": {(frozenset(),): 1},
    r"\['t'\] is a Twelve": {"t": torch.ones(2).as_subclass(Twelve)},
}


@pytest.mark.parametrize("message", NOT_PLAIN)
def test_what_could_not_be_read_is_not_saved(message: str, tmp_path: Path) -> None:
    """Steps that cannot be loaded would take the place of those that can."""
    model = torch.nn.Linear(4, 4)
    save_checkpoint(tmp_path, {"model": model}, step=1)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, {"model": model}, step=2, extra=NOT_PLAIN[message])
    assert loaded(tmp_path, {"model": model}).step == 1


def test_what_is_plain_comes_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    extra = {
        "ordered": OrderedDict(a=1),
        "counted": Counter("aab"),
        ("a", (1, None)): [(1, 2.5), {"s": {3}}],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }
    save_checkpoint(tmp_path, {"model": model}, step=1, extra=extra)
    found = loaded(tmp_path, {"model": model})
    for name in ("parameter", "buffer"):
        assert torch.equal(found.extra.pop(name), extra.pop(name))
    assert found.extra == extra


def test_a_learning_rate_of_numpy_is_saved_as_a_float(tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / 10)))
        return {"model": model, "optimizer": optimizer, "schedule": schedule}

    parts, other = build(), build()
    parts["optimizer"].step()
    parts["schedule"].step()
    save_checkpoint(tmp_path, parts, step=1, extra={"seen": {np.int64(3)}, "best": (np.float32(0.1), np.bool_(True))})
    assert type(parts["optimizer"].param_groups[0]["lr"]) is np.float64  # the run itself is unchanged
    extra = loaded(tmp_path, other).extra
    rate = other["optimizer"].param_groups[0]["lr"]
    assert rate == 0.1 * 0.5 * (1 + math.cos(math.pi / 10)) == other["schedule"].get_last_lr()[0]
    assert extra == {"seen": {3}, "best": (float(np.float32(0.1)), True)}
    assert [type(value) for value in (rate, *extra["seen"], *extra["best"])] == [float, int, float, bool]


def test_what_cannot_be_set_aside_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    for step in (1, 2):
        save_checkpoint(tmp_path, {"model": model}, step=step)
    (tmp_path / "step-00000002" / "worker-0.json").unlink()
    before = other.weight.detach().clone()

    def rename(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="step-00000002 cannot be set aside: Permission denied"):
        load_checkpoint(tmp_path, {"model": other})
    assert torch.equal(other.weight, before)


def test_a_step_that_was_set_aside_earlier_is_kept_until_it_is_old(tmp_path: Path) -> None:
    """A later step of the same number takes the next free name; both go once newer steps are enough."""
    model = torch.nn.Linear(4, 4)
    save_checkpoint(tmp_path, {"model": model}, step=1)
    for damage in (b"first", b"second"):
        save_checkpoint(tmp_path, {"model": model}, step=2)
        (tmp_path / "step-00000002" / "worker-0.pt").write_bytes(damage)
        with pytest.warns(UserWarning, match="step 2 is incomplete or damaged, and is set aside"):
            load_checkpoint(tmp_path, {"model": model})
    names = ("step-00000002.unusable", "step-00000002.unusable-2")
    assert [(tmp_path / name / "worker-0.pt").read_bytes() for name in names] == [b"first", b"second"]
    for step in (3, 4):
        save_checkpoint(tmp_path, {"model": model}, step=step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """In the middle of a tensor, where torch raises an error of its own about positions."""
    one = saved_by(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000006 cannot be written: File too large"):
            save_checkpoint(tmp_path, one.parts, step=6, extra={"large": torch.ones(1_000_000)})
        with pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "file", lambda file: torch.save(torch.ones(1_000_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert loaded(tmp_path, Small().parts).step == 4
