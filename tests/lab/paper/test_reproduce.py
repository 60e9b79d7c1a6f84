"""Reproductions: studies that go on where they stopped, and runs that are equal however workers are simulated."""

import csv
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import command, refused
from nightly import thinned
from PIL import Image

from lab.paper import figure1, figure2
from lab.paper.results import by_setting
from lab.paper.studies import REPRODUCTIONS
from lab.paper.study import Study
from lab.runs.config import CertifyConfig, Config, EscapeConfig, LocalConfig, NoiseConfig
from lab.runs.job import How, Job, can_be_fused, fastest_simulation
from lab.runs.report.settings import settings
from lab.runs.run_folder import read_runs
from lab.tasks import ModelConfig
from packsaddle.cli.folders import make_new
from packsaddle.compressors import (
    QSGD,
    LowRank,
    RandomK,
    Sign,
    SketchTopK,
    TopK,
)


@pytest.fixture(scope="module", autouse=True)
def without_charts_of_reports() -> Iterator[None]:
    """Leave out sixteen charts, which take longer than these runs; `report/test_report.py` tests them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lab.runs.report.page.inline_svg", lambda *arguments: "<svg></svg>")
        yield


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


def run(config: Config, how: How, data_dir: Path | None, path: Path) -> dict[str, Any]:
    """Do a run and return its metrics, summary and weights."""
    make_new(path)
    Job((config,), (path,), data_dir, quiet=True).run(config.workers, how)
    (found,) = read_runs([path])
    assert found.summary is not None
    weights = torch.load(path / "checkpoint" / "model.pt", weights_only=True)
    return {"metrics": found.metrics, "summary": found.summary, "weights": weights, "certificates": found.certificates}


def ae_config(**changes: Any) -> Config:
    """Figure 2's smoke setting of two workers, with a small network, fewer images and certificates left out."""
    config = figure2.study("smoke", "mnist").settings["randomk-noise"]
    small, few = ModelConfig("autoencoder", (16,)), replace(config.data, limit=80)
    base = replace(config, data=few, model=small, batch_size=8, workers=2, certify=None, log_every=5, epochs=1.0)
    return replace(base, **changes)


def resnet_config(norm: Any = "all", **changes: Any) -> Config:
    """Figure 1's smoke setting, with fewer images and workers, and half as deep.

    Rounding to float32 would grow until it is seen.
    """
    config = figure1.study("smoke", "folder").settings["randomk-1"]
    few = replace(config.data, limit=60)
    shallow = replace(config.model, name="resnet18", norm=norm)
    base = replace(config, data=few, model=shallow, precision="float64", workers=2, epochs=1.0, test_every=0.5)
    return replace(base, **changes)


