"""`make gpu` on a machine without a GPU: its refusal, and all of its parts on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from lab.bench import gpu as benchmark
from packsaddle.compressors import compressors, describe


def test_it_refuses_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert capsys.readouterr().err.startswith("make gpu needs a CUDA GPU, and torch ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_all_parts_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "tests", lambda seconds: {"rc": 0})  # this suite, in another process
    assert (
        benchmark.main(["--device", "cpu", "--d", "5000", "--repeats", "2", "--out", str(tmp_path / "gpu.json")]) == 0
    )
    found = json.loads((tmp_path / "gpu.json").read_text())
    for run in found["two processes"].values():
        assert run["one model"]
        assert run["last loss"] < run["first loss"]
    steps, packing = found["steps, d = 5,000"], found["packing, d = 5,000"]
    assert {"SGD, fused", "AdamW, fused", "CompressedSGD TopK(ratio=0.01)"} < set(steps)
    packed = {name.rsplit(" ", 1)[0] for name in packing} - {"copy"}
    assert packed == set(map(describe, compressors(0.01)))
    exchange = found["exchange, d = 5,000"]
    assert exchange.keys() == {"copy", "all-reduce", "SGD's step and a round of local updates"}
    for row in (*steps.values(), *packing.values(), *exchange.values()):
        assert 0 < row["low"] <= row["copies"] <= row["high"], row
    assert "| exchange, d = 5,000 | all-reduce | ms " in capsys.readouterr().out
