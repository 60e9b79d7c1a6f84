"""The command line as a user meets it: real runs in all three ways of having workers, and one-line refusals."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import command, refused
from forked_python import environment, python, torchrun
from runs import CONFIG as PLAIN

from lab.cli.demo import link_conclusion, link_rows, saddle_conclusion
from lab.runs import run_folder
from lab.runs.report.tables import Row
from lab.runs.tasks import images, text

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


@pytest.mark.nightly
@pytest.mark.slow
def test_momentum_and_local_updates(config: Path, tmp_path: Path) -> None:
    """Each key changes the run, and local updates leave out exchanges."""
    linear = ("compressor={kind='RandomK', ratio=0.1}", "precision=float64", "epochs=0.4")
    variants: dict[str, tuple[str, ...]] = {
        "plain": (),
        "momentum": ("momentum=0.5",),
        "nesterov": ("momentum=0.5", "nesterov=true"),
        "local": ("local={every=4, optimizer='sgd'}",),
    }
    found = {}
    for name, keys in variants.items():
        out = tmp_path / name
        assert command("lab", "run", config, "--workers", 2, "--serial", "--out", out, "--set", *linear, *keys) == 0
        found[name] = json.loads((out / "summary.json").read_text())
    assert len({summary["final_loss"] for summary in found.values()}) == len(variants)
    sent = {name: found[name]["bytes_by_purpose"]["values"]["payload"] for name in variants}
    everything = 8 * found["local"]["compressed_parameters"]  # at the end, since rounds send 6.4 bits a value
    assert (sent["local"] - everything) * 4 == sent["plain"] == sent["momentum"]


@pytest.mark.slow
def test_one_worker_and_report(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "a"
    changes = ("escape.interval=1000", "noise.lower_from=0.5", "plateau=0.1")
    assert command("lab", "run", config, "--out", run, "--set", *changes) == 0
    assert losses(run)[-1] < losses(run)[0]
    capsys.readouterr()
    assert command("lab", "report", tmp_path / "runs") == 0
    page = tmp_path / "runs" / "report" / "index.html"
    assert f"report: {page}" in capsys.readouterr().out.replace("\n", "")
    assert page.exists()
    refused(capsys, "report already exists", "lab", "report", tmp_path / "runs")


ELASTIC = ("--elastic", "http://localhost:1")
REFUSALS = {
    ("run", "none.toml"): "config file none.toml does not exist",
    ("run", "CONFIG", "--set", "compresor.ratio=1"): "unknown key compresor (did you mean compressor?)",
    ("run", "CONFIG", "--set", "compressor={kind='RandomK', k=100000}"): "k of RandomK must be at most d = 10240",
    ("run", "CONFIG", "--set", "data.name=mnist", "--data-dir", "EMPTY"): "mnist is not in --data-dir",
    ("run", "CONFIG", "--workers", "11", "--set", "data.shard=class"): "worker 10 of 11 gets no examples",
    ("run", "CONFIG", "--out", "EMPTY"): "already exists; choose another with --out",
    ("run", "CONFIG", "--timeout", "9", "--serial"): "--timeout applies to worker processes",
    ("run", "CONFIG", *ELASTIC): "--elastic needs [local] in the file",
    ("report", "EMPTY"): "is not a run folder",
    ("report",): "report needs at least one run folder",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.items(), ids=map(" ".join, REFUSALS))
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...],
    message: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": config, "EMPTY": empty}
    refused(capsys, message, "lab", *(names.get(a, a) for a in arguments))
    assert not list(empty.iterdir())
    assert not (tmp_path / "runs").exists()


def test_a_refusal_under_torchrun_is_said_once(config: Path, tmp_path: Path) -> None:
    done = finished(torchrun("-m", "lab", "run", config, "--out", tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("python -m lab: error: output folder") == 1


@pytest.mark.slow
def test_demo_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's whole path in a second or two; its runs at full length are `make demo`, which installs all that they
    need."""
    root = Path(__file__).parents[3]
    names = (root / "Makefile").read_text().partition("\n.venv/.demo: ")[2].partition("'.[")[2].partition("]'")[0]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = {package.partition(">=")[0] for name in names.split(",") for package in extras[name]}
    for package, module in {"scikit-learn": "sklearn", "torchvision": "torchvision"}.items():
        if package not in installed:
            monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    images._load.cache_clear()
    short = ("--epochs", "0.5", "--text-epochs", "0.05")
    assert command("lab", "demo", "--serial", *short, "--out", tmp_path / "demo") == 0
    out = capsys.readouterr().out
    for i, label in enumerate(("dense", "dense + noise", "RandomK 1% + noise", "TopK 1% + noise"), 1):
        assert f"run {i} of 4, {label}: " in out
    for part in ("saddle", "slow-link"):
        assert "<svg" in (tmp_path / "demo" / part / "report" / "index.html").read_text()
    summaries = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "demo").glob("*/*/summary.json")}
    assert summaries["dense"]["compression"] == 1.0
    assert summaries["randomk-noise"]["compression"] > 40
    assert summaries["topk-noise"]["compression"] > 25
    # Each worker makes the same number of steps in the three runs of the second part.
    assert len({summaries[name]["steps"] for name in ("alone", "dense-adamw", "local-updates")}) == 1


