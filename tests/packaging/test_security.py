"""Hostile strings stay strings, files stay in their folder, and nothing is unpickled."""

import ast
import importlib.util
import json
import re
import tomllib
from html.parser import HTMLParser
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import packsaddle
from lab.cli.console import print_runs
from lab.runs.progress import live
from lab.runs.report import write_report
from lab.runs.report.curves import read_curves
from lab.runs.run_folder import read_runs

ROOT = Path(__file__).parents[2]
FOLDERS = (Path(packsaddle.__file__).parent, ROOT / "lab" / "runs", ROOT / "lab" / "cli")
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
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


class Tags(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[str, ...]]] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.data += data


def make_run(folder: Path, text: str) -> Path:
    """A run whose every string is `text`, in known fields and in unknown ones."""
    line = {"step": 10, "epoch": 1.0, "loss": 1.0, "sent": 10, "payload": 10, "seconds": 1.0}
    certificate = {"step": 10, "epoch": 1.0, "verdict": "saddle", "loss": 0.5, "lambda_min_lower": -2.0}
    names = {"data": {"name": text, text: text}, "model": {"name": text}, "compressor": {"kind": text}}
    content: dict[str, Any] = {
        "config.json": {"label": text, **names},
        "environment.json": {"packsaddle": text, "command": text, "started": text, "torch": text, text: text},
        "metrics.jsonl": {**line, text: text},
        "summary.json": {"label": text, "final_loss": 1.0, "exchange": text, text: text},
        "certificates.jsonl": {**certificate, "lambda_min_upper": -1.0, "threshold": -0.1, "on": text},
    }
    folder.mkdir(parents=True)
    for name, value in content.items():
        (folder / name).write_text(json.dumps(value) + "\n")
    return folder


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's font lacks some of the characters
def test_reports_of_hostile_strings(tmp_path: Path) -> None:
    """A browser sees the same tags and attributes as for a harmless label."""
    runs = read_runs([make_run(tmp_path / f"in/{i:02d}", text) for i, text in enumerate(HOSTILE)])
    calm = read_runs([make_run(tmp_path / f"calm/{i:02d}", f"label {i}") for i in range(len(HOSTILE))])
    page = Tags(write_report(runs, tmp_path / "out" / "report").read_text(encoding="utf-8"))
    harmless = Tags(write_report(calm, tmp_path / "out" / "calm").read_text(encoding="utf-8"))
    assert page.seen == harmless.seen
    assert HOSTILE[0] in page.data  # shown as it is
    assert HOSTILE[4] in page.data
    picture = Tags((tmp_path / "out" / "report" / "figure.svg").read_text(encoding="utf-8"))
    assert {tag for tag, _ in picture.seen}.isdisjoint({"script", "img", "a", "foreignobject"})
    assert [c.setting for c in read_curves(tmp_path / "out" / "report" / "curves.csv")] == [run.label for run in runs]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm", "in", "out"]  # nothing is written elsewhere


def test_terminals_show_and_do_not_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, text in enumerate(HOSTILE):
        run = make_run(tmp_path / str(i), text)
        print_runs(read_runs([run]))
        with live(text, 1, quiet=False) as report:
            report(1, "done")
        shown = capsys.readouterr().out
        assert not [c for c in shown if not c.isprintable() and c != "\n"]
        if text.startswith("["):
            assert text in shown.splitlines()[-1]  # brackets are no markup
            assert text in shown.partition("done")[0]


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
