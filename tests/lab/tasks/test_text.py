"""Text as data, and runs on it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.tasks.sharding import shard
from lab.tasks.text import UNKNOWN, Text, load_text

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
    return load_text(folder, train=train, **options)


def everything(data: Text) -> tuple[torch.Tensor, torch.Tensor]:
    return data.batch(torch.arange(len(data)))


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
    assert data.batch(torch.tensor([3]))[0].tolist() == [windows[3][:-1]]


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
