"""SIGTERM to a worker: noted, and where it waits for others and may leave at once, an error out of the wait."""

import os
import signal
from collections.abc import Iterator

import pytest

from packsaddle.optim.sigterm import LeavingError, Sigterm


@pytest.fixture(autouse=True)
def handler_is_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("interrupts", [True, False])
def test_a_wait_is_interrupted_where_the_worker_may_leave_at_once(interrupts: bool) -> None:
    sigterm, ended = Sigterm(interrupts=interrupts), False
    sigterm.listen()
    try:
        with sigterm.waiting():
            send()
            ended = True
    except LeavingError:
        assert interrupts
    assert sigterm.asked
    assert ended is not interrupts


def test_a_signal_before_the_wait_ends_it() -> None:
    sigterm = Sigterm(interrupts=True)
    sigterm.listen()
    send()
    assert sigterm.asked
    with pytest.raises(LeavingError), sigterm.waiting():
        raise AssertionError


def test_what_must_not_be_interrupted_is_not() -> None:
    sigterm = Sigterm(interrupts=True)
    sigterm.listen()
    with sigterm.waiting():
        sigterm.hold()
        send()
    assert sigterm.asked


def test_a_second_signal_has_the_default_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would kill: so the test takes `os.kill` away from the handler."""
    sigterm, sent = Sigterm(interrupts=False), []
    sigterm.listen()
    send()
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    kill(os.getpid(), signal.SIGTERM)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
