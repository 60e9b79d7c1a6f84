"""packsaddle certify-script: any script's checkpoint, and errors in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch
from commandline import command, refused

SCRIPT = """
import torch
from torch import nn

def problem():
    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return nn.Linear(4, 4), lambda model, x: (model(model(x)) - x).square().mean(), list(data.split(8))

def two():
    return 1, 2

def broken():
    raise KeyError("no data")

one = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "script_of_mine", raising=False)
    (tmp_path / "script_of_mine.py").write_text(SCRIPT)
    weights = {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)}
    torch.save(weights, tmp_path / "zero.pt")
    torch.save({"model": weights, "step": 3}, tmp_path / "wrapped.pt")
    return tmp_path


def test_a_scripts_checkpoint_is_certified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """f = ||W W x - x||^2 / 4 has gradient 0 at W = 0 and negative curvature: a saddle, wrapped or not."""
    found = []
    for file in ("zero.pt", "wrapped.pt"):
        rest = ("--epsilon", 10, "--hessian-lipschitz", 1e-4, "--hvp", "differences", "--json")
        assert command("certify-script", "script_of_mine:problem", file, *rest) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert {f["verdict"] for f in found} == {"saddle"}
    assert found[0]["hvp"] == "differences of gradients"
    assert found[0]["lambda_min_upper"] == found[1]["lambda_min_upper"]
    assert command("certify-script", "script_of_mine:problem", "zero.pt") == 0
    assert "lambda_max in [" in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "damaged.pt").write_bytes(b"no weights")
    torch.save({"weight": torch.zeros(2, 2)}, folder / "other.pt")
    for function, file, message in (
        ("script_of_mine", "zero.pt", "the function must be given as module:function, got 'script_of_mine'"),
        ("no_such_module:problem", "zero.pt", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("script_of_mine:one", "zero.pt", "script_of_mine has no function 'one'"),
        ("script_of_mine:two", "zero.pt", "script_of_mine:two must return a model, a loss function and batches, got"),
        ("script_of_mine:broken", "zero.pt", "script_of_mine:broken failed: KeyError: 'no data'"),
        ("script_of_mine:problem", "none.pt", "checkpoint none.pt does not exist"),
        ("script_of_mine:problem", "damaged.pt", "checkpoint damaged.pt cannot be read: "),
        ("script_of_mine:problem", "other.pt", "other.pt does not hold the weights of this model: "),
    ):
        refused(capsys, message, "certify-script", function, file)
    refused(capsys, "--max-hvps must be at least 1, got 0", "certify-script", "a:b", "c", "--max-hvps", 0)
    refused(capsys, "--epsilon must be positive and finite, got 0", "certify-script", "a:b", "c", "--epsilon", 0)
