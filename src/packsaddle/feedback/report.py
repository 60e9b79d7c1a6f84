"""A worker's report on an exchange: valid, or invalid because of its own vector, a message that it received, or an
optimizer that could not be reset."""

import json
from dataclasses import astuple, dataclass
from typing import Literal

from packsaddle.errors import MessageError

Kind = Literal["valid", "vector", "message", "reset"]


@dataclass(frozen=True)
class Report:
    """One worker's report on an exchange, in which it sends a vector and receives messages from other workers.

    Kinds: "valid" (its vector, and all messages that it received, are valid), "vector" (its vector is invalid),
    "message" (it received an invalid message), "reset" (its vector is invalid although its optimizer was reset).
    """

    kind: Kind = "valid"
    name: str = ""  # for "vector" and "reset" the first invalid parameter; for "message" the error
    worker: int = -1  # for "message" the rank of the sender

    @classmethod
    def of_message(cls, error: MessageError) -> "Report":
        return cls("message", str(error), -1 if error.worker is None else error.worker)

    @classmethod
    def read(cls, text: str) -> "Report":
        """Parse a report from `text`, the output of `str`."""
        return cls(*json.loads(text))

    def __str__(self) -> str:
        return json.dumps(astuple(self))

    def __bool__(self) -> bool:
        """Return True if the report names a problem, i.e. if its kind is not "valid"."""
        return self.kind != "valid"
