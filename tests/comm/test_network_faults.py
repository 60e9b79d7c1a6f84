"""Between hosts, with a cable pulled: training goes on, or ends and says why."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packsaddle.comm.simulation import simulate

SCRIPT = Path(__file__).parents[2] / "lab" / "bench" / "network_faults.py"
STEPS = 60
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.usefixtures("hosts_here")
def test_a_pulled_cable() -> None:
    """For less than the timeout: the weights are those of a simulation, bit for bit; for good: both workers say so."""
    settings = {"brief": ("--timeout", "30", "--brief", "1.5"), "cut": ("--timeout", "4")}
    started = []
    for case, own in settings.items():
        command = [sys.executable, str(SCRIPT), case, "--steps", str(STEPS), *own]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT))
    train = runpy.run_path(str(SCRIPT))["train"]
    expected = simulate(lambda rank: train(rank, STEPS), 2)
    printed = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    brief, cut = (json.loads(out.splitlines()[-1]) for out, _ in printed)
    assert [worker["digest"] for worker in brief] == expected
    assert brief[0]["longest"] > 1.0  # so the cable was out
    stays, gone = (worker["lost"] for worker in cut)
    assert "rank 0 of 2 lost rank 1 (dead, hung or cut off; or rank 0 itself is cut off)" in stays
    assert "rank 1 of 2 lost the others and rank 0's store" in gone


@pytest.mark.usefixtures("hosts_here")
@pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed")
def test_a_pulled_cable_among_workers_that_come_and_go(tmp_path: Path) -> None:
    """Rounds go on without the one behind it; when it is back, it is in them again, and has lost nothing."""
    script = SCRIPT.with_name("elastic.py")
    command = [sys.executable, str(script), "--out", str(tmp_path / "cut")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "cut").read_text())
    assert found["wrong"] == []
    assert found["rounds_during"] > 0
    assert found["rounds_of_all"] > 0
