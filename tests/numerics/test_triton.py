"""The CUDA loops against torch's: on a GPU where there is one, else in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def test_triton_loops_against_torch() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    env = {**os.environ, **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})}
    script = Path(__file__).parents[1] / "support" / "triton_loops.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["gaussians", "signs", "levels"]
