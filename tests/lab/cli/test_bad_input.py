"""Bad files and a bad environment: one line that says what is wrong, code 2, and nothing lost."""

import json
import re
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import refused

from lab.runs.config import Config, DataConfig, load
from lab.runs.run_folder import read_runs
from lab.runs.tasks import images as data
from lab.runs.tasks import text
from lab.runs.tasks.images import load_data
from packsaddle.errors import ConfigError
from packsaddle.options.schema import build

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

FILES: dict[str, tuple[bytes, str]] = {
    "binary": (bytes(range(256)), "cannot be read: 'utf-8' codec"),
    "utf-16": (CONFIG.encode("utf-16"), "cannot be read: 'utf-8' codec"),
    "nul": (b"lr = 1\0", "line 1, column 7: not valid TOML"),
    "empty": (b"", "missing key data"),
    "deep list": (b"lr = " + b"[" * 100_000, "nested too deeply"),
    "duplicate": (b"lr = 1\nlr = 2\n", "not valid TOML: Cannot overwrite a value"),
    "long value": (b"lr = '" + b"x" * 50_000 + b"'", " ... "),
    "long list": (b"lr = [\n" + b"1,\n" * 200 + b"]\n", "lr must be of type float, got [1, 1,"),
}


@pytest.mark.parametrize("name", FILES)
def test_configuration_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[name]
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    refused(capsys, message, "lab", "run", path, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_folder_as_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "cannot be read: [Errno 21] Is a directory", "lab", "run", tmp_path)


OVERRIDES = {
    "lr=" + "9" * 5_000: "too many digits",
    "lr=" + "[" * 5_000: "too deeply nested brackets",
    "label=\udcff": "label must be UTF-8, got '\\udcff'",
    "certify={epsilon=1, at=[-1.0]}": "at must be epochs above 0, got [-1.0]",
    "data.name=\x1b[31mred": "got '\\x1b[31mred'",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=[k[:30].encode("unicode_escape").decode() for k in OVERRIDES])
