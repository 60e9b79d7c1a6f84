"""Tables made from the code have every key, option, compressor and number, each with a meaning."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from lab import __main__ as lab
from lab.bench import pieces
from lab.paper import __main__ as paper
from lab.race import __main__ as race
from lab.runs.config import Config
from packsaddle import cli
from packsaddle.cli.flags import flags_of
from packsaddle.cli.parsing import Group
from packsaddle.compressors.registry import CLASSES
from packsaddle.curvature.certificate import Certificate
from packsaddle.options.schema import choices, settable

pytest.importorskip("sphinx")
from lab.docs.generated import commands, compressors, configuration, metrics
from lab.docs.generated.quantities import CERTIFICATE, FILES, METRICS, PURPOSES, SUMMARY, Quantity


def rows(markdown: str) -> list[list[str]]:
    """The cells of the tables' lines, headings excluded."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines if not line.startswith("| ---")]


def test_every_key_of_the_configuration_is_explained() -> None:
    sections = dict(re.findall(r"### (.*)\n\n((?:(?!### )[\s\S])*)", configuration.markdown()))
    hints = get_type_hints(Config)
    for f in settable(Config):
        classes_of = choices(hints[f.name])
        inner = [h for h in (hints[f.name], *getattr(hints[f.name], "__args__", ())) if dataclasses.is_dataclass(h)]
        if not inner:
            assert f"| `{f.name}` |" in sections["Top level"]
            continue
        section = sections[f"`[{f.name}]`"] if f.name != "back" else sections["`[compressor]`"]
        for cls in classes_of or inner:
            of = get_type_hints(cls)
            for key in settable(cls):
                kinds = (of[key.name], *getattr(of[key.name], "__args__", ()))
                tables = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
                for table in tables:
                    there = sections[f"`[{f.name}.{key.name}]`"]
                    assert all(f"| `{inside.name}` |" in there for inside in settable(table))
                assert tables or f"| `{key.name}` |" in section, f"{f.name}.{key.name}"
            assert not classes_of or f"`{cls.__name__}`" in section
    assert not [row for row in rows(configuration.markdown()) if not row[-1]]


def every(group: Group, name: str) -> list[tuple[str, Any]]:
    """The commands of a group and of the groups in it, with their full names."""
    found: list[tuple[str, Any]] = []
    for word, command in group.commands.items():
        full = f"{name} {word}"
        found += every(command, full) if isinstance(command, Group) else [(full, command)]
    return found


def test_every_option_of_every_command_is_explained() -> None:
    text = commands.markdown()
    sections = {part.partition("\n")[0]: part for part in re.split(r"^#{3,4} ", text, flags=re.MULTILINE)}
    found = every(cli.COMMANDS, "packsaddle")
    found += [entry for program in (lab, pieces, race) for entry in every(program.COMMANDS, program.PROGRAM)]
    found += [(paper.PROGRAM, paper.reproduce)]
    assert len(found) > 15
    for name, command in found:
        for argument in flags_of(command):
            shown = argument.replace("_", "-")
            assert re.search(rf"^\| `(--(no-)?{shown}|{argument.upper()})` \|", sections[name], re.MULTILINE), name
    assert not [row for row in rows(text) if not row[-1]]
    assert not re.search(r"(?<![`\w-])--[a-z]", re.sub(r"```[\s\S]*?```", "", text)), "an option outside of code"


def test_every_compressor_is_in_the_table() -> None:
    shown = [row[0].partition("(")[0].strip("`") for row in rows(compressors.markdown())[1:]]
    assert shown == list(CLASSES)


def test_every_number_is_in_the_tables() -> None:
    text = metrics.markdown()
    for content in FILES.values():
        assert all(f"`{key}`" in text and quantity.meaning for quantity in content for key in quantity.keys)


def keys(content: tuple[Quantity, ...]) -> tuple[set[str], set[str]]:
    """All keys, and those that every run has."""
    needed = {key for quantity in content if not quantity.optional for key in quantity.keys}
    return {key for quantity in content for key in quantity.keys}, needed


def test_a_certificate_has_the_documented_numbers() -> None:
    properties = {"headline", "smallest_epsilon", "loss_name", "saddle_below_rho", "lr", "escape_steps"}
    fields = {f.name for f in dataclasses.fields(Certificate)} - {"escape_direction", "sharpest_direction"}
    assert keys(CERTIFICATE)[0] == fields | properties


RUN = {
    "data.name": "digits",
    "data.limit": 64,
    "model.name": "autoencoder",
    "model.widths": [8],
    "lr": 0.1,
    "epochs": 2.0,
    "batch_size": 8,
    "log_every": 4,
    "test_every": 1.0,
    "dense_below": 16,
    "compressor.kind": "TopK",
    "compressor.ratio": 0.1,
    "certify.epsilon": 0.1,
    "certify.every": 1.0,
    "certify.max_hvps": 3,
}


@pytest.mark.parametrize("more", [{}, {"local.every": 2, "local.optimizer": "adamw"}], ids=["every step", "local"])
def test_a_run_records_the_documented_numbers(more: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "empty.toml").write_text("")
    words = [f"{key}={json.dumps(value)}" for key, value in (RUN | more).items()]
    run = lab.COMMANDS.commands["run"]
    run(tmp_path / "empty.toml", set=tuple(words), workers=2, serial=True, out=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    points = [json.loads(line) for line in (tmp_path / "run" / "certificates.jsonl").read_text().splitlines()]
    for found, content in ((summary, SUMMARY), *((line, METRICS) for line in lines)):
        documented, needed = keys(content)
        assert needed <= found.keys() <= documented
    assert any("test_loss" in line for line in lines)
    assert all(point.keys() - {"step", "epoch"} == keys(CERTIFICATE)[0] for point in points)
    assert points
    assert summary["bytes_by_purpose"].keys() <= keys(PURPOSES)[0]
