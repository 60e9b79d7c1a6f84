"""Guards of configured runs, as a user meets them."""

import json
import math
import subprocess
from pathlib import Path

import pytest
from forked_python import environment, python
from torch import Tensor

from lab.runs.config import load
from lab.runs.run_folder import RunFolder
from lab.runs.trainer import Trainer
from packsaddle.cli.folders import make_new

CONFIG = """
lr = 0.5
epochs = 0.4
batch_size = 8
log_every = 10
{more}
[data]
name = "digits"
[model]
name = "autoencoder"
widths = [64, 32, 10]
output = "linear"
[compressor]
kind = "RandomK"
ratio = 0.001
"""


def written(folder: Path, more: str) -> Path:
    path = folder / "config.toml"
    path.write_text(CONFIG.format(more=more))
    return path


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [python(), "-m", "lab", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment())


def test_a_step_that_is_too_long_is_said_and_kept(tmp_path: Path) -> None:
    result = command("run", written(tmp_path, "dense_below = 0"), "--out", tmp_path / "run")
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: past stability: network.")
    assert "bias[" in line
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == [line.removeprefix("warning: ")]


def test_a_run_that_has_blown_up_ends_with_a_line_and_a_checkpoint(tmp_path: Path) -> None:
    config = written(tmp_path, "dense_below = 100\nmax_skipped = 3")
    more = ("--set", "lr=1e38", "--workers", 2)
    result = command("run", config, *more, "--out", tmp_path / "run")
    assert result.returncode == 1
    *before, last = [line for line in result.stderr.splitlines() if not line.startswith("warning")]
    assert all("is not finite on worker" in line for line in before)
    assert last.startswith("python -m lab: step ")
    assert "4 consecutive steps skipped, more than max_skipped=3" in last
    hint = f"python -m lab run --resume {tmp_path / 'run'}"
    assert hint in last
    (step,) = (tmp_path / "run" / "checkpoint").iterdir()
    assert len(list(step.glob("worker-*.pt"))) == 2


class Poisoned(Trainer):
    """A run whose loss is not a number at some steps."""

    bad: tuple[int, ...] = ()
    calls = 0

    def _loss(self, index: Tensor) -> Tensor:
        loss = super()._loss(index)
        at = self.calls
        self.calls += 1
        return loss * math.nan if at in self.bad else loss


def test_what_was_left_out_is_in_no_mean(tmp_path: Path) -> None:
    found = {}
    for name, bad in (("with", (3, 12, 13)), ("without", ())):
        config = load(written(tmp_path, "dense_below = 100"))
        training = Poisoned(config, None, False)
        training.bad = bad
        folder = RunFolder(tmp_path / name)
        make_new(folder.path)
        assert training.run(folder, quiet=True)
        lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
        found[name] = (lines, json.loads((folder.path / "summary.json").read_text()))
    lines, summary = found["with"]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert [line["skipped"] for line in lines][:2] == [1, 3]
    assert summary["skipped"] == 3
    assert math.isfinite(summary["final_loss"])
    # A step less of gradient descent on the same data changes the mean by little.
    for mine, other in zip(lines, found["without"][0], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.15)


def test_a_line_of_no_step_that_was_taken_has_no_loss(tmp_path: Path) -> None:
    """And a last epoch of none has no final loss: 0 would be a very good one."""
    config = load(written(tmp_path, "dense_below = 100\nmax_skipped = 100"), ["log_every=1", "data.limit=80"])
    found = {}
    for name, bad in (("one", {2}), ("all", set(range(100)))):
        training = Poisoned(config, None, False)
        training.bad = tuple(bad)
        folder = RunFolder(tmp_path / name)
        make_new(folder.path)
        assert training.run(folder, quiet=True)
        losses = [json.loads(line)["loss"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
        assert [step for step, loss in enumerate(losses) if math.isnan(loss)] == sorted(bad & set(range(len(losses))))
        found[name] = json.loads((folder.path / "summary.json").read_text())["final_loss"]
    assert math.isnan(found["all"])
    assert found["one"] > 0
