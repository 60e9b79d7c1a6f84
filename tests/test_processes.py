"""Which tests are taken for ones that start processes, and what becomes of one that is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = """
import functools
import multiprocessing
import subprocess
import sys
import pytest

@functools.cache
def helper():
    start = [sys.executable, "-c", "pass"]
    return lambda: subprocess.run(start, check=True)

def test_by_a_helper():
    helper()()

@pytest.fixture
def made():
    return multiprocessing.get_start_method()

def test_by_a_fixture(made): ...

def test_of_workers(gloo): ...

def test_alone():
    assert sys.executable

def hidden():
    return getattr(sys.modules["sub" + "process"], "run")

def test_that_hides_it():
    hidden()([sys.executable, "-c", "pass"], check=True)

def test_that_asks_git():
    hidden()(["git", "--version"], check=True)

@pytest.mark.process
def test_that_says_it():
    hidden()([sys.executable, "-c", "pass"], check=True)
"""


BOTH = """
import sys
import pytest
codes = []
for marked in ("not process", "process"):
    print("selected:", marked, flush=True)
    codes.append(pytest.main([*sys.argv[1:], "-m", marked]))
sys.exit(max(codes))
"""


def passed(printed: str) -> list[str]:
    """Return the names of the tests that passed, by pytest's lines."""
    lines = [line for line in printed.splitlines() if "::" in line and "[" in line]
    errors = {line.split("::")[1].split()[0] for line in lines if " ERROR" in line or " FAILED" in line}
    names = [line.split("::")[1].split()[0] for line in lines if " PASSED" in line]
    return [name for name in names if name not in errors]


@pytest.mark.nightly
def test_marks_are_set_where_a_start_can_be_seen_and_missed_where_it_cannot(tmp_path: Path) -> None:
    """These tests with the conftest of ours, as if they were among ours."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_inner.py").write_text(TESTS)
    words = ["-p", "conftest", "-c", str(HERE.parent / "pyproject.toml"), "-v", "-p", "no:cacheprovider"]
    command = [sys.executable, "-c", BOTH, *words, "-p", "no:xdist", f"--rootdir={folder}", "test_inner.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    quick, others = done.stdout.split("selected: process")
    assert passed(quick) == ["test_alone", "test_that_asks_git"]
    assert passed(others) == ["test_by_a_helper", "test_by_a_fixture", "test_of_workers", "test_that_says_it"]
