"""A word that the workers of one start have in common, and those of an earlier start do not know.

torchrun's meeting place outlives a restart (torch 2.13), and in it what the workers before have written: their
addresses, which the new ones would try to reach for ever. So the new ones write under a prefix of their own. The number
of restarts is none: with several machines each torchrun counts for itself.
"""

import time
import uuid
from collections.abc import Callable
from typing import Protocol

_PAUSE = 0.02
_ROUND = 1.0  # seconds after which what has been heard is looked at again


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


def agree(store: Store, rank: int, size: int, seconds: float) -> str:
    """Return the word; collective. Raises RuntimeError after so many seconds.

    Rank 0 makes it, lists the workers that have answered to it, by what each has called itself, and waits until each
    has found itself in the list: an answer may be an earlier worker's last word.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        return _lead(store, me, size, deadline)
    while time.monotonic() < deadline:
        word = _read(store, "packsaddle/word")
        if word:
            store.set(f"packsaddle/{word}/{rank}", me)
            if _wait(lambda word=word: me in _read(store, f"packsaddle/{word}/all").split(",")):  # type: ignore[misc]
                store.set(f"packsaddle/{word}/in/{rank}", me)
                return word
        time.sleep(_PAUSE)
    raise RuntimeError(f"rank {rank} has waited {seconds:g} s for rank 0")


def _lead(store: Store, word: str, size: int, deadline: float) -> str:
    store.set("packsaddle/word", word)
    others = range(1, size)
    while time.monotonic() < deadline:
        names = [_read(store, f"packsaddle/{word}/{rank}") for rank in others]
        if all(names):
            store.set(f"packsaddle/{word}/all", ",".join(names))
            if _wait(lambda names=names: [_read(store, f"packsaddle/{word}/in/{r}") for r in others] == names):  # type: ignore[misc]
                return word
        time.sleep(_PAUSE)
    silent = [str(rank) for rank in others if not _read(store, f"packsaddle/{word}/{rank}")]
    raise RuntimeError(f"no answer from rank {', '.join(silent) or 'any'} at the start")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _ROUND
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True
