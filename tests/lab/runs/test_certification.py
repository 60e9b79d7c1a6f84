"""Certificates of runs: along the way, of what they left, of iterates drawn from them, and the command."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import command, refused
from scipy.stats import binomtest

from lab.runs.certification import Audit, read_config
from lab.runs.config import DataConfig
from lab.runs.run_folder import read_runs
from lab.runs.tasks.images import load_images
from lab.runs.tasks.models import make_task
from packsaddle import Verdict, certify
from packsaddle.cli.certificate_figure import draw_certificate
from packsaddle.cli.findings import Questions
from packsaddle.curvature.certificate import Share, draw_iterates
from packsaddle.errors import ConfigError
from packsaddle.numerics.seeds import Stream, generator

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


def test_options_not_given_are_the_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its [certify] has max_hvps = 60."""
    audits: list[Audit] = []

    def certify(audit: Audit, workers: int) -> None:
        audits.append(audit)
        raise ConfigError("enough")

    monkeypatch.setattr(Audit, "execute", certify)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    assert config["certify"]["tolerance"] == "inf"
    config["certify"] |= {"tolerance": 0.25, "hvp": "differences"}
    (copy / "config.json").write_text(json.dumps(config))
    assert command("lab", "certify", copy, "--hvp", "auto", "--memory-limit", 0) == 2
    (audit,) = audits
    assert (audit.questions.epsilon, audit.questions.hessian_lipschitz, audit.questions.lr) == (0.5, 0.1, 0.5)
    found = audit.questions.search
    assert (found.max_hvps, found.tolerance, found.memory_limit, found.hvp) == (60, 0.25, 0, "auto")


def test_the_steps_in_which_sgd_leaves_are_printed(run: Path) -> None:
    """At the run's learning rate, where a point passes with negative curvature."""
    files = (run / "checkpoint" / "model.pt",)
    (first,) = Audit(run, files, Questions(), double=True).certify()
    rho = (2 * first.certificate.lambda_min_upper) ** 2 / 1e3  # the threshold is twice the most negative curvature
    (found,) = Audit(run, files, Questions(1e3, rho, lr=read_config(run).sgd_lr()), double=True).certify()
    assert found.certificate.lambda_min_upper < 0
    steps = math.log(10) / math.log1p(-0.5 * found.certificate.lambda_min_upper)
    assert f"\n  at lr 0.5 SGD's distance along v grows tenfold in about {steps:,.0f} steps" in str(found)
    kept = found.to_dict()
    assert (kept["lr"], kept["escape_steps"]) == (0.5, pytest.approx(steps))


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


def test_a_diverged_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    diverge = ("--set", "lr=1e30", "model.output=linear", "certify.iterates=0", "max_skipped=99")
    assert command("lab", "run", tmp_path / "c.toml", *diverge, "--out", tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "certificates.jsonl").read_text().splitlines()]
    assert lines[-1]["verdict"] == "gradient too large"
    capsys.readouterr()
    refused(capsys, "there is nothing to certify", "lab", "certify", tmp_path / "run")


REFUSALS: list[tuple[Sequence[str], str]] = [
    (("RUN", "--epsilon", "0"), "--epsilon must be positive and finite, got 0.0"),
    (("RUN", "--examples", "321"), "examples must be from 1 to 320, the training examples, got 321"),
    (("RUN", "--checkpoint", "checkpoint/worker-0.pt"), "does not hold the weights of this run's network"),
    (("RUN", "--checkpoint", "x", "--iterates"), "--checkpoint and --iterates exclude each other"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=lambda a: " ".join(a) if isinstance(a, tuple) else "")
def test_bad_input_is_one_line_and_code_2(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    refused(capsys, message, "lab", "certify", *(run if a == "RUN" else a for a in arguments))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose configuration says nothing of certificates."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "c.toml").write_text(CONFIG.partition("[certify]")[0].replace("epochs = 2", "epochs = 0.5"))
    assert command("lab", "run", folder / "c.toml", "--out", folder / "run") == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_where_nothing_states_epsilon_there_is_no_verdict_on_stationarity(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a sample."""
    asked = ("certify", plain, "--examples", 200, "--max-hvps", 20)
    capsys.readouterr()
    assert command("lab", *asked, "--json", "--out", tmp_path / "c") == 0
    captured = capsys.readouterr()
    (point,) = json.loads(captured.out)["points"]
    assert captured.err == ""
    assert (point["examples"], point["sample_of"]) == (200, 320)
    assert (point["epsilon"], point["threshold"]) == (None, None)
    assert point["verdict"] == "not a minimum"
    assert point["lambda_min_upper"] < 0
    data = load_images(DataConfig("digits", limit=320), None, train=True)
    task = make_task(read_config(plain).model, data.levels.shape[1:], data.classes, 0)
    task.network.load_state_dict(torch.load(plain / "checkpoint" / "model.pt", weights_only=True))
    index = torch.randperm(320, generator=generator(0, 0, Stream.CERTIFY))[:200]
    task(data.pixels(index), data.labels[index]).backward()
    norm = torch.cat([p.grad.reshape(-1) for p in task.network.parameters() if p.grad is not None]).norm()
    assert point["grad_norm"] == pytest.approx(float(norm), rel=1e-4)  # single precision, summed in another order


@pytest.mark.parametrize(("epsilon", "first"), [(None, "not a minimum: lambda_min is at most "), (0.4, "saddle")])
def test_the_figures_title_is_the_first_line_of_the_text(epsilon: float | None, first: str) -> None:
    """f = (x_1^2 - x_0^2) / 2 + 0.3 x_0 at 0. Only epsilon makes a threshold, which is drawn."""
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()

    def loss_fn(model: Any, batch: torch.Tensor) -> torch.Tensor:
        x = model.weight[0]
        return (x[1] ** 2 - x[0] ** 2) / 2 + 0.3 * x[0] + 0 * batch.sum()

    finding = Questions(epsilon, 0.1).finding(Path("w.pt"), model, loss_fn, [torch.ones(1, 2)])
    figure = draw_certificate(finding.to_dict())
    headline = str(finding).splitlines()[0].removeprefix("w.pt: ")
    assert headline.startswith(first)
    assert figure.get_suptitle() == f"{headline} (gradient norm 3.000e-01)"
    labels = figure.axes[-1].get_legend_handles_labels()[1]
    assert ("threshold of a saddle" in labels) == (epsilon is not None)
