"""Values of annotated types, from saved states."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest

from packsaddle.errors import ConfigError
from packsaddle.options.schema import decode


@dataclass(frozen=True)
class Point:
    x: float = 0.0
    name: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Record:
    """One field of each kind that a saved state has."""

    point: Point
    by_worker: dict[int, Point | None]
    pair: tuple[bool, int | None]
    past: list[int]
    ranks: tuple[int, ...] = ()
    rest: Any = None


RECORD = Record(Point(1.5, "b"), {3: Point(), 7: None}, (True, None), [1, 2], (4, 5), {"any": [{}]})


def test_a_dataclass_is_read_from_its_fields() -> None:
    data = asdict(RECORD)
    assert decode(Record, data) == RECORD
    assert decode(Record, {**data, "pair": [True, None], "past": (1, 2), "ranks": [4, 5]}) == RECORD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair": [True]}, r"r\.pair must have 2 entries, got 1"),
        ({"pair": [1, 2]}, r"r\.pair\[0\] must be of type bool, got 1"),
        ({"past": [1, True]}, r"r\.past\[1\] must be of type int, got True"),
        ({"past": ["1k"]}, r"r\.past\[0\] must be of type int, got '1k'"),
        ({"by_worker": [1]}, r"r\.by_worker must be a table, got \[1\]"),
        ({"by_worker": {3: {"x": "?", "name": "a"}}}, r"r\.by_worker\[3\]\.x must be of type float, got '\?'"),
        ({"point": {"x": 1.0, "name": "c"}}, r"r\.point\.name must be one of 'a', 'b', got 'c'"),
        ({"point": {"x": 1.0, "name": "a", "y": 1}}, r"unknown key r\.point\.y"),
        ({"point": {"x": 1.0}}, r"missing key r\.point\.name"),
        ({"point": 1.0}, r"r\.point must be a table, got 1\.0"),
    ],
)
def test_a_value_of_another_type_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Record, {**asdict(RECORD), **change}, ("r",))
