"""Workers that start where others were before agree on a word, whatever those have left behind."""

import threading
from collections.abc import Callable
from itertools import product

import pytest
from clock import Clock

from packsaddle.comm.launching import agree_on_prefix


class Place:
    """A store of this process."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.held[key] = value

    def get(self, key: str) -> bytes:
        return self.held[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.held for key in keys)


def met(place: Place, size: int, order: Callable[[int], float] = lambda rank: 0.0) -> list[str]:
    words = [""] * size

    def worker(rank: int) -> None:
        threading.Event().wait(order(rank))
        words[rank] = agree_on_prefix(place, rank, size, 30.0)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return words


@pytest.mark.slow
@pytest.mark.parametrize(("size", "first"), list(product((1, 2, 4), (0, 1))))
def test_start_after_start_all_have_one_word_that_is_new(size: int, first: int) -> None:
    place, seen = Place(), set()
    for _ in range(3):
        words = met(place, size, lambda rank: 0.0 if (rank == 0) == (first == 0) else 0.1)
        assert len(set(words)) == 1
        assert words[0] not in seen
        seen.add(words[0])


@pytest.mark.slow
def test_the_last_word_of_a_worker_of_before_does_not_keep_the_new_one_out() -> None:
    """An old rank 1 answers to the new rank 0 and is killed; the new rank 1 comes later."""
    place = Place()
    words: dict[str, str] = {}
    leader = threading.Thread(target=lambda: words.update(leader=agree_on_prefix(place, 0, 2, 30.0)))
    leader.start()
    while "packsaddle/word" not in place.held:
        threading.Event().wait(0.01)
    place.set(f"packsaddle/{place.held['packsaddle/word']}/1", "old")
    threading.Event().wait(0.2)  # it is in the list
    assert agree_on_prefix(place, 1, 2, 30.0) == place.held["packsaddle/word"]
    leader.join()
    assert words["leader"] == place.held["packsaddle/word"]


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packsaddle.comm.launching.time", Clock())
    with pytest.raises(RuntimeError, match="no answer from rank 1, 2"):
        agree_on_prefix(Place(), 0, 3, 2.5)
    with pytest.raises(RuntimeError, match=r"rank 1 has waited 2\.5 s for rank 0"):
        agree_on_prefix(Place(), 1, 3, 2.5)
