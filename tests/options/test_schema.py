"""Lines of keys in TOML: none is wrong, whatever the text around it looks like, with tomllib as the judge."""

import json
import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from packsaddle.options.schema import Key, key_lines

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
[many.sub]
r = 3
[[one]]
p = 1
'''


def test_what_looks_like_a_key_but_is_none() -> None:
    lines = key_lines(TRAPS)
    assert {key: lines[key] for key in (("a",), ("x", "y"), ("x", "z.w"), ("d",))} == {
        ("a",): 2,
        ("x", "y"): 6,
        ("x", "z.w"): 7,
        ("d",): 11,
    }
    assert (lines["t", "u"], lines["t", "u", "k", "n", "o"], lines[("t",)], lines["t", "k"]) == (13, 14, 16, 17)
    assert (lines[("many",)], lines["one", "p"]) == (18, 25)
    assert ("b",) not in lines
    assert ("c",) not in lines
    assert not {key for key in lines if key[:1] == ("many",)} - {("many",)}


def test_lines_may_end_in_the_way_of_windows() -> None:
    assert key_lines('a = """\r\n"""\r\nb = 1\r\n') == {("a",): 1, ("b",): 3}


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
def test_a_key_is_not_there_before_its_line_and_is_after_its_statement(drawn: list[str]) -> None:
    """Statements that make the text invalid are left out of it, so that tomllib takes every prefix of the others."""
    kept: list[str] = []
    for statement in drawn:
        if parsed("\n".join([*kept, statement])) is not None:
            kept.append(statement)
    text = "\n".join(kept)
    starts = {1 + sum(s.count("\n") + 1 for s in kept[:i]): i for i in range(len(kept))}
    for key, line in key_lines(text).items():
        i = starts[line]
        assert find(key, parsed("\n".join(kept[: i + 1])))
        header = kept[i].startswith(f"[{' . '.join(map(shown, key))}]")  # of a table that was named before
        assert header or not find(key, parsed("\n".join(kept[:i])))


def parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def find(key: Key, table: Any) -> bool:
    """Whether a key is given; of the tables of an array, in any of them."""
    if not key or isinstance(table, list):
        return not key or any(find(key, item) for item in table)
    return isinstance(table, dict) and key[0] in table and find(key[1:], table[key[0]])


@given(st.lists(statements, min_size=1, max_size=8))
def test_every_key_outside_repeated_tables_has_a_line(drawn: list[str]) -> None:
    """So that none is missed: the keys of a text without arrays of tables are the keys that have lines."""
    kept: list[str] = []
    for statement in drawn:
        if not statement.startswith("[[") and parsed("\n".join([*kept, statement])) is not None:
            kept.append(statement)
    assert {*key_lines("\n".join(kept))} == {*paths(parsed("\n".join(kept)))}


def paths(table: Any) -> list[Key]:
    if not isinstance(table, dict):
        return []
    return [key for name, value in table.items() for key in ((name,), *((name, *rest) for rest in paths(value)))]
