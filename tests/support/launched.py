"""A function that tests run in launched workers, which save after SIGTERM."""

import os
import time
from pathlib import Path

from packsaddle.comm.launching import asked_to_stop, recording_sigterm


def save_when_told(folder: Path) -> None:
    """Wait for SIGTERM, then save, which takes a while."""
    with recording_sigterm():
        (folder / f"here-{os.environ['RANK']}").touch()
        while not asked_to_stop():
            time.sleep(0.01)
        time.sleep(1.0)
        (folder / f"saved-{os.environ['RANK']}").touch()
