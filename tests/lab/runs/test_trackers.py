"""A run's numbers in TensorBoard, Weights & Biases and MLflow: what each library reads back is what was written."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from commandline import command, refused

from lab.runs.trackers import MLflow, Outcome, Tracker, WandB, tracked
from packsaddle.integrations.callbacks import scalars

CONFIG = """
lr = 0.1
epochs = 1.0
batch_size = 64
log_every = 5
[data]
name = "digits"
[model]
name = "autoencoder"
widths = [32, 8]
[compressor]
kind = "TopK"
ratio = 0.05
[certify]
epsilon = 0.1
every = 0.5
examples = 100
max_hvps = 2
"""


def needs(library: str) -> None:
    """Skip without the library, which is not imported for it: here warnings are errors, also its own."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def in_a_process(code: str, *arguments: Path | str) -> Any:
    """Run code that prints JSON last, away from this process's warnings being errors."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0}).Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


def test_a_run_is_in_tensorboard_as_it_is_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("tensorboard")
    (tmp_path / "config.toml").write_text(CONFIG)
    folder = tmp_path / "run"
    run = "import sys; from lab.__main__ import main; sys.argv[1:1] = ['run', '--serial', '--workers', '2']"
    in_a_process(run + "; main(); print(0)", tmp_path / "config.toml", "--out", folder, "--track", "tensorboard")
    events = in_a_process(READ_EVENTS, folder / "tensorboard")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert len(lines) >= 2
    for name in ("loss", "grad_norm", "epoch", "sent", "received", "payload", "seconds", "resets", "mu"):
        assert events[name] == [[line["step"], pytest.approx(line[name], rel=1e-6)] for line in lines]  # float32 files
    for tensor in lines[0]["mu_by_tensor"]:
        assert len(events[f"mu_by_tensor/{tensor}"]) == len(lines)
    for name in ("final_loss", "test_loss"):
        assert events[name] == [[summary["steps"], pytest.approx(summary[name], rel=1e-6)]]
    certified = [json.loads(line) for line in (folder / "certificates.jsonl").read_text().splitlines()]
    assert len(certified) >= 2
    expected = [[line["step"], pytest.approx(line["grad_norm"], rel=1e-6)] for line in certified]
    assert events["certificates/grad_norm"] == expected
    assert not {name for name in events if name.split("/")[-1] == "step"}


def test_without_the_library_a_run_says_so_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = "tracking with wandb needs wandb: pip install 'packsaddle[track]'"
    folder = tmp_path / "run"
    refused(capsys, message, "lab", "run", tmp_path / "config.toml", "--out", folder, "--track", "wandb")
    assert not folder.exists()
    assert command("lab", "run", tmp_path / "config.toml", "--out", folder, "--track", "tensorbord") == 2
    assert not folder.exists()


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, float], int]] = []
        self.finished: list[Outcome] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.seen.append((dict(metrics), step))

    def finish(self, outcome: Outcome = "finished") -> None:
        self.finished.append(outcome)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(ZeroDivisionError, "failed"), (KeyboardInterrupt, "killed"), (SystemExit, "killed"), (None, "finished")],
)
def test_trackers_record_the_outcome_of_a_run(
    error: type[BaseException] | None, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder: Tracker = Recorder()
    monkeypatch.setattr("lab.runs.trackers.TensorBoard", lambda folder: recorder)

    def fail() -> None:
        with tracked(tmp_path, ["tensorboard"], "a", {}) as folder:
            folder.append("metrics.jsonl", {"step": 3, "loss": 1.0, "mu": None, "mu_by_tensor": {"w": 0.5}})
            if error is not None:
                raise error

    with pytest.raises(error) if error else nullcontext():
        fail()
    assert isinstance(recorder, Recorder)
    assert recorder.seen == [({"loss": 1.0, "mu_by_tensor/w": 0.5}, 3)]
    assert recorder.finished == [outcome]


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("failed", 1), ("killed", 130)])
def test_the_libraries_are_given_numbers_and_the_outcome(
    outcome: Outcome, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By calls of their documented interfaces, recorded: they need not be installed."""
    mlflow, wandb = MagicMock(), MagicMock()
    monkeypatch.setattr("lab.runs.trackers.require_tracker", {"mlflow": mlflow, "wandb": wandb}.get)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    trackers: list[Tracker] = [MLflow(tmp_path), WandB(tmp_path)]
    for tracker in trackers:
        tracker.log({"loss": 2.5}, 5)
        tracker.finish(outcome)
    client, run = mlflow.MlflowClient.return_value, wandb.init.return_value
    client.set_terminated.assert_called_once_with(client.create_run.return_value.info.run_id, status=outcome.upper())
    run.log.assert_called_once_with({"loss": 2.5}, step=5)
    run.finish.assert_called_once_with(exit_code=code)


def test_scalars_are_the_numbers() -> None:
    values = {"a": 1, "b": True, "c": None, "d": "x", "e": {"f": 2.5, "g": {"h": 3}}, "i": [1.0]}
    assert scalars(values, "p/") == {"p/a": 1.0, "p/e/f": 2.5, "p/e/g/h": 3.0}
