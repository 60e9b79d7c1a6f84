"""Hostile strings stay strings, and nothing is unpickled."""

import ast
import importlib.util
import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from rich.table import Table

import packsaddle
from packsaddle.cli.console import plain_text, print_table

ROOT = Path(__file__).parents[2]
SOURCES = sorted(Path(packsaddle.__file__).parent.rglob("*.py"))
HOSTILE = [
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "' onmouseover='alert(1)",
    "<svg/onload=alert(1)>]]>--><!--",
    "{{ 7 * 7 }}{% raw %}",
    "=cmd|'/c calc'!A1",
    "@SUM(1)",
    "[red]x[/]",
    "[/]",
    "\x1b]0;title\x07\x1b[2J\x9b31m\x00\x08",
    "\u202egnp.exe\u2028",
    "../../../outside",
    "\udcff",
]


def test_terminals_show_and_do_not_obey(capsys: pytest.CaptureFixture[str]) -> None:
    for text in HOSTILE:
        table = Table("name")
        table.add_row(plain_text(text))
        print_table(table)
        shown = capsys.readouterr().out
        assert not [c for c in shown if not c.isprintable() and c != "\n"]
        if text.startswith("["):
            assert text in shown  # brackets are no markup


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_or_run_by_a_shell() -> None:
    loads = 0
    for path in SOURCES:
        imported = {
            name.name.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert imported.isdisjoint({"pickle", "dill", "marshal", "shelve", "tarfile", "zipfile", "yaml"}), path
        for call in calls(path):
            name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name not in ("eval", "exec", "os.system", "np.load", "numpy.load"), path
            assert not re.search(r"(send|recv|broadcast|gather|scatter|all_gather)_object", name), path
            assert keywords.get("shell", "False") == "False", path
            if name == "torch.load":
                loads += 1
                assert keywords["weights_only"] == "True", path
    assert loads >= 2


def test_dependencies_are_ranges_and_used() -> None:
    """Every dependency has a lower bound, none is pinned or from elsewhere, and the core's are imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = packages_distributions()
    text = "\n".join(path.read_text() for path in SOURCES)
    for requirement in project["dependencies"]:
        name, bound = re.fullmatch(r"([a-z\d-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        assert bound
        modules = [module for module, owners in names.items() if name in owners and not module.startswith("_")]
        assert any(re.search(rf"^\s*(import|from) {module}\b", text, re.MULTILINE) for module in modules), name
    for name, extra in project["optional-dependencies"].items():
        end = r"(,<[\d.]+)?" if name == "dev" else ""  # what tests need may have an upper bound, with its reason
        one = rf"packsaddle\[[a-z,]+\]|[a-z\d-]+>=[\d.a-z]+{end}"
        assert all(re.fullmatch(one, requirement) for requirement in extra), name
    assert importlib.util.find_spec("packsaddle") is not None
