"""A rehearsal of `make gpu`: the whole command on two pretended GPUs, which its processes find as they would find real
ones. gloo plays NCCL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretended_device import FAULTS, build

from lab.bench.result import machine
from packsaddle.compressors import compressors, describe


@pytest.mark.nightly
@pytest.mark.process
def test_the_whole_command(library: Path, tmp_path: Path) -> None:
    # Continue a call in which a part failed.
    out, events = tmp_path / "gpu.json", tmp_path / "events"
    gpus = {f"cuda:{i}": "pretended, 8 GiB, compute capability 9.0" for i in range(2)}
    before = {"gpus": gpus, **machine(threads=1), "repeats": 1}
    out.write_text(json.dumps(before | {"waits, d = 5,000": {"failed": "no time was left"}}))
    path = os.pathsep.join([str(Path(build.__file__).parents[1] / "rehearsal"), *sys.path])
    command = [sys.executable, "-m", "lab.bench.gpu", "--out", str(out), "--d", "5000", "--repeats", "1"]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "EVENTS": str(events)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    # Every part has its rows.
    found = json.loads(out.read_text())
    assert found.items() >= before.items()
    waits = {name: row["waits"] for name, row in found["waits, d = 5,000"].items()}
    assert waits["SGD, fused"] == waits["AdamW, fused, between two rounds of local updates"] == 0
    assert waits["AdamW, fused, and a round of local updates"] == waits["CompressedSGD TopK(ratio=0.01)"] == 1
    assert all(row["launches"] > 0 for row in found["waits, d = 5,000"].values())
    assert found["two processes"].keys() == {"hook", "local updates"}
    assert all(row["one model"] and row["last loss"] < row["first loss"] for row in found["two processes"].values())
    timed = {part: found[f"{part}, d = 5,000"] for part in ("exchange", "steps", "packing")}
    assert timed["exchange"].keys() == {"copy", "all-reduce", "SGD's step and a round of local updates"}
    assert timed["steps"].keys() == waits.keys() | {"copy"}
    assert {name.rsplit(" ", 1)[0] for name in timed["packing"]} == {"copy", *map(describe, compressors(0.01))}
    assert all(0 < row["low"] <= row["copies"] <= row["high"] for rows in timed.values() for row in rows.values())
    for part, row in (("waits, d = 5,000", "SGD, fused"), ("two processes", "hook")):
        assert f"| {part} | {row} | " in done.stdout

    # The devices have exchanged tensors by NCCL, and no process has made a fault.
    lines = events.read_text().splitlines()
    assert any(line.startswith("collective | ") for line in lines)
    faults = [line for line in lines if line.startswith(FAULTS) or "gloo on the device" in line]
    assert not faults, "\n".join(faults)
