"""python -m lab init: a file with every key, whose comments are the code's own, that loads and trains as it stands."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from commandline import command, refused

from lab.paper.other_studies import language
from lab.runs.config import (
    AnyCompressor,
    CertifyConfig,
    Config,
    DataConfig,
    EscapeConfig,
    LocalConfig,
    ModelConfig,
    NoiseConfig,
)
from lab.runs.config import load as load_config
from lab.runs.templates import TASKS, TaskName, template
from packsaddle.compressors import TopK
from packsaddle.feedback.compression import Compression
from packsaddle.local.options import OuterSGD, Overlap
from packsaddle.options.describe import descriptions
from packsaddle.options.schema import build, settable

ROOT = Path(__file__).parents[3]
TABLES = {"data": DataConfig, "model": ModelConfig, "noise": NoiseConfig, "escape": EscapeConfig}
TABLES |= {"certify": CertifyConfig, "local": LocalConfig}
INNER: dict[str, dict[str, Any]] = {"local": {"overlap": Overlap, "outer": OuterSGD}}  # tables in tables
COMMENTED = [Config, *TABLES.values(), *INNER["local"].values(), *get_args(AnyCompressor)]
names = pytest.mark.parametrize("name", get_args(TaskName))


def load(text: str) -> Config:
    return build(Config, tomllib.loads(text))


def statements(text: str) -> list[tuple[str, str, bool]]:
    """Table, key (none for the table's header) and whether it is commented out, of every statement in a template."""
    found, table = [], ""
    for line in text.splitlines():
        if match := re.match(r"(# )?(?:\[([\w.]+)\]|(\w+) = .*?) +# \S", line):
            table = match[2] or table
            found.append((table, match[3] or "", match[1] is not None))
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
    assert [(table, key) for table, key, _ in statements(template(config, "heading"))] == expected


@names
def test_what_is_commented_out_can_be_used(name: TaskName) -> None:
    """All at once, with an exchange that [back] is for, except k, which replaces the ratio, and blend, which needs a
    delay; and with either [local], the last table, or storm."""
    text = template(TASKS[name].config, "heading")
    used = re.sub(r"^# (\[[\w.]+\]|(?!k =|blend =)\w+ = )", r"\1", text, flags=re.MULTILINE)
    used = used.replace('exchange = "direct"', 'exchange = "two-way"')
    before, _, local = used.partition("\n[local]")
    for either in (before, re.sub(r"^storm = ", "# storm = ", before, flags=re.MULTILINE) + "\n[local]" + local):
        config = load(either)
        assert config.back
        assert config.escape
        assert config.certify
        assert (config.local is None) == (config.storm is not None)
    assert {key for _, key, off in statements(used) if off} == {"k", "blend"}
    if hasattr(TASKS[name].config.compressor, "k"):
        counted = load(text.replace("\nratio = ", "\n# ratio = ", 1).replace("\n# k = ", "\nk = ", 1))
        assert counted.compressor == type(TASKS[name].config.compressor)(k=1000)  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", COMMENTED, ids=lambda c: c.__name__)
def test_every_field_has_a_comment_in_the_code(cls: type[Any]) -> None:
    """But for the tables, which the docstrings of their classes describe."""
    described = descriptions(cls)
    tables: dict[type, Any] = {Config: TABLES, LocalConfig: INNER["local"]}
    assert {f.name for f in settable(cls) if not described[f.name]} == {*tables.get(cls, ())}


def test_a_class_describes_its_fields_before_its_base_classes() -> None:
    """A configuration's `max_skipped` counts rounds too; what it does not describe itself, Compression does."""
    of, inherited = descriptions(Config), descriptions(Compression)
    assert of["max_skipped"] == "maximum number of consecutive steps (with [local]: of rounds) skipped because of " + (
        "non-finite gradients"
    )
    assert inherited["max_skipped"].startswith("maximum number of consecutive steps skipped on all workers")
    assert of["compare_every"] == inherited["compare_every"] != ""


def test_a_file_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("lr = 1")
    refused(capsys, f"{file} already exists", "lab", "init", file)
    assert file.read_text() == "lr = 1"


def test_tasks_are_the_experiments() -> None:
    autoencoder = load_config(ROOT / "experiments" / "mnist-autoencoder" / "config.toml")
    task = TASKS["mnist-autoencoder"].config
    assert replace(autoencoder, compressor=task.compressor) == task
    text, task = language("cpu", "text").settings["topk"], TASKS["char-transformer"].config
    for name in ("data", "model", "lr", "epochs", "batch_size", "workers"):
        assert getattr(task, name) == getattr(text, name), name


@pytest.mark.slow
def test_digits_trains_as_the_file_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the number of passes, and in one process."""
    monkeypatch.chdir(tmp_path)
    assert command("lab", "init", "--task", "digits") == 0
    assert command("lab", "run", "config.toml", "--serial", "--set", "epochs=0.5", "--out", "trained") == 0
    summary = json.loads((tmp_path / "trained" / "summary.json").read_text())
    assert (summary["workers"], summary["test_loss"] > 0) == (2, True)
