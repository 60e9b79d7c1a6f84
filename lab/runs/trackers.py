"""Experiment trackers that record a run's metrics on this machine: TensorBoard, Weights & Biases and MLflow.

A tracker is any object with `log` and `finish`. No data leaves the machine unless an environment variable of the
library (WANDB_MODE, MLFLOW_TRACKING_URI) is set to send it. The libraries' telemetry is off unless such a variable
enables it.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from lab.runs.run_folder import RunFolder
from packsaddle.errors import require
from packsaddle.integrations.callbacks import scalars

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Outcome = Literal["finished", "failed", "killed"]  # the outcome of a run; "killed": interrupted or terminated
_EXIT_CODES: Mapping[Outcome, int] = {"finished": 0, "failed": 1, "killed": 130}
_FINAL = ("final_loss", "test_loss", "test_accuracy")  # results in summary.json that may be missing in metrics.jsonl


class Tracker(Protocol):
    """Interface of a tracker, which records the metrics of a run on one process."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the `metrics` of a step, by name; `step` never decreases between calls."""

    def finish(self, outcome: Outcome = "finished") -> None:
        """Record the outcome of the run, flush and close."""


class TensorBoard:
    """A tracker that writes event files to a folder, which `tensorboard --logdir FOLDER` shows.

    Raises MissingExtraError without tensorboard.
    """

    def __init__(self, folder: Path) -> None:
        require_tracker("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the `metrics` of a step as scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, outcome: Outcome = "finished") -> None:
        """Close the event file, which has no field for the `outcome`."""
        self._writer.close()


class WandB:
    """A tracker that records a Weights & Biases run in `folder`/wandb.

    The run is offline, for upload with `wandb sync`, unless WANDB_MODE is set. `project`, `name` and `config` are
    passed to `wandb.init`. Raises MissingExtraError without wandb.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str = "packsaddle",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        wandb = require_tracker("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=name,
            config=dict(config or {}),
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),  # wandb prints nothing and does not capture output
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the `metrics` of a step as one row."""
        self._run.log(dict(metrics), step=step)

    def finish(self, outcome: Outcome = "finished") -> None:
        """Record the outcome as the exit code (0, 1 or 130), flush and close."""
        self._run.finish(exit_code=_EXIT_CODES[outcome])


class MLflow:
    """A tracker that records an MLflow run in `folder`/mlflow.db (SQLite), or in the store at MLFLOW_TRACKING_URI.

    `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db` shows it. `experiment` and `name` are the names of the
    experiment and the run; `config` is logged as the run's parameters. Raises MissingExtraError without mlflow.
    """

    def __init__(
        self,
        folder: Path,
        *,
        experiment: str = "packsaddle",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._metric = require_tracker("mlflow").Metric
        from mlflow import MlflowClient

        folder.mkdir(parents=True, exist_ok=True)
        store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve()}/mlflow.db")
        self._client = MlflowClient(tracking_uri=store)
        known = self._client.get_experiment_by_name(experiment)
        where = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run_id = self._client.create_run(where, run_name=name).info.run_id
        for key, value in _flat(config or {}):
            self._client.log_param(self._run_id, key, value)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the `metrics` of a step as one batch."""
        now = int(time.time() * 1000)
        found = [self._metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=found)

    def finish(self, outcome: Outcome = "finished") -> None:
        """Mark the run as FINISHED, FAILED or KILLED, as `outcome` says."""
        self._client.set_terminated(self._run_id, status=outcome.upper())


_LIBRARIES: Mapping[TrackerName, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow.entities"}
_REPORTS_OFF = {"wandb": {"WANDB_ERROR_REPORTING": "false"}, "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"}}


def require_tracker(name: TrackerName) -> Any:
    """Import a tracker's library with telemetry off. Raises MissingExtraError, which names the extra."""
    for variable, value in _REPORTS_OFF.get(name, {}).items():
        os.environ.setdefault(variable, value)
    return require(_LIBRARIES[name], "track", f"tracking with {name}")


class TrackedFolder(RunFolder):
    """A run folder that also sends metrics, certificates and final results to trackers."""

    is_stopped = False  # True: the run was terminated, and has saved a checkpoint

    def __init__(self, path: Path, trackers: Sequence[Tracker]) -> None:
        super().__init__(path)
        self._trackers = trackers

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to a .jsonl file, and log its numbers.

        Numbers in metrics.jsonl are logged as NAME, and numbers in every other file as FILE/NAME.
        """
        super().append(name, line)
        found = scalars(line, "" if name == "metrics.jsonl" else name.removesuffix(".jsonl") + "/")
        self._log({key: value for key, value in found.items() if key.split("/")[-1] != "step"}, line["step"])

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        super().write_json(name, content)
        if name == "summary.json":
            self._log(scalars({key: content[key] for key in _FINAL if key in content}), content["steps"])

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step)


@contextmanager
def tracked(path: Path, names: Sequence[TrackerName], label: str, config: Mapping[str, Any]) -> Iterator[TrackedFolder]:
    """Context manager that yields a run folder with the named trackers, which write inside the folder.

    On exit the trackers are finished with the outcome of the block. An exception means "failed"; KeyboardInterrupt,
    SystemExit and `TrackedFolder.is_stopped` mean "killed".
    """
    trackers: list[Tracker] = []
    folder = TrackedFolder(path, trackers)

    def finish(tracker: Tracker, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        tracker.finish("failed" if failed else "finished" if kind is None and not folder.is_stopped else "killed")

    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            match name:
                case "tensorboard":
                    trackers.append(TensorBoard(path / "tensorboard"))
                case "wandb":
                    trackers.append(WandB(path, name=label, config=config))  # it creates the subfolder wandb
                case "mlflow":
                    trackers.append(MLflow(path / "mlflow", name=label, config=config))
            stack.push(partial(finish, trackers[-1]))
        yield folder


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
