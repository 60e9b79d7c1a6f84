"""SIGTERM to a worker: noted, and where it waits for others and may leave at once, an error out of the wait."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from packsaddle.local.elastic.sigterm import LeavingError, Sigterm


@pytest.fixture(autouse=True)
def handler_is_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def listening(*, leaves: bool, grace: float = 100.0) -> Sigterm:
    return Sigterm(lambda: leaves, grace)


@pytest.mark.parametrize("interrupts", [True, False])
def test_a_wait_is_interrupted_where_the_worker_may_leave_at_once(interrupts: bool) -> None:
    sigterm, ended = listening(leaves=interrupts), False
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
    sigterm = listening(leaves=True)
    sigterm.listen()
    send()
    assert sigterm.asked
    with pytest.raises(LeavingError), sigterm.waiting():
        raise AssertionError


@pytest.mark.parametrize("sooner", [True, False])
def test_a_wait_ends_when_the_grace_is_over(sooner: bool) -> None:
    """Of a worker that must wait for others since its memory is nowhere else; the signal comes before or in a wait."""
    sigterm = listening(leaves=False, grace=0.2)
    sigterm.listen()
    assert sigterm.left == 0.2
    if sooner:
        send()

    def wait() -> None:
        if not sooner:
            send()
        assert not threading.Event().wait(100)

    with pytest.raises(LeavingError), sigterm.waiting():
        wait()
    assert sigterm.left == 0
    with pytest.raises(LeavingError), sigterm.waiting():  # and none begins
        raise AssertionError


def test_what_must_not_be_interrupted_is_not() -> None:
    sigterm = listening(leaves=True)
    sigterm.listen()
    with sigterm.waiting():
        sigterm.hold()
        send()
    assert sigterm.asked


def test_a_second_signal_has_the_default_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would kill: so the test takes `os.kill` away from the handler."""
    sigterm, sent = listening(leaves=False), []
    sigterm.listen()
    send()
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    kill(os.getpid(), signal.SIGTERM)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