# The escape check asks for losses between the steps.
ESCAPING = ae_config(
    workers=3,
    compressor=QSGD(),
    precision="float64",
    escape=EscapeConfig(interval=3, radius=100.0, examples=100),
)
# Settings whose simulations train as serial workers; images are those of the fixture of this name.
SIMULATED: dict[str, tuple[Config, str, How]] = {
    **{  # sums of bfloat16 in another order may choose another support
        f"fused {type(c).__name__}": (ae_config(compressor=c, precision="float64"), "mnist", "fused")
        for c in (SketchTopK(0.01, half=False), LowRank(2), RandomK(0.01, block_size=1))
    },
    "batched QSGD": (ESCAPING, "mnist", "batched"),
    # Statistics that workers exchange.
    "fused resnet all": (resnet_config("all"), "pictures", "fused"),
    "batched resnet all": (resnet_config("all", workers=3, compressor=TopK(0.01)), "pictures", "batched"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(SIMULATED, 2))
def test_simulations_train_as_serial_workers(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The same curves, weights and bytes up to rounding."""
    config, images, how = SIMULATED[name]
    assert can_be_fused(config) or how != "fused"
    data = request.getfixturevalue(images)
    serial, found = (run(config, way, data, tmp_path / way) for way in ("serial", how))
    for ours, theirs in zip(found["metrics"], serial["metrics"], strict=True):
        for name in ("loss", "test_loss", "test_accuracy", "epoch", "payload", "sent", "received"):
            if name in ours or name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
        if how != "fused":  # there it is the norm of the mean
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    assert found["summary"]["bytes_by_purpose"] == serial["summary"]["bytes_by_purpose"]
    for key, w in found["weights"].items():
        assert torch.allclose(w, serial["weights"][key], rtol=1e-6, atol=1e-7), key


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (resnet_config(compressor=RandomK(0.01)), "fused"),
        (resnet_config(compressor=TopK(0.01)), "batched"),
        (resnet_config("worker", compressor=TopK(0.01)), "serial"),
        (ae_config(noise=NoiseConfig(0.0), local=LocalConfig("adamw", every=4), compressor=Sign()), "serial"),
    ],
    ids=["linear", "batched", "norm of a worker", "local"],
)
def test_the_fastest_simulation(config: Config, way: str) -> None:
    assert fastest_simulation(config) == way


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "mu", "mu_by_tensor")} for line in lines]


@pytest.mark.nightly
@pytest.mark.slow
def test_fused_workers_certify_and_check_escapes_as_others_do(mnist: Path, tmp_path: Path) -> None:
    config = ae_config(
        escape=EscapeConfig(interval=1, radius=100.0, examples=100),
        noise=NoiseConfig(0.01),
        certify=CertifyConfig(epsilon=1.0, hessian_lipschitz=1.0, at=(0.6,), examples=20, max_hvps=5),
    )
    fused, serial = (run(config, how, mnist, tmp_path / how) for how in ("fused", "serial"))
    assert [(r["step"], r["committed"]) for r in fused["summary"]["resets"]] == [
        (r["step"], r["committed"]) for r in serial["summary"]["resets"]
    ]
    assert len(fused["summary"]["resets"]) > 1
    assert [c["epoch"] for c in fused["certificates"]] == [0.6, 1.0]
    for ours, theirs in zip(fused["certificates"], serial["certificates"], strict=True):
        assert ours["examples"] == theirs["examples"] == 40
        assert ours["verdict"] == theirs["verdict"]
        for name in ("loss", "grad_norm", "lambda_min_upper"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name


# Studies.


SMALL = "model={name='autoencoder', widths=[16]}"
FEW = ("--set", "data.limit=80", "batch_size=8", "epochs=1", "certify.examples=32", "certify.max_hvps=4", SMALL)


def study(mnist: Path, folder: Path, *options: Any, seeds: int = 2) -> list[Any]:
    """`python -m lab.paper fig2` at smoke scale on few images, of two settings."""
    where = ("--data-dir", mnist, "--out", folder, "--only", "dense", "randomk")
    return ["lab.paper", "fig2", "--scale", "smoke", *where, *FEW, "--seeds", seeds, *options]


def written(runs: list[Path]) -> list[int]:
    """Return when each run's summary was written, in nanoseconds."""
    return [(run / "summary.json").stat().st_mtime_ns for run in runs]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.process
def test_a_study_goes_on_where_it_stopped(mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    assert command(*study(mnist, folder)) == 0
    runs = sorted(path.parent for path in folder.glob("runs/*/*/summary.json"))
    assert [str(path.relative_to(folder / "runs")) for path in runs] == [
        f"{name}/seed-{seed}" for name in ("dense", "randomk") for seed in (0, 1)
    ]
    # One was cut off in the middle: its summary is missing, and half of its metrics.
    cut = runs.pop(3)
    before, untouched = (cut / "metrics.jsonl").read_text(), written(runs)
    (cut / "summary.json").unlink()
    (cut / "metrics.jsonl").write_text(before[: len(before) // 2])
    refused(capsys, "exists; continue it with --resume", *study(mnist, folder))
    assert command(*study(mnist, folder, "--resume")) == 0
    assert written(runs) == untouched
    again = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert without_time(again) == without_time([json.loads(line) for line in before.splitlines()])
    check_results(folder)
    capsys.readouterr()
    other = [a if a != "epochs=1" else "epochs=2" for a in study(mnist, folder, "--resume")]
    refused(capsys, "was made with another configuration: epochs was 1.0, and is 2.0", *other)
    # So it is of a run that is not done, which would begin anew.
    (cut / "summary.json").unlink()
    faster = [x for a in study(mnist, folder, "--resume") for x in ((a, "lr=0.2") if a == "epochs=1" else (a,))]
    refused(capsys, "was made with another configuration: lr was 0.1, and is 0.2", *faster)
    assert (cut / "metrics.jsonl").exists()
    arguments = [a if a != "smoke" else "cpu" for a in study(mnist, folder, "--resume")]
    refused(capsys, "holds fig2 at scale smoke, not fig2 at scale cpu", *arguments)
    refused(capsys, "is not the folder of a study", "lab.paper", "fig2", "--resume", "--out", tmp_path)


def check_results(folder: Path) -> None:
    """Check a study's summary and curves against its runs."""
    entries = by_setting(json.loads((folder / "summary.json").read_text()))
    found = {s.label: s for s in settings(read_runs([folder / "runs" / name for name in ("dense", "randomk")]))}
    with (folder / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert entries.keys() == found.keys()
    for label, entry in entries.items():
        finals = [run.summary["final_loss"] for run in found[label].runs if run.summary]
        assert len(set(finals)) == 2  # of two seeds
        assert entry["final_loss"]["values"] == finals
        last = [row for row in rows if row["setting"] == label][-1]
        losses = [run.metrics[-1]["loss"] for run in found[label].runs]
        assert float(last["loss_mean"]) == pytest.approx(np.mean(losses), rel=1e-5)
        assert float(last["loss_low"]) == pytest.approx(np.quantile(losses, 0.1), rel=1e-5)
        assert last["seeds"] == "2"
        assert {(c["seed"], c["epoch"]) for c in entry["certificates"]} >= {(0, 1.0), (1, 1.0)}
    assert {path.name for path in folder.glob("figure*")} == {"figure-light.svg", "figure-dark.svg"}


def test_every_scale_of_every_study_can_be_read_back() -> None:
    """Ten seeds in Figure 2 and three in Figure 1, in the paper's setting and on a CPU."""
    for name, made in REPRODUCTIONS.items():
        for scale in ("paper", "cpu", "smoke"):
            study: Study = made.study(scale, "mnist" if name.startswith("fig2") else "cifar10")  # type: ignore[arg-type]
            assert len({run.name for run in study.sub_runs()}) == len(study.settings) * study.seeds
            assert len({config.label for config in study.settings.values()}) == len(study.settings)
            study.changed(["log_every=7"], None, [])
    assert [REPRODUCTIONS[n].study("cpu", "cifar10").seeds for n in ("fig2", "fig1")] == [10, 3]
