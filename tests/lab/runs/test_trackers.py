"""A run's numbers in experiment trackers."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
from commandline import command
from runs import CONFIG

from lab.runs.trackers import Outcome, Tracker, tracked
from packsaddle.integrations.callbacks import scalars


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_a_run_is_in_tensorboard_as_it_is_in_its_folder(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "config.toml").write_text(CONFIG)
    folder = tmp_path / "run"
    assert command("lab", "run", tmp_path / "config.toml", "--out", folder, "--track", "tensorboard") == 0
    events = reading.EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "grad_norm", "sent"):
        written = [[line["step"], pytest.approx(line[name], rel=1e-6)] for line in lines]  # the files are in float32
        assert [[event.step, event.value] for event in events.Scalars(name)] == written


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


def test_scalars_are_the_numbers() -> None:
    values = {"a": 1, "b": True, "c": None, "d": "x", "e": {"f": 2.5, "g": {"h": 3}}, "i": [1.0]}
    assert scalars(values, "p/") == {"p/a": 1.0, "p/e/f": 2.5, "p/e/g/h": 3.0}
