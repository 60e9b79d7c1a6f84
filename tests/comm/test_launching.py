"""Launched workers that are told to end."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from packsaddle.comm import TerminatedError, launch

# The settings of torch 2.9, the oldest that packsaddle supports, that `launch` may pass.
OF_TORCH_2_9 = {"min_nodes", "max_nodes", "nproc_per_node", "run_id", "rdzv_backend", "rdzv_endpoint", "rdzv_configs"}
OF_TORCH_2_9 |= {"local_addr", "max_restarts", "start_method", "monitor_interval"}


def wait(folder: Path) -> None:
    """Run by the workers of a launch, which SIGTERM ends."""
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)


def test_a_launch_has_no_setting_that_the_oldest_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()
    monkeypatch.setattr("torch.distributed.launcher.api.LaunchConfig", lambda **settings: given.update(settings))
    with pytest.raises(AttributeError):
        launch(wait, (), 2)
    assert given.keys() <= OF_TORCH_2_9


def test_sigterm_ends_a_launch_and_its_workers(tmp_path: Path) -> None:
    def tell() -> None:
        while len([path for path in tmp_path.iterdir() if path.read_text()]) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(TerminatedError):
        launch(wait, (tmp_path,), 2)
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
