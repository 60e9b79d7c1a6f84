"""Functions that tests run in launched workers: one worker fails, is stopped, or saves after SIGTERM."""

import os
import signal
import time
from pathlib import Path

from packsaddle.comm.launching import asked_to_stop, recording_sigterm


def fail_beside_a_stopped_one(folder: Path) -> None:
    """Make rank 1 stop itself with SIGSTOP; then raise an error on rank 0."""
    pid = folder / "pid"
    if os.environ["RANK"] == "1":
        pid.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    while not pid.exists() or _state(int(pid.read_text() or 0)) != "T":
        time.sleep(0.01)
    raise ValueError("this batch is bad")


def save_when_told(folder: Path) -> None:
    """Wait for SIGTERM, then save, which takes a while."""
    with recording_sigterm():
        (folder / f"here-{os.environ['RANK']}").touch()
        while not asked_to_stop():
            time.sleep(0.01)
        time.sleep(1.0)
        (folder / f"saved-{os.environ['RANK']}").touch()


def _state(pid: int) -> str:
    """Return the state of a process, such as "T" for a stopped one (see proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if pid else ""
