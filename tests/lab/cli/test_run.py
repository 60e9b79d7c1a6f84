"""The command line as a user meets it: real runs in all three ways of having workers, and one-line refusals."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import command, refused
from forked_python import environment, python, torchrun
from runs import CONFIG as PLAIN

from lab.runs import run_folder

CONFIG = (
    PLAIN
    + """[escape]
interval = 8
radius = 2.0
"""
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


def finished(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=180, env=environment())


def lab(*arguments: Any) -> list[str]:
    return [python(), "-W", "error", "-m", "lab", *map(str, arguments)]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_processes_serial_and_torchrun_give_the_same_run(config: Path, tmp_path: Path) -> None:
    """The same two workers three ways; also what a run folder holds."""
    folders = {name: tmp_path / name for name in ("processes", "serial", "torchrun")}
    done = finished(lab("run", config, "--workers", 2, "--out", folders["processes"]))
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stdout
    assert "MB per worker: without rank 0's parameters at the start" in done.stdout
    assert command("lab", "run", config, "--workers", 2, "--serial", "--out", folders["serial"]) == 0
    done = finished(torchrun("-m", "lab", "run", config, "--out", folders["torchrun"]))
    assert done.returncode == 0, done.stderr

    summaries = {name: json.loads((folder / "summary.json").read_text()) for name, folder in folders.items()}
    for name, folder in folders.items():
        assert losses(folder) == pytest.approx(losses(folders["serial"]), rel=1e-4), name
        assert summaries[name]["bytes_by_purpose"] == summaries["serial"]["bytes_by_purpose"]
        assert summaries[name]["test_loss"] == pytest.approx(summaries["serial"]["test_loss"], rel=1e-4)
        assert summaries[name]["workers"] == 2
        assert (summaries[name]["exchange"], summaries[name]["exchange_reason"]) == ("all-gather", "asked for")
        assert len(summaries[name]["resets"]) >= 2
        saved = json.loads((folder / "config.json").read_text())
        assert (saved["compressor"]["kind"], saved["compressor"]["ratio"]) == ("TopK", 0.1)
        assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
        for part in ("model", "worker-0", "worker-1"):
            torch.load(folder / "checkpoint" / f"{part}.pt", weights_only=True)
        assert not list(folder.rglob("*.partial"))
    errors = [torch.load(folders["processes"] / "checkpoint" / f"worker-{i}.pt")["state"][0]["error"] for i in (0, 1)]
    assert not torch.equal(errors[0], errors[1])


@pytest.mark.slow
def test_init_run_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that `init` writes trains as it stands, except for the number of passes, and in one process."""
    monkeypatch.chdir(tmp_path)
    assert command("lab", "init", "--task", "digits") == 0
    assert command("lab", "run", "config.toml", "--serial", "--set", "epochs=0.5", "--out", "runs/a") == 0
    assert json.loads(Path("runs/a/summary.json").read_text())["workers"] == 2
    assert command("lab", "report", "runs") == 0
    assert "<svg" in Path("runs/report/index.html").read_text()
    refused(capsys, "report already exists", "lab", "report", "runs")


REFUSALS = {
    ("run", "none.toml"): "config file none.toml ",
    ("run", "CONFIG", "--set", "data.name=mnist", "--data-dir", "EMPTY"): "mnist is not in --data-dir",
    ("run", "CONFIG", "--out", "EMPTY"): "already exists; choose another with --out",
    ("report", "EMPTY"): "is not a run folder",
    ("report",): "report: missing RUNS",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.items(), ids=map(" ".join, REFUSALS))
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    names = {"CONFIG": config, "EMPTY": empty}
    refused(capsys, message, "lab", *(names.get(a, a) for a in arguments))
    assert not list(empty.iterdir())


def test_a_run_records_the_commit_and_if_its_code_had_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "lab" / "runs" / "run_folder.py"))

    def git(*words: str) -> str:
        call = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    def recorded_after(name: str, text: str) -> str | None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        run_folder.commit.cache_clear()
        return run_folder.commit()

    assert [recorded_after(f"{folder}/file.py", "") for folder in ("src", "lab", "docs")] == [None] * 3
    for words in ("init --quiet", "add .", "commit --quiet --message first"):
        git(*words.split())
    head = git("rev-parse", "--short=12", "HEAD")
    assert recorded_after("docs/file.py", "changed") == head
    assert recorded_after("src/file.py", "changed") == f"{head}+"
    run_folder.commit.cache_clear()
