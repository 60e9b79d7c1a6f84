"""The documentation runs: Python blocks of the README and the pages."""

import os
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from forked_python import environment, torchrun

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}  # a page's blocks continue each other
    with mock.patch.dict(os.environ):
        for block in blocks(page):
            exec(compile(block, page.name, "exec"), names)


def blocks(page: Path) -> list[str]:
    found: list[str] = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return found


def test_the_script_of_the_first_five_minutes_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(blocks(ROOT / "docs" / "start.md")[0])
    done = subprocess.run(torchrun(script), capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    # The page shows the output: its losses, up to the rounding of another CPU, and its bytes.
    shown = (ROOT / "docs" / "start.md").read_text().partition("    torchrun --nproc-per-node 2 train.py\n")[2]
    losses = [re.findall(r"worker \d of 2: loss ([\d.]+) after 320", text) for text in (done.stdout, shown)]
    assert list(map(float, losses[0])) == pytest.approx(list(map(float, losses[1])), rel=0.05), done.stdout
    ledger = re.findall(r"^ {4}(bytes .*|total .*|\d+ times fewer .*)$", shown, re.MULTILINE)
    assert len(ledger) == 3
    assert all(line in done.stdout for line in ledger), done.stdout