def test_overrides(override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    refused(capsys, OVERRIDES[override], "lab", "run", path, "--out", tmp_path / "never", "--set", override)
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
DAMAGE: dict[tuple[str, bytes], str] = {
    ("config.json", b""): "config.json: not valid JSON",
    ("config.json", b'{"seed": 1'): "config.json: not valid JSON",
    ("config.json", b"\xff\xfe"): "config.json must be UTF-8, but byte 0 is not",
    ("config.json", b"[1]"): "config.json must be a JSON object, got [1]",
    ("environment.json", b"3"): "environment.json must be a JSON object, got 3",
    ("summary.json", b""): "summary.json: not valid JSON",
    ("metrics.jsonl", b"{\n{}\n"): "metrics.jsonl, line 1: not valid JSON",
    ("metrics.jsonl", b"3\n{}\n"): "metrics.jsonl, line 1 must be a JSON object, got 3",
}


def make_run(folder: Path) -> Path:
    folder.mkdir()
    for name, content in RUN.items():
        (folder / name).write_text(json.dumps(content) + "\n")
    return folder


@pytest.mark.parametrize(("name", "content"), DAMAGE, ids=DAMAGE.values())
def test_run_folders(name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    assert read_runs([folder])[0].metrics == [LINE]
    (folder / name).write_bytes(content)
    refused(
        capsys,
        f"is damaged{'' if name == 'environment.json' else ' (packsaddle 9.9 wrote it'}",
        "lab",
        "report",
        folder,
    )
    refused(capsys, DAMAGE[name, content], "lab", "report", folder)
    assert not (folder / "report").exists()


def test_run_folders_with_links_and_folders_for_files(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "summary.json", "environment.json"):
        folder = make_run(tmp_path / name)
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(ConfigError, match=f"{name} cannot be read: Is a directory"):
            read_runs([folder])


def test_a_table_is_needed() -> None:
    with pytest.raises(ConfigError, match="a configuration must be a table, got 3"):
        build(Config, 3)  # type: ignore[arg-type]


def images(folder: Path) -> Path:
    from PIL import Image

    for name in ("train/a", "train/b", "test/a", "test/b"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / name / "0.png")
    return folder


def rewritten(size: tuple[int, int], mode: str) -> Callable[[Path], None]:
    from PIL import Image

    return lambda path: Image.new(mode, size).save(path)


IMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "corrupt": ("train/a/0.png", lambda p: p.write_bytes(b"junk"), "train/a/0.png cannot be read as an image"),
    "cut off": ("test/a/0.png", lambda p: p.write_bytes(p.read_bytes()[:40]), "test/a/0.png cannot be read as an"),
    "bomb": (
        "train/a/0.png",
        lambda p: p.write_bytes(b"P5 20000 20000 255\n"),
        "train/a/0.png cannot be read as an image",
    ),
    "empty class": ("train/a/0.png", Path.unlink, "Found no valid file for the classes a"),
    "missing class": ("test/a", shutil.rmtree, "must have the same classes; only one has a"),
    "one size": ("train/b/0.png", rewritten((5, 4), "RGB"), "must be of one size, but"),
    "test size": ("test/a/0.png", rewritten((5, 4), "RGB"), "must be of one size, but"),
    "16 bits": ("train/a/0.png", rewritten((4, 4), "I;16"), "has pixels of more than 8 bits (I;16)"),
    "loop": ("train/c", lambda p: p.symlink_to(p), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_folders(name: str, tmp_path: Path) -> None:
    where, change, message = IMAGES[name]
    folder = images(tmp_path / "images")
    change(folder / where)
    with pytest.raises(ConfigError, match=re.escape(message)):
        [load_data(DataConfig("folder"), folder, train=train) for train in (True, False)]


def mnist(folder: Path, images: bytes, labels: bytes) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return folder


HEAD = b"\0\0\x08\x03\0\0\0\x02\0\0\0\x1c\0\0\0\x1c"  # two images of 28 x 28
LABELS = b"\0\0\x08\x01\0\0\0\x02\x03\x04"


def test_mnist_files(tmp_path: Path) -> None:
    good = load_data(DataConfig("mnist"), mnist(tmp_path / "good", HEAD + bytes(2 * 784), LABELS), train=True)
    assert isinstance(good, data.Images)
    assert good.labels.tolist() == [3, 4]
    for i, (pixels, labels) in enumerate(
        [
            (HEAD + bytes(784), LABELS),
            (HEAD[:5], LABELS),
            (b"", LABELS),
            (b"\xff" * 900, LABELS),
            (HEAD + bytes(2 * 784), LABELS[:7] + b"\x01\x03"),  # one label
            (HEAD + bytes(2 * 784), LABELS[:-1] + b"\x0a"),  # class 10
        ]
    ):
        folder = mnist(tmp_path / str(i), pixels, labels)
        with pytest.raises(ConfigError, match=r"mnist in --data-dir .* is damaged; remove .*MNIST, and --download"):
            load_data(DataConfig("mnist"), folder, train=True)


def test_cifar_files_that_are_not_cifar(tmp_path: Path) -> None:
    """They are pickles: torchvision compares their MD5 with CIFAR's before it opens any."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    with pytest.raises(ConfigError, match=r"cifar10 in --data-dir .* is damaged"):
        load_data(DataConfig("cifar10"), tmp_path, train=True)
    assert not (tmp_path / "run").exists()


def test_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    text._encoded.cache_clear()
    with pytest.raises(ConfigError, match="is empty"):
        load_data(DataConfig("text"), tmp_path, train=True)


ENVIRONMENT: dict[str, tuple[dict[str, str], str]] = {
    "rank alone": ({"RANK": "0"}, "RANK is set"),
    "size alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set"),
    "rank of letters": (
        {"RANK": "x", "WORLD_SIZE": "2"},
        "RANK, which the launcher sets, must be from 0 to 1, got",
    ),
    "rank too large": ({"RANK": "2", "WORLD_SIZE": "2"}, "must be from 0 to 1, got '2'"),
    "no workers": ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE, which the launcher sets, must be from 1"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2"}, "start it with torchrun, which sets the variables"),
    "no interface": ({"GLOO_SOCKET_IFNAME": "nosuch0"}, "GLOO_SOCKET_IFNAME names nosuch0, and this machine has "),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_environment(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables, message = ENVIRONMENT[name]
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    refused(capsys, message, "lab", "run", path, "--workers", 2, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_port_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        refused(
            capsys, f"127.0.0.1:{port} is in use; name another port", "lab", "run", path, "--out", tmp_path / "never"
        )
    assert not torch.distributed.is_initialized()


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the system says it of files that may not grow; what is there is read, and a report says "unfinished"."""
    path, out = tmp_path / "config.toml", tmp_path / "run"
    path.write_text(CONFIG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        refused(
            capsys,
            f"{out} cannot be written: File too large; the files written so far",
            "lab",
            "run",
            path,
            "--out",
            out,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (run,) = read_runs([out])
    assert run.summary is None
    assert 0 < len(run.metrics) < 40
    assert load(path).batch_size == run.config["batch_size"]
