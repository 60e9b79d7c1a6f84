"""Studies: their loops against plain ones, runs that go on where they stopped, and results made from their rows."""

import csv
import json
import os
import signal
import struct
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import forked_python
import numpy as np
import pytest
import torch
from commandline import command, refused
from PIL import Image
from torch import nn

from lab.paper import figure1, figure2, language
from lab.paper.results import by_setting, plateau
from lab.paper.study import Row, Run
from lab.tasks.images import load_images
from lab.tasks.models import CharTransformer, mnist_autoencoder, seeded
from lab.tasks.sharding import Batches, shard
from lab.tasks.text import load_text
from packsaddle import simulate
from packsaddle.compressors import Identity, RandomK, TopK


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 training and 100 test images in MNIST's own format: rectangles, of a class by their place."""
    folder = tmp_path_factory.mktemp("mnist")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 640), ("t10k", 100)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 30, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 + label : 14 + label, 4:20] = 220
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of ten classes, 32 x 32, told apart by their colour."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, n in (("train", 16), ("test", 4)):
        for label in range(10):
            (folder / part / f"class-{label}").mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (32, 32, 3)) + np.array([15 * label, 150 - 15 * label, 50])
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"class-{label}" / f"{i}.png")
    return folder


def run_of(setting: Any, folder: Path, seed: int = 3) -> Run[Any]:
    return Run("one", setting, seed, folder)


def ignore(fraction: float) -> None:
    """Take a report of progress."""


def untimed(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# The loops, against loops of torch alone.


def twin(model: nn.Module, lr: float, steps: int, loss_of: Any) -> tuple[list[float], list[float]]:
    """Return loss and gradient norm at every step of plain SGD."""
    losses, norms = [], []
    for step in range(steps):
        loss = loss_of(model, step)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(float(loss.detach()))
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= lr * g
    return losses, norms


def test_figure_2_without_compression_and_noise_is_sgd(mnist: Path, tmp_path: Path) -> None:
    size = figure2.Size(2.0, 320, every=2)
    found = figure2.train(run_of(figure2.Setting("", Identity(), 0.0), tmp_path), ignore, data_dir=mnist, size=size)
    images = load_images("mnist", mnist, train=True, limit=320)
    batches = Batches(shard(images, "iid", worker=0, workers=1, seed=3), 64, seed=3)
    model = seeded(mnist_autoencoder, 3)

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        pixels = images.pixels(batches[step])
        return (model(pixels) - pixels).square().mean()

    losses, norms = twin(model, 0.1, 10, loss_of)
    assert [row["step"] for row in found] == [2, 4, 6, 8, 10]
    assert [row["epoch"] for row in found] == [0.4, 0.8, 1.2, 1.6, 2.0]
    assert [row["loss"] for row in found] == pytest.approx([np.mean(losses[i : i + 2]) for i in range(0, 10, 2)])
    assert [row["grad_norm"] for row in found] == pytest.approx([np.mean(norms[i : i + 2]) for i in range(0, 10, 2)])
    assert found[-1]["final_loss"] == pytest.approx(np.mean(losses[5:]))
    tests = load_images("mnist", mnist, train=False).pixels(torch.arange(100))
    assert found[-1]["test_loss"] == pytest.approx(float((model(tests) - tests).square().mean().detach()), rel=1e-5)
    assert found[-1]["megabytes"] == pytest.approx(10 * 210_369 * 4e-6, rel=1e-3)  # every gradient, in float32


@pytest.mark.slow
def test_figure_2_certifies_and_checks_escapes(mnist: Path, tmp_path: Path) -> None:
    setting = figure2.Setting("", RandomK(0.01), is_certified=True, checks_escapes=True)
    size = figure2.Size(2.0, 320, every=2, interval=3)
    rows = figure2.train(run_of(setting, tmp_path), ignore, data_dir=mnist, size=size)
    assert [row["verdict"] is not None for row in rows] == [True, False, False, False, True]
    for row in (rows[0], rows[-1]):  # a gradient above epsilon decides without bounds
        low, high = row["lambda_min_lower"], row["lambda_min_upper"]
        assert (low is None) == (high is None) == (row["verdict"] == "gradient too large")
        assert low is None or low <= high
    # A check sends the loss of both points, so a run without checks sends less.
    plain = figure2.train(run_of(replace(setting, checks_escapes=False), tmp_path), ignore, data_dir=mnist, size=size)
    assert rows[-1]["megabytes"] > plain[-1]["megabytes"]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["all", "group"])
