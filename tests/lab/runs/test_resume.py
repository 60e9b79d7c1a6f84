"""python -m lab run --resume: a run that was cut off goes on as if it had not been, bit for bit."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commandline import command, refused
from nightly import nightly
from runs import CONFIG, differences, lines, result

from lab.runs import trainer
from lab.runs.run_folder import RunFolder
from packsaddle.comm.launching import asked_to_stop


class Cut(BaseException):
    """What ends a run in its midst."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


def cut_off(monkeypatch: pytest.MonkeyPatch, step: int, *arguments: Any) -> None:
    """Run a command that is ended before a step of its training."""
    real = trainer.Trainer._step

    def cut(self: trainer.Trainer, now: int, scalars: Any) -> Any:
        if now == step:
            raise Cut
        return real(self, now, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", cut)
        with pytest.raises(Cut):
            command("lab", *arguments)


VARIANTS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "one": ((), ("escape={interval=8, radius=2.0}", "certify={epsilon=0.01, iterates=4, every=0.3, max_hvps=2}")),
    "serial": (
        ("--workers", 2, "--serial"),
        ("exchange=two-way", "momentum=0.5", "test_every=0.3", "epochs=2", "noise={std=0.01, lower_from=0.5}"),
    ),
    "fused": (("--workers", 3, "--fused"), ("compressor={kind='RandomK', ratio=0.1}", "epochs=3")),
    "local": (
        ("--workers", 2, "--serial"),
        (
            "lr=0.003",
            "local={every=4, overlap={delay=1, fragments=2}, outer={lr=0.7, momentum=0.5}, warm_up=0.5, clip=0.1}",
            "local.optimizer=adamw",
            "local.schedule=cosine",
            "epochs=2",
            "log_every=7",
            "test_every=0.4",
            "noise={std=0.001, lower_from=0.5}",
            "certify={epsilon=0.01, iterates=4, every=0.3, max_hvps=2}",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*map(nightly, ("one", "serial", "fused")), "local"])
def test_a_run_that_was_cut_off_goes_on(
    name: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off twice, the second time before there is a newer checkpoint; with lines after the checkpoint."""
    how, keys = VARIANTS[name]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    options = (*how, "--checkpoint-every", 6)
    assert command("lab", "run", config, *options, "--out", straight, "--set", *keys) == 0
    total = json.loads((straight / "summary.json").read_text())["steps"]
    cut_off(monkeypatch, 17, "run", config, *options, "--out", parts, "--set", *keys)
    saved = sorted(p.name for p in (parts / "checkpoint").iterdir())
    assert saved == ["step-00000006", "step-00000012"]
    cut_off(monkeypatch, 16, "run", "--resume", parts, *options)
    whole = (parts / "metrics.jsonl").read_text()
    (parts / "metrics.jsonl").write_text(whole + '{"step": 99, "lo')  # what a power cut may leave
    capsys.readouterr()
    assert command("lab", "run", "--resume", parts, *options) == 0
    assert f"{parts}: continues from step 12 of {total}" in capsys.readouterr().out.replace("\n", "")
    a, b = result(straight), result(parts)
    assert differences(a, b) == []
    assert len(a["metrics"]) >= 2
    assert a["files"].count("metrics.jsonl") == 1
    assert not [file for file in a["files"] if "step-" in file and "checkpoint" in file]
    environment = json.loads((parts / "environment.json").read_text())
    assert len(environment["resumed"]) == 2


def test_checkpoints_change_nothing(config: Path, tmp_path: Path) -> None:
    """The weights are those of a run without any; its messages have one number more a step."""
    for every in (0, 5):
        options = ("--workers", 2, "--serial", "--checkpoint-every", every)
        assert command("lab", "run", config, *options, "--out", tmp_path / str(every)) == 0
    a, b = (result(tmp_path / name) for name in ("0", "5"))
    assert a["checkpoints"]["model.pt"] == b["checkpoints"]["model.pt"]
    sent = [r["summary"]["bytes_by_purpose"]["dense"]["payload"] for r in (a, b)]
    assert sent[1] - sent[0] == 4 * a["summary"]["steps"]


def test_resuming_before_there_is_a_checkpoint_and_when_all_is_done(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    again = ("run", config, "--resume", folder)

    def cut(*arguments: Any) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("lab.runs.job.environment", cut)
        with pytest.raises(Cut):
            command("lab", *again)
        patch.setattr("lab.runs.job.environment", lambda *arguments: {})
        real = RunFolder.write_json
        patch.setattr(RunFolder, "write_json", lambda self, *rest: (real(self, *rest), cut()))
        with pytest.raises(Cut):  # at the first file of a run
            command("lab", *again)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    cut_off(monkeypatch, 15, *again)
    assert len(lines(folder)) == 1
    assert command("lab", *again) == 0
    assert len(lines(folder)) == 4
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    for arguments in (again, ("run", "--resume", folder)):
        assert command("lab", *arguments) == 0
        assert f"{folder} is done: nothing to continue" in capsys.readouterr().out.replace("\n", "")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert command("lab", "run", config, "--out", tmp_path / "straight") == 0
    assert differences(result(tmp_path / "straight"), result(folder)) == []


def test_a_finished_run_without_its_summary_is_not_overwritten(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert command("lab", "run", config, "--out", folder) == 0
    (folder / "summary.json").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    said = f"--resume: {folder} has the weights of a finished run (checkpoint/model.pt), but no summary.json"
    for arguments in (("run", "--resume", folder), ("run", config, "--resume", folder)):
        refused(capsys, said, "lab", *arguments)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_signal_to_stop(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM: a checkpoint at the next exchange, the command that goes on, and code 0."""
    straight, folder = tmp_path / "straight", tmp_path / "a run"
    options = ("--workers", 2, "--serial", "--set", "local={every=2, optimizer='sgd'}")
    assert command("lab", "run", config, *options, "--out", straight) == 0
    real = trainer.Trainer._step

    def step(self: trainer.Trainer, now: int, scalars: Any) -> Any:
        if now == 10 and self.group.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while not asked_to_stop():  # the main thread hears of it
                time.sleep(0.01)
        return real(self, now, scalars)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", step)
        capsys.readouterr()
        assert command("lab", "run", config, *options, "--out", folder) == 0
    hint = f"python -m lab run --resume '{folder}' --workers 2 --serial"
    (stopped,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped")]
    at = json.loads((folder / "stopped.json").read_text())
    assert stopped == f"stopped at step {at['step']} of 20; to resume: {hint}"
    assert at["step"] == 12
    assert not (folder / "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert command("lab", "run", "--resume", folder, "--workers", 2, "--serial") == 0
    assert differences(result(straight), result(folder)) == []


REFUSED: list[tuple[tuple[Any, ...], str]] = [
    (("run", "CONFIG", "--resume", "run", "--out", "run"), "--resume already sets the folder; leave out --out"),
    (("run",), "run needs CONFIG, a TOML file (python -m lab init writes one), or --resume RUN_DIR"),
    (("run", "--resume", "run", "--set", "lr=1"), "--set needs CONFIG"),
    (("run", "CONFIG", "--resume", "other"), "other is not a run folder (it has no config.json), and is not empty"),
    (
        ("run", "CONFIG", "--resume", "run", "--set", "compressor.ratio=0.2"),
        "--resume: compressor.ratio is 0.2 in CONFIG, but 0.1 in run/config.json",
    ),
    (("run", "--resume", "certified", "--workers", "3", "--serial"), "cannot continue with 3 workers: it started"),
    (("run", "--resume", "damaged"), "damaged/checkpoint has no intact checkpoint: step 12: damaged/checkpo"),
]


def test_refusals(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    every = ("--checkpoint-every", 6)
    cut_off(monkeypatch, 13, "run", config, "--out", "run", *every)
    cut_off(monkeypatch, 13, "run", config, "--out", "certified", *every, "--set", "certify={epsilon=1.0}")
    cut_off(monkeypatch, 13, "run", config, "--out", "damaged", *every)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for step in (6, 12):
        file = tmp_path / "damaged" / "checkpoint" / f"step-{step:08d}" / "worker-0.pt"
        file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    for arguments, message in REFUSED:
        refused(capsys, message, "lab", *(str(config) if word == "CONFIG" else word for word in arguments))
    assert command("lab", "run", "--resume", "run") == 0


@pytest.mark.slow
def test_another_number_of_workers(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run begun by two goes on with three, and then with one, and ends after as many epochs."""
    folder, every = tmp_path / "run", ("--checkpoint-every", 6, "--serial")
    keys = ("--set", "epochs=3", "noise={std=0.001, lower_from=1.0}")
    cut_off(monkeypatch, 15, "run", config, "--workers", 2, "--out", folder, *every, *keys)
    cut_off(monkeypatch, 27, "run", "--resume", folder, "--workers", 3, *every)
    out = capsys.readouterr().out
    assert "the checkpoint of step 12 was saved by 2 workers and is loaded by 3: each loads the mean of" in out
    assert command("lab", "run", "--resume", folder, "--workers", 1, *every) == 0
    out = capsys.readouterr().out
    assert "the checkpoint of step 24 was saved by 3 workers and is loaded by 1" in out
    found = lines(folder)
    # 12 of 20 steps an epoch with 2 workers, 12 of 13 with 3, and the rest with 40.
    done = 12 / 20 + 12 / 13
    last = 24 + round((3 - done) * 40)
    assert [line["step"] for line in found] == [10, 20, *range(30, last, 10), last]
    assert found[1]["epoch"] == pytest.approx(12 / 20 + 8 / 13)
    assert found[-1]["epoch"] == pytest.approx(3, abs=1 / 40)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["workers"], summary["steps"]) == (1, found[-1]["step"])
    losses = [line["loss"] for line in found if line["epoch"] > 2]
    assert min(losses) <= summary["final_loss"] <= max(losses)
    assert found[-1]["loss"] < found[0]["loss"]
