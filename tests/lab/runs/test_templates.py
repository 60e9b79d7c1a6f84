"""python -m lab init: a file with every key, whose comments are the code's own, that loads and trains as it stands."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from commandline import command, refused

from lab.runs.config import (
    CertifyConfig,
    Config,
    DataConfig,
    EscapeConfig,
    LocalConfig,
    ModelConfig,
    NoiseConfig,
)
from lab.runs.templates import TASKS, TaskName, template
from packsaddle.compressors import TopK
from packsaddle.local.options import OuterSGD, Overlap
from packsaddle.options.schema import settable

TABLES = {"data": DataConfig, "model": ModelConfig, "noise": NoiseConfig, "escape": EscapeConfig}
TABLES |= {"certify": CertifyConfig, "local": LocalConfig}
INNER: dict[str, dict[str, Any]] = {"local": {"overlap": Overlap, "outer": OuterSGD}}  # tables in tables
names = pytest.mark.parametrize("name", get_args(TaskName))


def statements(text: str) -> list[tuple[str, str]]:
    """Table and key (none for the table's header) of every statement in a template, also of those in comments."""
    found, table = [], ""
    for line in text.splitlines():
        if match := re.match(r"(?:# )?(?:\[([\w.]+)\]|(\w+) = .*?) +# \S", line):
            table = match[1] or table
            found.append((table, match[2] or ""))
    return found


@names
def test_every_key_stands_with_a_comment(name: TaskName) -> None:
    """Once, in its table; of the compressors, those of the task's."""
    config = TASKS[name].config
    tables = {**TABLES, "compressor": type(config.compressor), "back": TopK}
    expected = [("", f.name) for f in settable(Config) if f.name not in tables]
    for table in (f.name for f in settable(Config) if f.name in tables):
        kind = [(table, "kind")] if table in ("compressor", "back") else []
        inner = INNER.get(table, {})
        expected += [(table, ""), *kind, *((table, f.name) for f in settable(tables[table]) if f.name not in inner)]
        for name, cls in inner.items():
            expected += [(f"{table}.{name}", ""), *((f"{table}.{name}", f.name) for f in settable(cls))]
    assert statements(template(config, "heading")) == expected


def test_a_file_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("lr = 1")
    refused(capsys, f"{file} already exists", "lab", "init", file)
    assert file.read_text() == "lr = 1"


@pytest.mark.slow
def test_digits_trains_as_the_file_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the number of passes, and in one process."""
    monkeypatch.chdir(tmp_path)
    assert command("lab", "init", "--task", "digits") == 0
    assert command("lab", "run", "config.toml", "--serial", "--set", "epochs=0.5", "--out", "trained") == 0
    summary = json.loads((tmp_path / "trained" / "summary.json").read_text())
    assert (summary["workers"], summary["test_loss"] > 0) == (2, True)
