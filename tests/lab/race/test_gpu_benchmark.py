"""`make gpu` on a machine without a GPU: its refusals, and what it does when a part fails."""

import json
from pathlib import Path

import pytest
import torch

from lab.bench import gpu as benchmark


def test_it_refuses_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert capsys.readouterr().err.startswith("make gpu needs a CUDA GPU, and torch ")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_part_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def bad() -> None:
        raise RuntimeError("no kernel image\nis available")

    out, good = tmp_path / "gpu.json", iter([{"waits": 1}]).__next__  # a second call would fail
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "parts", lambda *_: {"bad": bad, "good": good})
    for _ in range(2):
        assert benchmark.main(["--out", str(out)]) == 1
    printed, found = capsys.readouterr(), json.loads(out.read_text())
    assert [printed.out.count(f"{name}: ") for name in ("bad", "good")] == [2, 1]
    assert "| good |  | waits: 1 |\n| bad |  | failed: RuntimeError: no kernel image |\n" in printed.out
    assert printed.err.splitlines()[-1].startswith("failed: bad.")
    assert found["bad"]["traceback"][-1] == "is available"
    # Another machine's file is not overwritten.
    out.write_text(other := json.dumps(found | {"cpu": "another"}))
    with pytest.raises(SystemExit):
        benchmark.main(["--out", str(out)])
    assert "gpu.json was measured with another cpu; name another file" in capsys.readouterr().err
    assert out.read_text() == other
