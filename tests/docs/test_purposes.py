"""The page of the ledger has all purposes for which the library sends."""

import re
from pathlib import Path

import pytest
import torch

import packsaddle
from packsaddle.compressors.registry import compressors

SOURCE = Path(packsaddle.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "api" / "ledger.md"


@pytest.fixture
def documented() -> set[str]:
    table = PAGE.read_text().split("## Purposes")[1].split("\n## ")[0]
    return set(re.findall(r"`([a-z ]+)`", "\n".join(re.findall(r"^\|([^|]+)\|", table, re.MULTILINE))))


def test_purposes_that_are_written_in_the_code(documented: set[str]) -> None:
    call = r'(?:average|broadcast|mean)\([^(){}]*, "([a-z ]+)"|purpose(?:: str)? ?= ?"([a-z ]+)"'
    found = {a or b for path in SOURCE.rglob("*.py") for a, b in re.findall(call, path.read_text())}
    assert {"start", "escape norm", "certificate", "members"} <= found <= documented


def test_parts_of_messages(documented: set[str]) -> None:
    v = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    for compressor in compressors(0.1):
        assert compressor.encode(v, seed=0, step=0).parts.keys() <= documented, compressor
