"""A worker's report on an exchange. It is valid, or it names a problem: the worker's own vector, or a message that the
worker received.
"""

import json
from dataclasses import astuple, dataclass
from typing import Literal

from packsaddle.errors import MessageError

Kind = Literal["valid", "vector", "message"]


@dataclass(frozen=True)
class Report:
    """One worker's report on an exchange, in which it sends a vector and receives messages from other workers.

    There are three kinds of reports:

    - "valid": the worker's vector is valid, and so are all messages that it received.
    - "vector": the worker's vector is invalid.
    - "message": the worker received an invalid message.
    """

    kind: Kind = "valid"
    name: str = ""  # first invalid parameter (kind "vector") or error (kind "message"); "" if valid
    worker: int = -1  # rank of the sender for kind "message"; -1: another kind, or the sender is unknown

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
