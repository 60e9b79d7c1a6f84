"""Launched workers that are told to end."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import launched
import pytest

from packsaddle.comm import TerminatedError, launch

# The settings of torch 2.9, the oldest that packsaddle supports, that `launch` may pass.
OF_TORCH_2_9 = {"min_nodes", "max_nodes", "nproc_per_node", "run_id", "rdzv_backend", "rdzv_endpoint", "rdzv_configs"}
OF_TORCH_2_9 |= {"local_addr", "max_restarts", "start_method", "monitor_interval"}


def test_a_launch_has_no_setting_that_the_oldest_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()
    monkeypatch.setattr("torch.distributed.launcher.api.LaunchConfig", lambda **settings: given.update(settings))
    with pytest.raises(AttributeError):
        launch(launched.save_when_told, (), 2)
    assert given.keys() <= OF_TORCH_2_9


def test_workers_that_are_told_to_end_have_time_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGTERM on the command; and then they end by themselves."""
    sent, kill = [], os.kill

    def heard(pid: int, how: signal.Signals) -> None:
        sent.append(how)
        kill(pid, how)

    monkeypatch.setattr(os, "kill", heard)

    def tell() -> None:
        while len(list(tmp_path.glob("here-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(TerminatedError):
        launch(launched.save_when_told, (tmp_path,), 2)
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert sent == [signal.SIGTERM] * 3  # the launcher, and by it its workers
