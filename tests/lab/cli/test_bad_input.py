"""Bad files and a bad environment: one line that says what is wrong, code 2, and nothing lost."""

import json
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import refused

from lab.runs.config import DataConfig, load
from lab.runs.run_folder import read_runs
from lab.runs.tasks.images import load_data
from packsaddle.errors import ConfigError

CONFIG = """lr = 0.5
epochs = 1
batch_size = 16
log_every = 1
[data]
name = "digits"
limit = 640
[model]
name = "autoencoder"
widths = [64, 16]
"""

# Contents of a configuration file, or one --set beside a good file, and the message.
CONFIGURATIONS: dict[str, tuple[bytes | str, str]] = {
    "binary": (bytes(range(256)), "must be UTF-8, but byte 128 is not"),
    "empty": (b"", "missing key data"),
    "deep list": (b"lr = " + b"[" * 100_000, "is not valid TOML: maximum recursion depth exceeded"),
    "nul": (b"lr = 1\0", "(at line 1, column 7)"),
    "long value": (b"lr = '" + b"x" * 50_000 + b"'", " ... "),
    "terminal": ("data.name=\x1b[31mred", "got '\\x1b[31mred'"),
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = CONFIGURATIONS[name]
    words: list[Any] = ["lab", "run", config, "--out", tmp_path / "never"]
    if isinstance(content, bytes):
        config.write_bytes(content)
    else:
        words += ["--set", content]
    refused(capsys, message, *words)
    assert not (tmp_path / "never").exists()


LINE = {"step": 10, "epoch": 1.0, "loss": 1.0, "grad_norm": 1.0, "sent": 10, "payload": 10, "seconds": 1.0}
CERTIFICATE = {"step": 10, "epoch": 1.0, "verdict": "saddle", "loss": 0.5, "lambda_min_lower": -2.0}
RUN: dict[str, Any] = {
    "config.json": {"label": "x", "seed": 1},
    "environment.json": {"packsaddle": "9.9"},
    "metrics.jsonl": LINE,
    "summary.json": {"steps": 10, "final_loss": 1.0},
    "certificates.jsonl": {**CERTIFICATE, "lambda_min_upper": -1.0, "threshold": -0.1},
}
# A file of a run folder, its content or None for a folder in its place, and the message.
DAMAGE: list[tuple[str, bytes | None, str]] = [
    ("config.json", b'{"seed": 1', "config.json: not valid JSON"),
    ("environment.json", b"3", "environment.json must be a JSON object, got 3"),
    ("metrics.jsonl", b"{\n{}\n", "metrics.jsonl, line 1: not valid JSON"),
    ("summary.json", None, "summary.json cannot be read: Is a directory"),
]


def make_run(folder: Path) -> Path:
    folder.mkdir()
    for name, content in RUN.items():
        (folder / name).write_text(json.dumps(content) + "\n")
    return folder


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE)
def test_run_folders(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run")
    assert read_runs([folder])[0].metrics == [LINE]
    if content is None:
        (folder / name).unlink()
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    refused(capsys, message, "lab", "report", folder)
    if content and name != "environment.json":
        refused(capsys, "is damaged (packsaddle 9.9 wrote it", "lab", "report", folder)
    assert not (folder / "report").exists()


def test_cifar_files_that_are_not_cifar(tmp_path: Path) -> None:
    """They are pickles: torchvision compares their MD5 with CIFAR's before it opens any."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    with pytest.raises(ConfigError, match=r"cifar10 in --data-dir .* is damaged"):
        load_data(DataConfig("cifar10"), tmp_path, train=True)
    assert not (tmp_path / "run").exists()


def test_a_launcher_without_an_address(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = "start it with torchrun, which sets the variables"
    refused(capsys, message, "lab", "run", config, "--workers", 2, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_port_in_use(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        message = f"127.0.0.1:{port} is in use; name another port"
        refused(capsys, message, "lab", "run", config, "--out", tmp_path / "never")
    assert not torch.distributed.is_initialized()


def test_a_full_disk(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the system says it of files that may not grow; what is there is read, and a report says "unfinished"."""
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        message = f"{out} cannot be written: File too large; the files written so far"
        refused(capsys, message, "lab", "run", config, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (run,) = read_runs([out])
    assert run.summary is None
    assert 0 < len(run.metrics) < 40
    assert load(config).batch_size == run.config["batch_size"]
