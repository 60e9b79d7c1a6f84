"""Lint gives the same verdict before and after the commands of the README."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.process
def test_the_runs_of_the_demo_do_not_change_how_imports_are_sorted(tmp_path: Path) -> None:
    """ruff takes folders in the root for packages unless told where packages are, and tests import a module `runs`."""
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("src", "tests/cli"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", "tests"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
