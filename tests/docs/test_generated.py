"""Tables made from the code: the documented numbers are those that a run records."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lab import __main__ as lab
from packsaddle.curvature.certificate import Certificate

pytest.importorskip("sphinx")
from lab.docs.generated.quantities import CERTIFICATE, METRICS, PURPOSES, SUMMARY, Quantity


def keys(content: tuple[Quantity, ...]) -> tuple[set[str], set[str]]:
    """All keys, and those that every run has."""
    needed = {key for quantity in content if not quantity.optional for key in quantity.keys}
    return {key for quantity in content for key in quantity.keys}, needed


def test_a_certificate_has_the_documented_numbers() -> None:
    properties = {"headline", "smallest_epsilon", "loss_name", "saddle_below_rho", "lr", "escape_steps"}
    fields = {f.name for f in dataclasses.fields(Certificate)} - {"escape_direction", "sharpest_direction"}
    assert keys(CERTIFICATE)[0] == fields | properties


RUN = {
    "data.name": "digits",
    "data.limit": 64,
    "model.name": "autoencoder",
    "model.widths": [8],
    "lr": 0.1,
    "epochs": 2.0,
    "batch_size": 8,
    "log_every": 4,
    "test_every": 1.0,
    "dense_below": 16,
    "compressor.kind": "TopK",
    "compressor.ratio": 0.1,
    "certify.epsilon": 0.1,
    "certify.every": 1.0,
    "certify.max_hvps": 3,
}


@pytest.mark.parametrize("more", [{}, {"local.every": 2, "local.optimizer": "adamw"}], ids=["every step", "local"])
def test_a_run_records_the_documented_numbers(more: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "empty.toml").write_text("")
    words = [f"{key}={json.dumps(value)}" for key, value in (RUN | more).items()]
    run = lab.COMMANDS.commands["run"]
    run(tmp_path / "empty.toml", set=tuple(words), workers=2, serial=True, out=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    points = [json.loads(line) for line in (tmp_path / "run" / "certificates.jsonl").read_text().splitlines()]
    for found, content in ((summary, SUMMARY), *((line, METRICS) for line in lines)):
        documented, needed = keys(content)
        assert needed <= found.keys() <= documented
    assert any("test_loss" in line for line in lines)
    assert all(point.keys() - {"step", "epoch"} == keys(CERTIFICATE)[0] for point in points)
    assert points
    assert summary["bytes_by_purpose"].keys() <= keys(PURPOSES)[0]
