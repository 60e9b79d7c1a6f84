"""Numbers of runs in which some losses are not finite: skipped steps are in no mean."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
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
dense_below = 100
max_skipped = 100
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


class Poisoned(Trainer):
    """A run in which the losses of some steps are not numbers."""

    bad: tuple[int, ...] = ()
    calls = 0

    def _loss(self, index: Tensor) -> Tensor:
        loss = super()._loss(index)
        at = self.calls
        self.calls += 1
        return loss * math.nan if at in self.bad else loss


def trained(path: Path, bad: tuple[int, ...], *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the lines and the summary of a run in this folder."""
    path.with_suffix(".toml").write_text(CONFIG)
    training = Poisoned(load(path.with_suffix(".toml"), overrides), None, False)
    training.bad = bad
    make_new(path)
    assert training.run(RunFolder(path), quiet=True)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((path / "summary.json").read_text())


# A run of local updates with a round every three steps skips whole rounds.
WAYS: list[tuple[tuple[str, ...], list[int], float]] = [
    ((), [1, 3], 0.15),
    (("lr=0.003", "local={every=3, optimizer='adamw'}"), [1, 2], 0.5),
]


@pytest.mark.parametrize(("overrides", "skipped", "tolerance"), WAYS, ids=["every step", "local"])
def test_skipped_steps_are_in_no_mean(
    overrides: tuple[str, ...], skipped: list[int], tolerance: float, tmp_path: Path
) -> None:
    lines, summary = trained(tmp_path / "with", (3, 12, 13), *overrides)
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert [line["skipped"] for line in lines][:2] == skipped
    assert summary["skipped"] == skipped[-1]
    assert math.isfinite(summary["final_loss"])
    # A step or a round less of training on the same data changes the mean by little.
    for mine, other in zip(lines, trained(tmp_path / "without", (), *overrides)[0], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=tolerance)


def test_a_line_without_an_applied_step_has_no_loss(tmp_path: Path) -> None:
    """And a last epoch without one has no final loss: 0 would be a very good one."""
    for name, bad in (("one", (2,)), ("all", tuple(range(100)))):
        lines, summary = trained(tmp_path / name, bad, "log_every=1", "data.limit=80")
        assert [step for step, line in enumerate(lines) if math.isnan(line["loss"])] == list(bad[: len(lines)])
        assert math.isnan(summary["final_loss"]) == (name == "all")
