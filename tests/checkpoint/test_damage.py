"""Truncations of a checkpoint's files, and flipped bits of its tensors, are refused in one line, or change nothing."""

import hashlib
import json
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch

from packsaddle import CheckpointError, load_checkpoint, save_checkpoint

FLIPS = 1000


class State:
    """A part with a little of everything."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.state = {"x": torch.randn(7, 5, generator=rng), "n": 3, "name": "a", "list": [1.5, None, True]}
        self.loaded: object = None

    def state_dict(self) -> dict[str, object]:
        return self.state

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.loaded = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def boundaries(path: Path) -> set[int]:
    """Where a zip file's parts begin and end, or a manifest's tokens."""
    raw = path.read_bytes()
    if path.suffix == ".json":
        return {i for i, byte in enumerate(raw) if byte in b'{}[]:," \n'} | {0}
    found = {0, len(raw) - 22, len(raw) - 1}
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            name = len(member.filename.encode())
            start = member.header_offset + 30 + name + int.from_bytes(raw[member.header_offset + 28 :][:2], "little")
            found |= {member.header_offset, member.header_offset + 30, start, start + member.compress_size}
        found |= {file.start_dir}
    return found


def outcome(folder: Path) -> str:
    """ "" if it was loaded exactly right, else the error's line."""
    part = State()
    expected = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in part.state.items()}
    line = ""
    try:
        assert load_checkpoint(folder, {"part": part}) is not None
    except CheckpointError as error:
        line = str(error)
    assert part.loaded == (None if line else expected)
    assert "\n" not in line
    return line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worker-0.pt", "worker-0.json"])
def test_truncations_and_flipped_bits(name: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"part": State()}, step=1)
    path = tmp_path / "step-00000001" / name
    whole, rng = path.read_bytes(), random.Random(1)
    cuts = boundaries(path)
    assert len(cuts) > 15
    damaged = [whole[:cut] for cut in sorted(cuts)] + [whole + b"x"]
    for _ in range(FLIPS // 2 if name.endswith(".pt") else 0):
        raw = bytearray(whole)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(raw))
    harmless = 0
    for raw in damaged:
        path.write_bytes(raw)
        line = outcome(tmp_path)
        harmless += not line
        if not line:  # only white space at the end may be missing
            assert json.loads(raw) == json.loads(whole)
        else:
            assert name in line
    assert harmless <= 1
    path.write_bytes(whole)
    assert outcome(tmp_path) == ""


def test_a_manifest_cannot_lead_elsewhere_or_execute(tmp_path: Path) -> None:
    """Right hashes, wrong content: other files' names are not followed, other objects are not made."""
    save_checkpoint(tmp_path, {"part": State()}, step=1)
    path = tmp_path / "step-00000001" / "worker-0.json"
    for change in (
        {"file": "../../elsewhere.pt"},
        {"rank": "../1"},
        {"rank": 1},
        {"step": 7},
        {"workers": None},
        {"bytes": True},
    ):
        path.with_name("kept").write_text(path.read_text())
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert "worker-0.json is" in outcome(tmp_path), change
        path.with_name("kept").rename(path)
    made = tmp_path / "made"

    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(made),)

    torch.save({"parts": {"part": Evil()}, "extra": {}}, path.with_suffix(".pt"))
    raw = path.with_suffix(".pt").read_bytes()
    change = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "cannot be read: Weights only load failed" in outcome(tmp_path)
    assert not made.exists()
