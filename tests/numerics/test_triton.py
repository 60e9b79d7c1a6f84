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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_of_randomk_waits_for_nothing() -> None:
    from packsaddle import CompressedSGD, RandomK

    w = torch.nn.Parameter(torch.zeros(1000, 1000, device="cuda"))
    opt = CompressedSGD([w], 0.1, RandomK(0.01), noise=0.1)
    w.grad = torch.ones_like(w)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
