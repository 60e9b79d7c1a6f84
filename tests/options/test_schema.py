"""Values of annotated types, from configurations and saved states."""

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


@pytest.mark.parametrize("saved", [True, False])
def test_a_dataclass_is_read_from_its_fields(saved: bool) -> None:
    data = asdict(RECORD)
    assert decode(Record, data, saved=saved) == RECORD
    assert decode(Record, {**data, "pair": [True, None], "past": (1, 2), "ranks": [4, 5]}, saved=saved) == RECORD


@pytest.mark.parametrize(
    ("change", "message", "also_in_a_configuration"),
    [
        ({"pair": [True]}, r"r\.pair must have 2 entries, got 1", True),
        ({"pair": [1, 2]}, r"r\.pair\[0\] must be of type bool, got 1", True),
        ({"past": [1, True]}, r"r\.past\[1\] must be of type int, got True", True),
        ({"by_worker": [1]}, r"r\.by_worker must be a table, got \[1\]", True),
        ({"by_worker": {3: {"x": "?", "name": "a"}}}, r"r\.by_worker\[3\]\.x must be of type float, got '\?'", True),
        ({"point": {"x": 1.0, "name": "c"}}, r"r\.point\.name must be one of 'a', 'b', got 'c'", True),
        ({"point": {"x": 1.0, "name": "a", "y": 1}}, r"unknown key r\.point\.y", True),
        ({"point": {"x": 1.0}}, r"missing key r\.point\.name", False),
        ({"point": {"x": "1%", "name": "a"}}, r"r\.point\.x must be of type float, got '1%'", False),
        ({"past": ["1k"]}, r"r\.past\[0\] must be of type int, got '1k'", False),
    ],
)
def test_a_value_of_another_type_is_named(change: dict[str, Any], message: str, also_in_a_configuration: bool) -> None:
    data = {**asdict(RECORD), **change}
    with pytest.raises(ConfigError, match=message):
        decode(Record, data, ("r",), saved=True)
    if also_in_a_configuration:
        with pytest.raises(ConfigError, match=message):
            decode(Record, data, ("r",))
    else:
        assert isinstance(decode(Record, data, ("r",)), Record)
