"""Gives every Python that has this folder on its path two pretended GPUs, whose events it writes to the file EVENTS."""

import os
from collections import Counter
from typing import Any

from pretended_device import build, start


class _Written(Counter[Any]):
    """A counter of events that writes each of them when it is counted first, since workers may end without a word."""

    def __missing__(self, event: Any) -> int:
        with open(os.environ["EVENTS"], "a") as file:
            print(*event, sep=" | ", file=file)
        return 0


_recording = start("cuda", build.built(), devices=2).record()
_recording.__enter__().events = _Written()
