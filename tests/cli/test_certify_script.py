"""packsaddle certify-script: any script's checkpoint, and errors in one line."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import command, refused
from forked_python import environment, python, torchrun

SCRIPT = """
import torch
from torch import nn

def problem():
    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return nn.Linear(4, 4), lambda model, x: (model(model(x)) - x).square().mean(), list(data.split(8))

def mine():
    import torch.distributed as dist
    model, loss_fn, batches = problem()
    return model, loss_fn, batches[dist.get_rank()::2]

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)

    def forward(self, x):
        return self.module(x)

def named():
    _, loss_fn, batches = problem()
    return Own(), loss_fn, batches

def float_loss():
    model, loss_fn, batches = problem()
    return model, lambda model, x: loss_fn(model, x).item(), batches

def vector_loss():
    model, loss_fn, batches = problem()
    return model, lambda model, x: (model(x) - x).square().mean(1), batches

def constant_loss():
    model, loss_fn, batches = problem()
    return model, lambda model, x: x.mean(), batches

def two():
    return 1, 2

def number():
    return 3, *problem()[1:]

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


def test_what_the_function_imports_is_found_beside_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it puts a folder of its own before all others, and if its loss imports."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(folder))])
    (folder / "beside_it.py").write_text("square = lambda x: x.square().mean()")
    (folder / "importing_script.py").write_text(
        "import sys\nsys.path.insert(0, '/none')\nimport torch\n\n\ndef problem():\n"
        "    def loss(model, x):\n        import beside_it\n        return beside_it.square(model(x))\n"
        "    return torch.nn.Linear(4, 4), loss, [torch.ones(3, 4)]\n"
    )
    assert command("certify-script", "importing_script:problem", "zero.pt", "--max-hvps", 5, "--epsilon", 1) == 0


def test_a_folder_that_cannot_be_made_is_told_before_the_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("")
    words = ("certify-script", "script_of_mine:problem", "zero.pt", "--epsilon", 10)
    refused(capsys, "output folder file/in cannot be created", *words, "--out", "file/in")
    refused(capsys, "broken failed", "certify-script", "script_of_mine:broken", "zero.pt", "--out", "new")
    assert not (folder / "new").exists()


def test_what_is_found_is_told_where_it_cannot_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("packsaddle.cli.findings.write_whole", full)
    words = ("certify-script", "script_of_mine:problem", "zero.pt", "--epsilon", 10, "--max-hvps", 5, "--out", "new")
    assert command(*words) == 2
    told = capsys.readouterr()
    assert "lambda_min" in told.out
    assert "new cannot be written: No space left on device" in told.err


@pytest.mark.parametrize(
    ("function", "prefix"),
    [
        *(("problem", p) for p in ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.")),
        *(("named", p) for p in ("module.", "module.module.", "_orig_mod.module.")),
    ],
)
def test_weights_of_wrapped_models_are_those_of_the_model(
    function: str, prefix: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if a part of the model has a wrapper's name."""
    weights = torch.load(folder / "zero.pt")
    torch.save({prefix + name: value for name, value in weights.items()}, folder / "named.pt")
    assert command("certify-script", f"script_of_mine:{function}", "named.pt", "--json", "--epsilon", 10) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(1.0, rel=0.3)


@pytest.mark.slow
def test_findings_are_written_to_a_new_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("certify-script", "script_of_mine:problem", "zero.pt", "--epsilon", 10, "--tolerance", 0.1)
    assert command(*words, "--out", "found") == 0
    told = capsys.readouterr().out
    assert "lambda_max in [" in told
    assert told.endswith("certificate: found\n")
    (point,) = json.loads((folder / "found" / "certificates.json").read_text())["points"]
    assert point["residual"] <= 0.1 * abs(point["lambda_min_upper"])
    assert len(point["sharpest_profile"]["losses"]) == 41
    directions = torch.load(folder / "found" / "certificate.direction.pt")
    assert {name: len(v) for name, v in directions.items()} == {"escape_direction": 20, "sharpest_direction": 20}
    assert (folder / "found" / "certificate.png").stat().st_size > 10_000
    refused(capsys, "output folder found already exists", *words, "--out", "found")


@pytest.mark.nightly
@pytest.mark.process
def test_workers_under_torchrun_certify_the_union(folder: Path) -> None:
    """Each has half of the batches."""
    words = ("--epsilon", "10", "--hessian-lipschitz", "1e-4", "--hvp", "differences", "--json")
    call = torchrun("-m", "packsaddle.cli", "certify-script", "script_of_mine:mine", "zero.pt", *words)
    done = subprocess.run(call, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert command("certify-script", "script_of_mine:problem", "zero.pt", *words, "--out", "alone") == 0
    (alone,) = json.loads((folder / "alone" / "certificates.json").read_text())["points"]
    assert (found["verdict"], found["examples"]) == ("saddle", 32)
    for name in ("loss", "lambda_min_upper", "grad_norm"):
        assert found[name] == pytest.approx(alone[name], abs=1e-3 * abs(alone["lambda_min_upper"]))


@pytest.mark.process
def test_a_file_of_another_format_is_told_in_one_line(folder: Path) -> None:
    """torch warns of pickles of its format's future; in a process, since pytest catches warnings."""
    (folder / "junk.pt").write_bytes(pickle.dumps({"weight": 1}, protocol=4))
    call = [python(), "-m", "packsaddle.cli", "certify-script", "script_of_mine:problem", "junk.pt"]
    done = subprocess.run(call, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("packsaddle: error: checkpoint junk.pt cannot be read: it is damaged")
    assert done.stderr.count("\n") == 1


MISTAKES = {
    ("", "zero.pt"): "the function must be given as module:function, got 'script_of_mine'",
    (":one", "zero.pt"): "script_of_mine has no function 'one'",
    (".py:problem", "zero.pt"): "write script_of_mine:problem",
    (":two", "zero.pt"): "script_of_mine:two must return a model, a loss function and batches, got",
    (":number", "zero.pt"): "script_of_mine:number: model must be a torch.nn.Module, got int",
    (":broken", "zero.pt"): "script_of_mine:broken failed: KeyError: 'no data'",
    (":problem", "none.pt"): "checkpoint none.pt does not exist",
    (":problem", "damaged.pt"): "checkpoint damaged.pt cannot be read: ",
    (":problem", "whole.pt"): "or contains more than tensors and plain types, such as a whole model: save model.state",
    (":problem", "other.pt"): "other.pt does not hold the weights of this model: ",
    (":float_loss", "zero.pt"): "script_of_mine:float_loss: loss_fn must return a tensor of one",
    (":vector_loss", "zero.pt"): "loss_fn must return a tensor of one number, the batch's mean loss",
    (":constant_loss", "zero.pt"): "loss_fn must return a loss that torch can differentiate, got",
    (":problem", "zero.pt", "--max-hvps", "0"): "--max-hvps must be at least 1, got 0",
    (":problem", "zero.pt", "--epsilon", "0"): "--epsilon must be positive and finite, got 0",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items(), ids=map(" ".join, MISTAKES))
def test_mistakes_are_told_in_one_line(
    words: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "damaged.pt").write_bytes(b"no weights")
    torch.save({"weight": torch.zeros(2, 2)}, folder / "other.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "whole.pt")
    refused(capsys, message, "certify-script", f"script_of_mine{words[0]}", *words[1:])
