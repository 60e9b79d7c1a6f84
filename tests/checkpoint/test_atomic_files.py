"""Files that are written whole: what happens on a full disk."""

import resource
from pathlib import Path

import pytest
import torch

from packsaddle.checkpoint.atomic_files import write_whole


def test_torch_save_on_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """In the middle of a tensor, where torch raises an error of its own about positions; the old file stays."""
    target = tmp_path / "file"
    write_whole(target, lambda file: torch.save({"x": torch.ones(3)}, file))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(target, lambda file: torch.save({"x": torch.ones(1_000_000)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert torch.equal(torch.load(target, weights_only=True)["x"], torch.ones(3))
