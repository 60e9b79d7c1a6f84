"""Values of annotated types, from configurations and saved states; lines of keys in TOML, with tomllib as the judge."""

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packsaddle.errors import ConfigError
from packsaddle.options.schema import decode, line_of

TRAPS = '''# a = 1
a = """
b = 2
[c]
""" # ends here
x.y = 1
x."z.w" = [  # a list
  1, # [d]
  2,
]
d = \'\'\'
# '\'\'\'
[t.u]
k = {m = 1, n.o = "]"}

[t]
k = 1
[[many]]
p = 1
[[many]]
q = 2
'''


def line(key: tuple[str, ...], text: str) -> int | None:
    words = line_of(key, Path("f.toml"), text).removeprefix("f.toml").removeprefix(", line ")
    return int(words) if words else None


def test_what_looks_like_a_key_but_is_none() -> None:
    keys = [("a",), ("x", "y"), ("x", "z.w"), ("d",), ("t", "u"), ("t", "u", "k", "n", "o"), ("t", "k"), ("many",)]
    assert [line(key, TRAPS) for key in keys] == [2, 6, 7, 11, 13, 14, 17, 18]
    assert line(("t",), TRAPS) == 13  # by [t.u], above [t]
    assert line(("t", "none"), TRAPS) == 13
    assert line(("many", "p"), TRAPS) == 18  # of an array's tables no key has a line
    assert (line(("b",), TRAPS), line(("c",), TRAPS), line((), TRAPS)) == (None, None, None)


def test_lines_may_end_in_the_way_of_windows() -> None:
    text = 'a = """\r\n"""\r\nb = 1\r\n'
    assert (line(("a",), text), line(("b",), text)) == (1, 3)


words = st.text("abc", min_size=1, max_size=2)
names = words | st.sampled_from(["a.b", "a b", "=", "#", "[c]", "'", ""])
scalars = (
    st.sampled_from(["1", "true", "2.5e3", "1979-05-27", '"# ["', "'\"\"\"'", "[]", "[ # ]\n\n1,]", "[[1], ['b = 1']]"])
    | st.sampled_from(['"""\n[a]\na = 1\n"""', "'''\n\n# \"\"\"\n'''", '"""\\\n   x"""'])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(st.tuples(names, inner), max_size=2, unique_by=lambda pair: pair[0]).map(
        lambda pairs: "{" + ", ".join(f"{json.dumps(name)} = {value}" for name, value in pairs) + "}"
    ),
    max_leaves=3,
)


def shown(name: str) -> str:
    return name if name.isalpha() else json.dumps(name)


keys = st.lists(names, min_size=1, max_size=3).map(lambda parts: " . ".join(map(shown, parts)))
statements = (
    st.tuples(keys, values).map(" = ".join)
    | keys.map("[{}]".format)
    | keys.map("[[{}]]".format)
    | st.sampled_from(["", "# a = 1", "   # [b]"])
)


@given(st.lists(statements, max_size=12))
def test_a_keys_line_is_that_of_its_first_mention(drawn: list[str]) -> None:
    """It is not there before that line, and is after the statement. Statements that make the text invalid are left out
    of it, so that tomllib takes every prefix of the others."""
    kept: list[str] = []
    for statement in drawn:
        if parsed("\n".join([*kept, statement])) is not None:
            kept.append(statement)
    text = "\n".join(kept)
    starts = {1 + sum(s.count("\n") + 1 for s in kept[:i]): i for i in range(len(kept))}
    for key in paths(parsed(text)):
        found = line(key, text)
        assert found is not None
        i = starts[found]
        assert key in paths(parsed("\n".join(kept[: i + 1])))
        assert key not in paths(parsed("\n".join(kept[:i])))


def parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def paths(table: Any) -> list[tuple[str, ...]]:
    if not isinstance(table, dict):
        return []
    return [key for name, value in table.items() for key in ((name,), *((name, *rest) for rest in paths(value)))]


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