def test_figure_1_fused_is_ten_workers(norm: Any, pictures: Path, tmp_path: Path) -> None:
    """With RandomK one worker stands for ten: the same losses, accuracies and bytes up to rounding."""
    setting = figure1.Setting("", RandomK(0.1), norm=norm, lr=0.01)
    size = figure1.Size(2.0, 4, "imagenet", limit=160, every=1, depth=18)
    fused = figure1.train(run_of(setting, tmp_path), ignore, data_dir=pictures, size=size)
    apart = simulate(
        lambda rank: figure1.work(
            range(rank, rank + 1), run_of(setting, tmp_path / "apart"), ignore, data_dir=pictures, size=size
        ),
        figure1.WORKERS,
    )
    assert [row["step"] for row in fused] == [1, 2, 3, 4]
    for i, row in enumerate(fused):
        assert row["loss"] == pytest.approx(np.mean([rows[i]["loss"] for rows in apart]), rel=2e-3)
        assert row["megabytes"] == pytest.approx(apart[0][i]["megabytes"])
    assert fused[-1]["test_loss"] == pytest.approx(apart[0][-1]["test_loss"], rel=5e-3)


@pytest.mark.slow
def test_figure_1_goes_on_from_its_last_epoch(pictures: Path, tmp_path: Path) -> None:
    setting = figure1.Setting("", TopK(0.1))
    size = figure1.Size(3.0, 4, "imagenet", limit=160, every=1, depth=18)
    train = partial(figure1.train, data_dir=pictures, size=size)
    whole = train(run_of(setting, tmp_path / "whole"), ignore)

    class StoppedError(Exception):
        pass

    def stop(fraction: float) -> None:
        if fraction > 0.8:  # in the third epoch of two steps each
            raise StoppedError

    run = run_of(setting, tmp_path / "cut")
    with pytest.raises(StoppedError):
        train(run, stop)
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-00000002", "step-00000004"}
    assert untimed(train(run, ignore)) == untimed(whole)
    assert not run.checkpoints.exists()


def test_language_without_compression_is_sgd_on_both_batches(tmp_path: Path) -> None:
    size = language.Size(1.0, 128, every=2)
    found = language.train(run_of(language.Setting("", Identity(), lr=0.3), tmp_path), ignore, data_dir=None, size=size)
    text = load_text(train=True, limit=128)
    batches = [Batches(shard(text, "iid", worker=w, workers=2, seed=3), 16, seed=3, worker=w) for w in range(2)]

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        windows, following = text.batch(torch.cat([each[step] for each in batches]))
        return nn.functional.cross_entropy(model(windows).flatten(0, 1), following.flatten())

    model = seeded(lambda: CharTransformer(text.classes, 64, width=64, depth=2, heads=2), 3)
    losses, _ = twin(model, 0.3, 4, loss_of)
    assert [row["loss"] for row in found] == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:])], rel=1e-5)
    tests = load_text(train=False)
    windows, following = tests.batch(torch.arange(len(tests)))
    with torch.no_grad():
        logits = model(windows)
    expected = float(nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten()))
    assert found[-1]["test_loss"] == pytest.approx(expected, rel=1e-4)
    assert found[-1]["test_accuracy"] == pytest.approx(float((logits.argmax(2) == following).double().mean()), abs=1e-3)


def test_local_steps_exchange_at_periods(tmp_path: Path) -> None:
    """In six steps one exchange and a last one in four bits; the first exchange compares models too."""
    size = language.Size(1.0, 6 * 32, every=6)
    rows = [
        language.train(
            run_of(language.Setting("", Identity(), local_steps=every, halves=True), tmp_path),
            ignore,
            data_dir=None,
            size=size,
        )
        for every in (1, 4)
    ]
    once, fourth = (row[-1]["megabytes"] for row in rows)
    assert (1 + 1 / 8) / 6 < fourth / once < 2 / 6


