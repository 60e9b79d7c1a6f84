"""Failures of workers: errors for lost peers and failed launches, and a roll call to find unresponsive workers."""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from packsaddle.errors import ConfigError
from packsaddle.messages import numbered

GRACE = 5.0  # seconds for the remaining workers to answer a roll call
_PAUSE = 0.1
# Substrings of the network errors of gloo and of NCCL. With TORCH_NCCL_BLOCKING_WAIT=1, and in the first collective of
# a group, NCCL's error is raised by the collective that fails. Otherwise a later collective raises it.
_NETWORK = (
    *("gloo/transport", "pair closure", "Connection closed", "Connection reset", "Broken pipe"),
    *("remote process exited", "collective operation timeout", "NCCL communicator was aborted"),
)


class PeerLostError(RuntimeError):
    """A collective failed because other workers died, hang, or are unreachable; the message names them."""


@contextmanager
def names_call(call: str) -> Iterator[None]:
    """Context manager that adds the name of a collective function, `call`, to the message of a PeerLostError."""
    try:
        yield
    except PeerLostError as error:
        raise PeerLostError(f"{error}. It waited in {call}, which every worker must call") from error


@dataclass(frozen=True)
class Roll:
    """The result of a roll call: the workers that still respond after a collective failed."""

    answered: tuple[int, ...]  # ranks that answered, this worker's own included
    absent: tuple[int, ...]  # ranks that did not answer
    reached: bool  # True if torch's store, which collects the answers, could be reached


def is_network(error: Exception) -> bool:
    return any(sign in str(error) for sign in _NETWORK)


def roll_call(store: Any, rank: int, ranks: Sequence[int], grace: float = GRACE) -> Roll:
    """Announce this worker in torch's `store`, and return a `Roll` of the ranks that announce themselves within `grace`
    seconds, and of those that do not.

    Every worker whose collective fails calls this, so an absent worker is dead, hung or cut off. If the store does not
    answer, `Roll.reached` is False, and all ranks except this worker's are recorded as absent.
    """
    found: list[Roll] = []

    def call() -> None:
        try:
            store.set(f"packsaddle/here/{rank}", "1")
            absent = _wait(store, "here", ranks, grace)
            answered = tuple(r for r in ranks if r not in absent)
            # The first rank may host the store, so it must not exit before the other ranks have read the answers.
            store.set(f"packsaddle/heard/{rank}", "1")
            if rank == ranks[0]:
                _wait(store, "heard", answered, grace)
            found.append(Roll(answered, absent, True))
        except RuntimeError:  # the connection to the store broke
            pass

    thread = threading.Thread(target=call, daemon=True)  # calls to an unreachable store block for minutes
    thread.start()
    thread.join(2 * grace + 1)
    return found[0] if found else Roll((rank,), tuple(r for r in ranks if r != rank), False)


def _wait(store: Any, word: str, ranks: Sequence[int], seconds: float) -> tuple[int, ...]:
    """Wait at most `seconds` until torch's store has the key packsaddle/WORD/RANK of each rank. Returns the ranks whose
    keys are then still missing."""
    deadline = time.monotonic() + seconds
    while True:
        silent = tuple(r for r in ranks if not store.check([f"packsaddle/{word}/{r}"]))
        if not silent or time.monotonic() > deadline:
            return silent
        time.sleep(_PAUSE)


def explanation(roll: Roll, rank: int, size: int, error: Exception, timeout: timedelta | None) -> str:
    """Return the error message for a failed collective: which workers are lost according to the roll call, what the
    user can do, and the beginning of `error`, the error of the backend."""
    # Remove the file name and the line number of torch's source from the message.
    text = re.sub(r"NCCL error in: \S+, ", "", str(error).split("] ", 1)[-1])
    reason = " ".join(text.split()).partition(". ")[0][:60]
    limit = "the timeout" if timeout is None else f"the timeout of {timeout.total_seconds():g} s"
    advice = f"Read its output and resume from the last checkpoint; if it was late, raise {limit}"
    if not roll.reached:
        what = f"the others and rank 0's store: rank 0 is dead, or the network of rank {rank} or rank 0 is cut"
    elif roll.absent:
        names = numbered("rank", roll.absent)
        alone = f"or rank {rank} itself is cut off"
        others = alone if roll.answered == (rank,) else f"the other {len(roll.answered)} answer"
        what = f"{names} (dead, hung or cut off; {others})"
    else:
        what = f"the others, but all {size} answer now: one was late, or is at another step"
        advice = f"Raise {limit}, or compare their outputs"
    return f"rank {rank} of {size} lost {what}. {advice}. Reason: {reason}"


class TerminatedError(RuntimeError):
    """The launcher received SIGTERM and forwarded it to its workers, which have ended."""


class WorkerFailedError(RuntimeError):
    """A launched worker process failed. The message is that of the first error in a worker, and `trace` is the
    traceback of that error, or "" if there is none."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def failure_of(rank: int, failure: Any) -> Exception:
    """Return the exception to raise for `failure`, torch's record of the first worker that failed."""
    if not isinstance(failure.message, dict):  # the worker was killed, for example because memory ran out
        return WorkerFailedError(f"worker {rank} failed: {failure.message}")
    message: str = failure.message["message"]
    kind, _, text = message.partition(": ")
    if kind in ("ConfigError", "MissingExtraError"):
        return ConfigError(text)
    if kind == "PeerLostError":
        return WorkerFailedError(text)
    return WorkerFailedError(f"worker {rank} failed: {message}", failure.message["extraInfo"]["py_callstack"])
