"""Text as data, and runs on it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import command

from lab.runs.config import DataConfig, ModelConfig
from lab.runs.tasks.models import make_task
from lab.runs.tasks.sharding import shard
from lab.runs.tasks.text import UNKNOWN, Text, load_text

CPU = torch.device("cpu")
WORDS = ("saddle", "mule", "a long way", "packs?", "\u00fcber", "noise,", "42")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of words in no particular order, 4,000 characters or so, some of them rare."""
    picks = torch.randint(len(WORDS), (700,), generator=torch.Generator().manual_seed(5)).tolist()
    story = " ".join(WORDS[i] for i in picks)
    (tmp_path / "text" / "part").mkdir(parents=True)
    (tmp_path / "text" / "b.txt").write_text(story[1500:] + "\u2203", encoding="utf-8")
    (tmp_path / "text" / "part" / "a.md").write_text("~\u2200" + story[:1500], encoding="utf-8")
    (tmp_path / "text" / "ignored.py").write_text("%" * 100)
    return tmp_path / "text"


def load(folder: Path | None, *, train: bool = True, **options: Any) -> Text:
    return load_text(DataConfig("text", **options), folder, train=train)


def everything(data: Text) -> tuple[torch.Tensor, torch.Tensor]:
    return data.batch(torch.arange(len(data)), CPU)


@pytest.mark.parametrize("train", [True, False])
def test_windows_and_targets(folder: Path, train: bool) -> None:
    """Against lists, a dictionary and a loop."""
    whole = (folder / "b.txt").read_text("utf-8") + "\n" + (folder / "part" / "a.md").read_text("utf-8")
    cut = len(whole) - len(whole) // 10
    known = sorted(c for c, n in Counter(whole[:cut]).items() if n >= 5)
    codes = [known.index(c) + 1 if c in known else 0 for c in (whole[:cut] if train else whole[cut:])]
    windows = [codes[i : i + 11] for i in range(0, len(codes) - 10, 10)]

    data = load(folder, train=train, context=10)
    assert (data.vocabulary, data.classes, data.shape) == ("".join(known), len(known) + 1, torch.Size([10]))
    inputs, targets = everything(data)
    assert inputs.tolist() == [w[:-1] for w in windows]
    assert targets.tolist() == [w[1:] for w in windows]
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert data.batch(torch.tensor([3]), CPU, torch.float64)[0].tolist() == [windows[3][:-1]]


def test_the_vocabulary_leaves_out_what_is_rare(tmp_path: Path) -> None:
    """Below five occurrences, and beyond 1,023 characters; of equally frequent ones the lower code points stay."""
    (tmp_path / "few.txt").write_text("aaaaabbbbccccc" + "a" * 20)
    data = load(tmp_path, context=2)
    assert data.vocabulary == "ac"
    assert everything(data)[0][:7].flatten().tolist() == [1] * 5 + [UNKNOWN] * 4 + [2] * 5
    (tmp_path / "many").mkdir()
    characters = [chr(0x4E00 + i) for i in range(1500)]
    (tmp_path / "many" / "a.txt").write_text("".join(reversed(characters)) * 6 + characters[-1] * 1100, "utf-8")
    assert load(tmp_path / "many").vocabulary == "".join([*characters[:1022], characters[-1]])


def test_shards(folder: Path) -> None:
    """class: one stretch after the other; iid: at random; both disjoint and complete."""
    data = load(folder, context=10)
    for how in ("iid", "class"):
        shards = [shard(data, how, worker=w, workers=3, seed=1) for w in range(3)]
        assert sorted(torch.cat(shards).tolist()) == list(range(len(data)))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
        assert (torch.cat(shards).tolist() == list(range(len(data)))) == (how == "class")


CONFIG = """
lr = 0.3
epochs = 4
batch_size = 4
workers = 2
log_every = 20
[data]
name = "text"
shard = "class"
context = 16
[model]
name = "char-transformer"
width = 16
depth = 1
[compressor]
kind = "TopK"
ratio = 0.1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "text.toml"
    path.write_text(CONFIG)
    return path


@pytest.mark.nightly
@pytest.mark.slow
def test_run_and_certify_commands(
    config: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on a folder learns more than the frequencies, tests itself per character, and can be certified."""
    run = tmp_path / "run"
    assert command("lab", "run", config, "--serial", "--data-dir", folder, "--out", run) == 0
    summary = json.loads((run / "summary.json").read_text())
    train, test = (load(folder, context=16, train=t) for t in (True, False))
    share = torch.bincount(train.codes.long()) / len(train.codes)
    assert summary["final_loss"] < float(-torch.special.xlogy(share, share).sum())
    task = make_task(ModelConfig("char-transformer", width=16, depth=1), train.shape, train.classes, 0)
    task.network.load_state_dict(torch.load(run / "checkpoint" / "model.pt", weights_only=True))
    task.requires_grad_(False)
    inputs, targets = everything(test)
    hits = (task.network(inputs).argmax(2) == targets).double().mean()
    assert summary["test_accuracy"] == pytest.approx(float(hits), abs=1e-6)
    assert summary["test_loss"] == pytest.approx(float(task(inputs, targets)), rel=1e-5)

    capsys.readouterr()
    asked = ("--epsilon", 10, "--hessian-lipschitz", 1, "--max-hvps", 5, "--json")
    assert command("lab", "certify", run, "--data-dir", folder, *asked) == 0
    (point,) = json.loads(capsys.readouterr().out)["points"]
    task.requires_grad_()(*everything(train)).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in task.parameters() if p.grad is not None])
    assert point["examples"] == len(train)
    assert point["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-3)
    assert point["lambda_min_upper"] < 0  # far from trained, some direction still bends down
