"""The docstring of a public name, or a comment on its fields, names its parameters and the errors that it raises."""

import ast
import builtins
import dataclasses
import enum
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_pages import PAGES, found, text_of

DIRECTIVE = re.compile(r"\.\. auto(function|class|module):: ([\w.]+)(\(\))?")


def listed(page: Path) -> Iterator[tuple[str, Any, bool]]:
    """The names on a page of the API, and whether users call them: "()" there hides a signature."""
    for kind, name, hidden in DIRECTIVE.findall(text_of(page)):
        thing = found(name)
        if kind == "module":
            own = {key: value for key, value in vars(thing).items() if getattr(value, "__module__", None) == name}
            yield from ((f"{name}.{key}", value, True) for key, value in own.items() if not key.startswith("_"))
        else:
            yield name, thing, not hidden


def members(name: str, cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself."""
    for key, value in vars(cls).items():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if inspect.isfunction(function) and not key.startswith("_"):
            yield f"{name}.{key}", getattr(cls, key)


def described(thing: Any) -> str:
    """The docstring without its example, with the commented fields of a dataclass."""
    text = re.sub(r"^(>>>|\.\.\.) .*", "", inspect.getdoc(thing) or "", flags=re.M)
    if dataclasses.is_dataclass(thing):
        sources = [inspect.getsource(c) for c in thing.__mro__ if dataclasses.is_dataclass(c)]  # type: ignore[union-attr]
        text += "\n".join(line for source in sources for line in re.findall(r"^    \w+: .*  # \S.*", source, re.M))
    return text


def parameters(thing: Any) -> list[str]:
    if dataclasses.is_dataclass(thing):
        return [f.name for f in dataclasses.fields(thing) if not f.metadata.get("internal")]
    if inspect.isclass(thing):
        own = "__init__" in vars(thing) and not issubclass(thing, (BaseException, enum.Enum))
        return parameters(thing.__init__) if own else []
    function = thing.fget if isinstance(thing, property) else thing
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def bodies(thing: Any) -> list[Callable[..., Any]]:
    """The functions that run when a name is called: those of a class are its constructors."""
    if inspect.isclass(thing):
        ours = [c for c in thing.__mro__ if c.__module__.startswith("packsaddle")]
        return [
            vars(c)[name]
            for c in ours
            for name in ("__init__", "__post_init__")
            if hasattr(vars(c).get(name), "__code__")
        ]
    return [inspect.unwrap(thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing))]


def raised(function: Callable[..., Any], *, deep: bool = True) -> set[str]:
    """The errors that a function raises, by its `raise` statements and those of `check_` functions that it calls."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # a dataclass's own __init__ has no source
        return set()
    names = getattr(function, "__globals__", {})
    errors = set()
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Raise) and node.exc is not None:
            made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            value = names.get(made.id, getattr(builtins, made.id, None)) if isinstance(made, ast.Name) else None
            value = value if inspect.isclass(value) else getattr(value, "__annotations__", {}).get("return")
            errors |= {value.__name__} if inspect.isclass(value) else set()
        elif deep and isinstance(called, ast.Name) and re.match(r"_?check_", called.id) and called.id in names:
            errors |= raised(names[called.id], deep=False)
    return errors


def missing(name: str, thing: Any, *, is_called: bool = True) -> list[str]:
    """The words that a docstring lacks."""
    text = described(thing)
    wanted = [*parameters(thing), *sorted(set().union(*map(raised, bodies(thing))))] if is_called else []
    return [f"{name}: {word}" for word in wanted if not re.search(rf"\b{word}\b", text)] + [f"{name}: any"] * (not text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docstrings_name_parameters_and_errors(page: Path) -> None:
    lacking = []
    for name, thing, is_called in listed(page):
        lacking += missing(name, thing, is_called=is_called)
        for method, function in members(name, thing) if inspect.isclass(thing) and is_called else ():
            lacking += missing(method, function)
    assert lacking == []
