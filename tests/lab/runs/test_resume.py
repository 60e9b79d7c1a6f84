"""python -m lab run --resume: an interrupted run ends as an uninterrupted one, bit for bit; one process at a time."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commandline import command, refused
from forked_python import environment, python
from nightly import nightly
from runs import CONFIG, differences, lines, result

from lab.runs import trainer

PATIENCE = 120.0  # seconds


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


def test_a_finished_run_is_not_changed(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if its summary was lost, which is then no unfinished run."""
    folder = tmp_path / "run"
    assert command("lab", "run", config, "--out", folder) == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert command("lab", "run", config, "--resume", folder) == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (folder / "summary.json").unlink()
    del before[folder / "summary.json"]
    refused(capsys, f"{folder} has the weights of a finished run", "lab", "run", "--resume", folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_another_configuration_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off(monkeypatch, 13, "run", config, "--out", tmp_path / "run", "--checkpoint-every", 6)
    again = ("lab", "run", config, "--resume", tmp_path / "run")
    refused(capsys, "compressor.ratio is 0.2 in CONFIG, but 0.1 in", *again, "--set", "compressor.ratio=0.2")


@contextmanager
def training(*arguments: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a run in a process of its own, which is killed at the end, and wait until it has written a line."""
    command, pipe = [python(), "-W", "error", "-m", "lab", "run", *map(str, arguments)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        try:
            folder, begin = arguments[arguments.index("--out") + 1], time.monotonic()
            while not lines(folder):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() - begin < PATIENCE
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


@pytest.mark.process
def test_sigterm_stops_a_run_that_continues_to_the_same_end(config: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    longer = ("--set", "epochs=4", "log_every=5")
    assert command("lab", "run", config, "--out", straight, *longer) == 0
    with training(config, "--out", stopped, *longer) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert f"to resume: python -m lab run --resume {stopped}" in out
    assert not (stopped / "summary.json").exists()
    assert command("lab", "run", "--resume", stopped) == 0
    assert differences(result(straight), result(stopped)) == []


@pytest.mark.process
def test_a_folder_in_which_a_run_trains_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs would write into one another's files."""
    folder = tmp_path / "run"
    with training(config, "--out", folder, "--set", "epochs=1000"):
        for words in (("--resume", folder), (config, "--out", folder)):
            refused(capsys, f"{folder} is being trained in by ", "lab", "run", *words)


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