# Studies.


def study(folder: Path, *options: Any) -> list[Any]:
    return ["lab.paper.language", "--scale", "smoke", "--only", "dense", "topk", "--out", folder, *options]


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_study_goes_on_with_the_runs_that_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    words = [forked_python.python(), "-m", *map(str, study(folder, "--jobs", "1", "--seeds", "2"))]
    killed = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (done := list(folder.glob("runs/*.csv"))):
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 1 <= len(done) < 4
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*.csv")}

    # Again, and with other settings or another scale.
    refused(capsys, "exists; continue it with --resume", *study(folder))
    refused(
        capsys,
        "holds text at scale smoke, not text at cpu",
        *[a if a != "smoke" else "cpu" for a in study(folder, "--resume")],
    )
    assert command(*study(folder, "--resume", "--seeds", "2")) == 0
    assert {path.name for path in folder.glob("runs/*.csv")} == {
        f"{name}-seed-{seed}.csv" for name in ("dense", "topk") for seed in (0, 1)
    }
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check_results(folder)
    made = json.loads((folder / "study.json").read_text())
    assert len(made["made"]) == 2
    made["settings"]["topk"] = "another"
    (folder / "study.json").write_text(json.dumps(made))
    refused(capsys, "--resume: topk in", *study(folder, "--resume"))
    (folder / "study.json").write_text("{")
    refused(capsys, "is not the folder of a study", *study(folder, "--resume"))


def check_results(folder: Path) -> None:
    """Check a study's summary and curves against its rows."""
    entries = by_setting(json.loads((folder / "summary.json").read_text()))
    with (folder / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    for name, label in (("dense", "uncompressed, no noise"), ("topk", "TopK 1%, no noise")):
        runs = [Run(name, None, seed, folder).rows() for seed in (0, 1)]
        finals = [rows[-1]["final_loss"] for rows in runs]
        assert len(set(finals)) == 2  # of two seeds
        assert entries[label]["final_loss"]["values"] == finals
        last = [row for row in curves if row["setting"] == label][-1]
        losses = [rows[-1]["loss"] for rows in runs]
        assert float(last["loss_mean"]) == pytest.approx(np.mean(losses), rel=1e-5)
        assert float(last["loss_low"]) == pytest.approx(np.quantile(losses, 0.1), rel=1e-5)
        assert last["seeds"] == "2"
    assert {path.name for path in folder.glob("figure*")} == {"figure-light.svg", "figure-dark.svg"}


def test_bad_input_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "--resume needs --out", "lab.paper.language", "--resume")
    refused(
        capsys, "got 'topkk' (did you mean topk?)", "lab.paper.language", "--only", "topkk", "--out", tmp_path / "x"
    )
    refused(capsys, "--seeds must be an integer of at least 1, got 0", "lab.paper.language", "--seeds", "0")
    refused(capsys, "mnist is not in --data-dir", "lab.paper.figure2", "--data-dir", tmp_path)
    assert not (tmp_path / "x").exists()


def test_a_plateau_is_entered_and_left_by_five_percent() -> None:
    def rows(*losses: float) -> list[Row]:
        return [{"epoch": float(i), "loss": loss} for i, loss in enumerate(losses)]

    assert plateau(rows(3.0, 1.04, 1.0, 0.97, 0.94), 1.0) == (3.0, True)
    assert plateau(rows(3.0, 1.04, 1.0, 0.97, 0.96), 1.0) == (3.0, False)
    assert plateau(rows(3.0, 2.0), 1.0) == (0.0, None)


def test_studies_have_seeds_and_names_of_their_own() -> None:
    for module in (figure1, figure2, language):
        for settings in module.STUDIES.values():  # type: ignore[attr-defined]
            assert len({setting.label for setting in settings.values()}) == len(settings)
