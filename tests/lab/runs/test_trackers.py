"""A run's numbers in TensorBoard, Weights & Biases and MLflow: what each library reads back is what was written."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from commandline import command, refused

from lab.runs.trackers import MLflow, Outcome, TensorBoard, Tracker, WandB, tracked
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
WRITTEN = [({"loss": 2.5, "mu_by_tensor/0.weight": 0.25}, 5), ({"loss": 1.5, "sent": 2.0**40 + 1}, 10)]


def needs(library: str) -> None:
    """Skip without the library, which is not imported for it: here warnings are errors, also its own."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def in_a_process(code: str, *arguments: Path | str) -> Any:
    """Run code that prints JSON last, away from this process's warnings being errors."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **QUIET}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


QUIET = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
WRITE = f"""
import sys
from pathlib import Path
from lab.runs.trackers import MLflow, TensorBoard, WandB
folder = Path(sys.argv[1])
outcome = (*sys.argv, "finished")[2]
config = {{"lr": 0.1, "compressor": {{"kind": "TopK", "ratio": 0.05}}}}
def write(tracker):
    for metrics, step in {WRITTEN!r}:
        tracker.log(metrics, step)
    tracker.finish(outcome)
"""
READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0}).Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""
READ_WANDB = """
import json, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2
(path,) = Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")
data, start, rows, run = path.read_bytes(), 7, [], {}
assert len(data) < 32768  # LevelDB's log format, in one block: checksum, length, kind, record
while start < len(data):
    end = start + 7 + int.from_bytes(data[start + 4 : start + 6], "little")
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data[start + 7 : end])
    start = end
    kind = record.WhichOneof("record_type")
    if kind == "history":
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        rows.append([items.pop("_step"), {k: v for k, v in items.items() if not k.startswith("_")}])
    if kind == "run":
        config = {u.key or u.nested_key[0]: json.loads(u.value_json) for u in record.run.config.update}
        run = {"name": record.run.display_name, "project": record.run.project, "lr": config["lr"]}
print(json.dumps([run, rows]))
"""
READ_MLFLOW = """
import json, os
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("packsaddle").experiment_id])
history = {k: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, k)] for k in run.data.metrics}
print(json.dumps([run.info.run_name, run.info.status, run.data.params, history, os.listdir()]))
"""


def by_name(written: list[tuple[Mapping[str, float], int]]) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for metrics, step in written:
        for name, value in metrics.items():
            found.setdefault(name, []).append([step, value])
    return found


def test_weights_and_biases_reads_what_was_logged(tmp_path: Path) -> None:
    needs("wandb")
    in_a_process(WRITE + "write(WandB(folder, name='a', config=config)); print(0)", tmp_path)
    run, rows = in_a_process(READ_WANDB, tmp_path)
    assert run == {"name": "a", "project": "packsaddle", "lr": 0.1}
    assert rows == [[step, metrics] for metrics, step in WRITTEN]


@pytest.mark.parametrize("outcome", ["finished", "failed", "killed"])
def test_mlflow_reads_what_was_logged(outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code = WRITE + "write(MLflow(folder, name='a', config=config))" + READ_MLFLOW
    name, status, params, history, left = in_a_process(code, tmp_path / "store", outcome)
    assert (name, status, left) == ("a", outcome.upper(), [])
    assert params == {"lr": "0.1", "compressor.kind": "TopK", "compressor.ratio": "0.05"}
    assert history == by_name(WRITTEN)


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


def test_a_run_that_is_stopped_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr("lab.runs.trackers.MLflow", lambda *_, **__: recorder)
    monkeypatch.setattr("lab.runs.job.require_tracker", lambda name: None)
    monkeypatch.setattr("lab.runs.job.Trainer.run", lambda *_, **__: False)
    (tmp_path / "config.toml").write_text(CONFIG)
    command("lab", "run", tmp_path / "config.toml", "--out", tmp_path / "run", "--track", "mlflow")
    assert recorder.finished == ["killed"]


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("failed", 1), ("killed", 130)])
def test_the_libraries_are_told_the_outcome(
    outcome: Outcome, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By calls of their documented interfaces, recorded: the other tests use the libraries if they are installed."""
    mlflow, wandb = MagicMock(), MagicMock()
    monkeypatch.setattr("lab.runs.trackers.require_tracker", {"mlflow": mlflow, "wandb": wandb}.get)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    MLflow(tmp_path).finish(outcome)
    client = mlflow.MlflowClient.return_value
    client.set_terminated.assert_called_once_with(client.create_run.return_value.info.run_id, status=outcome.upper())
    WandB(tmp_path).finish(outcome)
    wandb.init.return_value.finish.assert_called_once_with(exit_code=code)


def test_scalars_are_the_numbers() -> None:
    values = {"a": 1, "b": True, "c": None, "d": "x", "e": {"f": 2.5, "g": {"h": 3}}, "i": [1.0]}
    assert scalars(values, "p/") == {"p/a": 1.0, "p/e/f": 2.5, "p/e/g/h": 3.0}


def test_the_adapters_are_trackers() -> None:
    kinds: list[type[Tracker]] = [TensorBoard, WandB, MLflow]
    assert all(callable(kind.log) and callable(kind.finish) for kind in kinds)
