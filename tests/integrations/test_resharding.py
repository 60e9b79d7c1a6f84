"""States of hooks and of local updates that another number of workers restores: nothing that was unsent is lost."""

import importlib.util
import json
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_python
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from packsaddle import Compression, LocalUpdates, TopK, register_ddp_hook
from packsaddle.comm.group import resolve
from packsaddle.integrations import WorkerState, load_state, save_state

SCRIPT = Path(__file__).parents[1] / "support" / "resharding.py"
LIBRARIES = {"lightning": "lightning", "huggingface": "transformers"}
IMPORTED = {"lightning": "lightning.pytorch", "huggingface": "transformers.trainer"}  # once for all workers
ROUNDED = {"rtol": 0.0, "atol": 1e-6}  # float32 sums of parameters below 1 and of three workers' updates


def train(framework: str, folder: Path, workers: int, steps: int) -> str:
    """Run the script and return its output."""
    command: list[Any] = [SCRIPT, framework, folder, steps]
    python = forked_python.python(IMPORTED[framework])
    command = forked_python.torchrun(*command, workers=workers) if workers > 1 else [python, *command]
    environment = forked_python.environment(PYTHON_EXEC=python)
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def states(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The state of each worker in the checkpoint of a step, by rank."""
    found = {}
    for path in folder.rglob("packsaddle*/worker-*.json"):
        manifest = json.loads(path.read_text())
        if manifest["step"] == steps:
            found[manifest["rank"]] = torch.load(path.with_suffix(".pt"))["parts"]
    assert sorted(found) == list(range(len(found)))
    return [found[rank] for rank in sorted(found)]


def dense_y(saved: list[dict[str, Any]], names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """a, and a - mean of e_i + (a - e_i - x_i), by parameter: the error memories and progress since the last round."""
    (first,) = saved[0]["local"]["fragments"]
    mean = {name: torch.zeros_like(a) for name, a in first["anchor"].items()}
    for worker in saved:
        (fragment,) = worker["local"]["fragments"]
        assert any(e.any() for e in fragment["error"].values())
        for (name, a), of_model in zip(fragment["anchor"].items(), names, strict=True):
            e = fragment["error"][name]
            mean[name] += (e + (a - e - worker["model"][of_model])) / len(saved)
    return first["anchor"], {name: a - mean[name] for name, a in first["anchor"].items()}


@pytest.mark.parametrize("framework", LIBRARIES)
def test_frameworks_resume_local_updates_on_another_number_of_workers(framework: str, tmp_path: Path) -> None:
    """2, 1, then 3 workers; each stops within a round, with unsent changes and progress of its own."""
    if importlib.util.find_spec(LIBRARIES[framework]) is None:
        pytest.skip(f"{LIBRARIES[framework]} is not installed")
    counts = []
    for before_workers, workers, before, steps in ((0, 2, 0, 6), (2, 1, 6, 10), (1, 3, 10, 12)):
        printed = train(framework, tmp_path, workers, steps)
        assert ("there is one worker, so its LocalUpdates send nothing" in printed) == (workers == 1)
        start, end = (torch.load(tmp_path / f"{name}-{steps}.pt") for name in ("start", "end"))
        counts += [(one["sent"], one["alone"]) for one in (start, end)]
        assert (start["steps"], end["steps"]) == (before, steps)
        if before:
            many = "s" * (before_workers > 1)
            assert f"saved by {before_workers} worker{many} and is loaded by {workers}: each has the means" in printed
            anchor, y = dense_y(states(tmp_path, before), start["names"])
            torch.testing.assert_close(start["anchor"], anchor, rtol=0.0, atol=0.0)
            torch.testing.assert_close(start["y"], y, **ROUNDED)
            assert any((anchor[name] - y[name]).abs().max() > 1e-3 for name in y)  # 1,000 times the tolerance

    # The bytes of the steps on one worker are none, and the earlier ones stay.
    (sent, alone), (sent_again, alone_again) = counts[1], counts[2]
    assert 0 < sent_again < sent  # without the flush at the end
    assert alone_again == alone == counts[3][1] > 0
    assert counts[3][0] == sent_again
    size = sum(a.numel() * a.element_size() for a in anchor.values())
    assert alone == 6 * size
    assert counts[5][1] == alone + round(2 * size * 4 / 3)


# ---- without a framework


def hook_after(steps: int) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(40, 50))
    hook = register_ddp_hook(model, Compression(TopK(0.1)))
    data = torch.Generator().manual_seed(resolve(None).rank)
    for _ in range(steps):
        model(torch.randn(4, 40, generator=data)).square().mean().backward()
    return hook


def memories(folder: Path, loads: bool) -> dict[str, torch.Tensor]:
    """Save or load a hook's state, and return this worker's error memory by parameter."""
    hook = hook_after(0 if loads else 3)
    if loads:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_state(hook, folder)
        assert len(caught) == (resolve(None).rank == 0)
    else:
        save_state(hook, folder)
    assert hook.steps == 3
    return {name: e.clone() for name, e in hook.memory().items()}


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (3, 1)])
def test_hooks_share_the_mean_of_the_error_memories(
    before: int, after: int, gloo: Callable[..., list[Any]], tmp_path: Path
) -> None:
    saved = gloo(memories, before, tmp_path, False)
    mean = {name: sum(e[name].double() for e in saved) / before for name in saved[0]}
    assert mean["weight"].abs().max() > 1e-3
    for loaded in gloo(memories, after, tmp_path, True):
        for name, e in loaded.items():
            torch.testing.assert_close(e.double(), mean[name], **ROUNDED)


def refusals(folder: Path) -> list[str]:
    found = []
    for damaged in ("one", "kind"):
        with pytest.raises(ValueError, match=r"missing|parts") as caught:
            load_state(hook_after(0), folder / damaged)
        found.append(str(caught.value))
    return found


def test_missing_files_or_another_kind_raise_on_every_worker(gloo: Callable[..., list[Any]], tmp_path: Path) -> None:
    gloo(memories, 3, tmp_path / "one", False)
    (tmp_path / "one" / "packsaddle" / "worker-2.json").unlink()
    optimizer = torch.optim.SGD((model := torch.nn.Linear(40, 50)).parameters())
    save_state(WorkerState(LocalUpdates(optimizer, every=4), model), tmp_path / "kind")
    for one, kind in gloo(refusals, 2, tmp_path):
        assert one.startswith(f"{tmp_path / 'one' / 'packsaddle'}: the files of worker 2 of 3 are missing. Without")
        assert kind == "the parts are hook here, but local, model, optimizer-0 in the checkpoint"


def test_one_worker_without_a_hook_is_warned_of_unused_memories(gloo: Callable[..., list[Any]], tmp_path: Path) -> None:
    gloo(memories, 2, tmp_path, False)
    with pytest.warns(UserWarning, match="has error memories of several workers, which one worker does not use"):
        assert not load_state(None, tmp_path)
