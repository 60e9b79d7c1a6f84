"""What a worker that failed under torch's launcher is to the command that launched it."""

from typing import Any

from packsaddle.schema import ConfigError


class TerminatedError(RuntimeError):
    """This process was sent SIGTERM, which was passed on to its workers; they have ended since."""


class WorkerFailedError(RuntimeError):
    """A launched worker process raised; the message is its first error. `trace` is where, "" if that tells nothing."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def failure_of(rank: int, failure: Any) -> Exception:
    """The error to raise for the first worker that failed."""
    if not isinstance(failure.message, dict):  # killed, or out of memory
        return WorkerFailedError(f"worker {rank} failed: {failure.message}")
    message: str = failure.message["message"]
    kind, _, text = message.partition(": ")
    if kind in ("ConfigError", "MissingExtraError"):
        return ConfigError(text)
    if kind == "PeerLostError":
        return WorkerFailedError(text)
    return WorkerFailedError(f"worker {rank} failed: {message}", failure.message["extraInfo"]["py_callstack"])