def test_the_demo_writes_nothing_if_its_input_is_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither into a folder that exists, nor if the second part cannot be run."""
    assert command("lab", "demo", "--out", tmp_path) == 2
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # importing Python's own text fails
    text._encoded.cache_clear()
    assert command("lab", "demo", "--out", tmp_path / "demo") == 2
    assert list(tmp_path.iterdir()) == []


def demo_row(**values: Any) -> Row:
    return replace(Row("", 0, True, None, None, None, None, None, None, 1.0, None, 1.0), **values)


def test_the_demo_ends_with_its_meaning() -> None:
    """From its table's rows; if the runs were too short to leave the saddle, it claims nothing."""
    stalled = demo_row(compression=1.0, plateau_epochs=57.5, left_plateau=False)
    runs = (1.0, 18.5), (54.0, 25.0), (47.3, 20.0)
    noisy = [demo_row(compression=c, plateau_epochs=epochs, left_plateau=True) for c, epochs in runs]
    sentence = saddle_conclusion([stalled, *noisy])
    assert "after 18 to 25 epochs" in sentence
    assert "1/47 of the bytes" in sentence
    assert saddle_conclusion([stalled, *noisy[:2], stalled]) == ""
    assert saddle_conclusion([noisy[0], *noisy]) == ""


def test_the_demo_computes_the_times_of_a_link() -> None:
    """Computing, and then the bytes over 50 Mbit/s; dense training, which was one process, as long as its workers."""
    runs = (2.2, 200.0, 8.0), (2.0, 250.0, 19.0), (2.1, 2.5, 10.0)
    alone, dense, local = link_rows([demo_row(test_loss=a, megabytes=b, seconds=c) for a, b, c in runs], 2)
    # In a ring of two workers each sends as many bytes as a vector has.
    assert (alone.megabytes, dense.megabytes, local.megabytes) == (0.0, 250.0, 2.5)
    assert (alone.seconds, dense.seconds, local.seconds) == pytest.approx((8.0, 10.0 + 40.0, 10.0 + 0.4))
    sentence = link_conclusion([alone, dense, local])
    assert "1/100 of the bytes" in sentence
    assert "take 10 seconds instead of 50" in sentence
    assert link_conclusion([alone, dense, local._replace(loss=2.3)]) == ""


def test_demo_plateau_is_the_best_constant() -> None:
    from lab.runs.config import DataConfig
    from lab.runs.tasks.images import load_images
    from lab.runs.templates import PLATEAU

    images = load_images(DataConfig("digits"), None, train=True)
    pixels = images.pixels(torch.arange(len(images)))
    assert float((pixels - pixels.mean(0)).square().mean()) == pytest.approx(PLATEAU, rel=0.01)


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
