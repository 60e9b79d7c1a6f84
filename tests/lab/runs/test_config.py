"""Configurations: TOML in, every mistake named in one line, and the saved form reads back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import packsaddle as ps
from lab.runs.config import (
    AnyCompressor,
    Config,
    EscapeConfig,
    load,
)
from lab.runs.training import LocalTraining
from lab.tasks.sharding import Calendar
from packsaddle.compressors import compressors, describe, identify
from packsaddle.compressors.registry import CLASSES
from packsaddle.errors import ConfigError
from packsaddle.options.schema import build, plain, settable

BASE = """
lr = 0.1
epochs = 2
batch_size = 8
[data]
name = "digits"
[model]
name = "autoencoder"
widths = [32, 8]
"""


def write(folder: Path, extra: str = "") -> Path:
    path = folder / "config.toml"
    path.write_text(BASE + extra)
    return path


def test_tables_overrides_and_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, '[compressor]\nkind = "RandomK"\nratio = 0.01\n[escape]\ninterval = 5\nradius = 1\n')
    config = load(path, ["compressor.ratio=0.5", "noise.std=0.25", "label=two words", "seed=7", "data.shard='class'"])
    assert config.compressor == ps.RandomK(0.5)
    assert config.escape == EscapeConfig(5, 1.0)
    assert (config.noise.std, config.label, config.seed, config.data.shard) == (0.25, "two words", 7, "class")
    assert (config.epochs, config.model.widths) == (2.0, (32, 8))
    assert load(write(tmp_path)).compressor == ps.Identity()


ADAMW = '[local]\nevery = 8\noptimizer = "adamw"\n'


def test_local_updates_of_a_file_have_the_defaults_of_python(tmp_path: Path) -> None:
    """All options of a file that sets none, as LocalUpdates takes them; only the contraction is always measured."""
    config, model = load(write(tmp_path, ADAMW)), torch.nn.Linear(64, 64)
    found = LocalTraining(config, model, Calendar.of([(0, 1)], 8, 8, 1.0), None).front.options
    ours = ps.LocalUpdates(torch.optim.AdamW(torch.nn.Linear(64, 64).parameters())).options
    assert replace(found, compression=replace(found.compression, monitor_every=0)) == ours
    assert config.compressor == ps.Sign(per_tensor=True)
    assert load(write(tmp_path), ["local.optimizer=sgd", "compressor.kind=Sign"]).compressor == ps.Sign()


def test_a_compressor_that_is_set_stays_with_local_updates(tmp_path: Path) -> None:
    """Also Identity, which run folders without a compressor have in their config.json; without [local] it is the
    default."""
    config = load(write(tmp_path, ADAMW), ["compressor.kind=Identity"])
    assert config.compressor == build(Config, plain(config)).compressor == ps.Identity()
    assert load(write(tmp_path)).compression() == ps.Compression(ps.Identity(), monitor_every=100)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_a_kind_of_compressor_has_the_defaults_of_its_class(cls: type[Any], tmp_path: Path) -> None:
    assert cls in get_args(AnyCompressor)
    given = {f.name: 0.5 for f in settable(cls) if f.metadata.get("share")}
    found = load(
        write(tmp_path), [f"compressor.kind={cls.__name__}", *(f"compressor.{k}={v}" for k, v in given.items())]
    )
    assert found.compressor == cls(**given)


MISTAKES = {
    "lrr=0.1": "unknown key lrr (did you mean lr?)",
    "compressor={kind='TopK', rato=1}": "unknown key compressor.rato (did you mean ratio?)",
    "lr='fast'": "lr must be of type float, got 'fast'",
    "momentum=1": "--set momentum=1: momentum must be in [0, 1), got 1.0",
    "decay=0.5": "--set decay=0.5: decay must be 1 in CompressedSGD, got 0.5, which is for hooks and local updates",
    "exchange=senders": 'exchange "senders" is for local updates, not for gradients',
    "compressor.ratio=0.1": "compressor must be a table with a kind, one of Identity, RandomK, TopK,",
    "compressor={kind='randomk'}": "LowRank, got 'randomk' (did you mean RandomK?)",
    "local.every=4": "missing key local.optimizer, one of 'sgd', 'adamw', 'muon'",
    "compressor={kind='TopK', ratio=1}": "compressor: ratio of TopK must be in (0, 1] and not an integer, got 1; for a",
    "model.name=resnet18": "model: widths must be set for the autoencoder",
    "lr": "--set needs key=value, got 'lr'",
}


@pytest.mark.parametrize(("override", "message"), MISTAKES.items())
def test_mistakes(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# What is added to BASE, overrides, and the error after the name of the file.
ORIGINS: list[tuple[str, list[str], str]] = [
    ("[noise]\nstdd = 1\n", [], ": unknown key noise.stdd (did you mean std?)"),
    ("[noise]\n# std = 1\nstd = 'one'", [], ": noise.std must be of type float, got 'one'"),
    ("[escape]\ninterval = 3\n", [], ": missing key escape.radius"),
    ("", ["model.name=resnet18", "seed=3"], " with --set model.name=resnet18 seed=3: model: widths must be set"),
    ("widths = [8]\n", [], " is not valid TOML: Cannot overwrite a value (at line 10, column 13)"),
]


@pytest.mark.parametrize(("extra", "overrides", "message"), ORIGINS, ids=[message for _, _, message in ORIGINS])
def test_errors_name_the_file_and_the_key(tmp_path: Path, extra: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, extra), overrides)
    assert str(caught.value).startswith(f"{tmp_path / 'config.toml'}{message}")


@pytest.mark.parametrize(
    "compressor",
    [
        *compressors(0.1),
        ps.TopK(k=3),
        ps.SharedTopK(0.1, block_size=64),
        ps.LowRank(2),
    ],
    ids=describe,
)
def test_every_compressor_reads_back(tmp_path: Path, compressor: Any) -> None:
    """Also from JSON, as a run folder keeps it."""
    config = replace(load(write(tmp_path), ["escape.interval=4", "escape.radius=2.5"]), compressor=compressor)
    assert build(Config, json.loads(json.dumps(plain(config)))) == config
    assert identify(compressor) == plain(config)["compressor"]  # what a hook's state says of it
