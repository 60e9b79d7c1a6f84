"""Certificates of runs: along the way, of what they left, of iterates drawn from them, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch
from commandline import command
from scipy.stats import binomtest

from lab.runs.certification import Audit, read_config
from lab.runs.run_folder import read_runs
from lab.tasks import DataConfig
from lab.tasks.images import load_images
from lab.tasks.models import make_task
from packsaddle import Verdict, certify
from packsaddle.cli.findings import Questions
from packsaddle.curvature.certificate import Share, draw_iterates

CONFIG = """
lr = 0.5
epochs = 2
batch_size = 20
log_every = 8
[data]
name = "digits"
limit = 320
[model]
name = "autoencoder"
widths = [16]
[certify]
every = 1
iterates = 6
epsilon = 0.5
hessian_lipschitz = 0.1
examples = 1000
max_hvps = 60
"""
STEPS = 16  # of two workers: 320 / 40 an epoch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two simulated workers, certified along the way."""
    folder = tmp_path_factory.mktemp("certified")
    (folder / "c.toml").write_text(CONFIG)
    assert command("lab", "run", folder / "c.toml", "--workers", 2, "--serial", "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures of certificates, which take longer to draw than a small search."""
    monkeypatch.setattr("packsaddle.cli.findings.draw_certificate", lambda *arguments: None)
    monkeypatch.setattr("packsaddle.cli.findings.save", lambda *arguments: None)


def test_certificates_along_the_way_are_those_of_the_weights_then(run: Path) -> None:
    """The line of epoch 2 against `certify` on the saved weights and the union of the workers' examples."""
    lines = [json.loads(line) for line in (run / "certificates.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(8, 1.0), (16, 2.0)]
    assert [line["examples"] for line in lines] == [320, 320]
    assert [line["sample_of"] for line in lines] == [None, None]
    images = load_images(DataConfig("digits", limit=320), None, train=True)
    task = make_task(read_config(run).model, images.levels.shape[1:], images.classes, 0)
    task.network.load_state_dict(torch.load(run / "checkpoint" / "model.pt", weights_only=True))
    batch = (images.pixels(torch.arange(320)), images.labels)
    again = certify(task, lambda m, b: m(*b), [batch], epsilon=0.5, hessian_lipschitz=0.1)
    assert lines[1]["loss"] == pytest.approx(again.loss, rel=1e-5)
    assert lines[1]["grad_norm"] == pytest.approx(again.grad_norm, rel=1e-4)
    assert lines[1]["verdict"] == str(again.verdict)


def test_training_does_not_depend_on_being_certified(run: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(CONFIG.partition("[certify]")[0])
    assert command("lab", "run", tmp_path / "c.toml", "--workers", 2, "--serial", "--out", tmp_path / "run") == 0
    plain, certified = (read_runs([folder])[0].metrics for folder in (tmp_path / "run", run))
    for a, b in zip(plain, certified, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_drawn_iterates_are_kept(run: Path) -> None:
    drawn = draw_iterates(6, STEPS, 0)
    assert sorted({f"step-{step:08d}.pt" for step in drawn}) == sorted(p.name for p in (run / "iterates").iterdir())
    every = [step for seed in range(4000) for step in draw_iterates(2, 4, seed)]
    counts = [every.count(step) for step in range(5)]
    assert all(abs(count - 1600) < 5 * math.sqrt(8000 * 0.2 * 0.8) for count in counts), counts


@pytest.mark.slow
@pytest.mark.process
def test_command_on_the_last_point(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By two workers, against one."""
    out = tmp_path / "certificate"
    common = ("certify", run, "--epsilon", 0.5, "--hessian-lipschitz", 0.1, "--double", "--workers", 2)
    assert command("lab", *common, "--out", out, "--json") == 0
    document = json.loads(capfd.readouterr().out)
    (point,) = document["points"]
    assert point["examples"] == 320
    assert point["sample_of"] is None
    assert point["precision"] == "float64"
    direction = torch.load(out / "certificate.direction.pt", weights_only=True)["escape_direction"]
    assert len(direction) == 64 * 16 + 16 + 16 * 64 + 64
    middle = len(point["profile"]["distances"]) // 2
    assert point["profile"]["losses"][middle] == pytest.approx(point["loss"], rel=1e-12)
    assert (out / "certificate.png").stat().st_size > 10_000
    assert json.loads((out / "certificates.json").read_text())["points"] == document["points"]
    expected = Audit(run, (run / "checkpoint" / "model.pt",), Questions(0.5, 0.1), double=True).certify()[0].certificate
    assert point["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-9)
    assert point["lambda_min_upper"] == pytest.approx(expected.lambda_min_upper, rel=1e-6)
    assert point["hvps"] == expected.hvps


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_command_on_drawn_iterates(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration's epsilon and rho by default; every draw counts, equal ones as often as they were drawn."""
    assert command("lab", "certify", run, "--iterates", "--examples", 100) == 0
    out = capsys.readouterr().out
    assert "of 6 iterates drawn uniformly are certified second-order stationary" in out
    assert "all 6 draws fail with probability at most 0.016" in out
    assert (run / "certificate" / "certificates.json").exists()
    assert command("lab", "certify", run, "--checkpoint", f"iterates/step-{draw_iterates(6, STEPS, 0)[0]:08d}.pt") == 0
    assert f"certificate: {run / 'certificate-2'}" in capsys.readouterr().out.replace("\n", "")


def test_share() -> None:
    """Against scipy's exact binomial test."""
    good, bad, open_ = Verdict.SECOND_ORDER_STATIONARY, Verdict.SADDLE, Verdict.UNDECIDED
    share = Share.of([good] * 7 + [bad] * 2 + [open_])
    assert (share.drawn, share.stationary, share.refuted) == (10, 7, 2)
    assert share.all_fail == 2**-10
    assert share.surprise == pytest.approx(binomtest(8, 10, 0.5, alternative="less").pvalue)
    exact = binomtest(7, 10, 0.5, alternative="greater").proportion_ci(0.95).low
    assert share.at_least() == pytest.approx(exact)
    none = Share.of([bad] * 10)
    assert (none.at_least(), none.surprise) == (0.0, pytest.approx(2**-10))
