"""Configurations: TOML in, every mistake named in one line, and the saved form reads back."""

import copy
import inspect
import json
import math
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import packsaddle
import packsaddle as ps
from lab.runs.config import (
    AnyCompressor,
    CertifyConfig,
    Config,
    DataConfig,
    EscapeConfig,
    LocalConfig,
    ModelConfig,
    NoiseConfig,
    configure,
    load,
)
from lab.runs.tasks.sharding import Calendar
from lab.runs.training import LocalTraining
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


# Tables with their counterparts in Python; for other tables it is the class itself, which packsaddle exports.
COUNTERPARTS: dict[type, tuple[Any, ...]] = {
    Config: (ps.Compression, ps.CompressedSGD, ps.LocalUpdates),
    DataConfig: (),
    ModelConfig: (),
    NoiseConfig: (ps.Noise,),
    EscapeConfig: (ps.Escape,),
    CertifyConfig: (ps.Search,),
    LocalConfig: (ps.LocalUpdates, torch.optim.AdamW),
}
# The only keys whose defaults are not those of the arguments of the same name: both defaults.
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "workers": (1, None),  # a number of processes, and a process group
    "momentum": (None, 0.0),  # with Muon inside, its own
    "max_hvps": (100, 200),  # a certificate along a run interrupts it
    "pilot_examples": (0, 2048),  # and has both bounds
}


def tables(cls: type) -> set[type]:
    """The dataclass of a configuration and of each table in it."""
    hints = get_type_hints(cls)
    kinds = {k for f in settable(cls) for k in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(k)}
    return {cls}.union(*map(tables, kinds))


def test_keys_have_the_defaults_of_python() -> None:
    compared, different = 0, {}
    for table in tables(Config):
        known = table in COUNTERPARTS
        assert known or table is getattr(packsaddle, table.__name__), f"{table} needs an entry in COUNTERPARTS"
        for counterpart in COUNTERPARTS.get(table, ()):
            theirs = {name: p.default for name, p in inspect.signature(counterpart).parameters.items()}
            hints = get_type_hints(table)
            for f in settable(table):
                has_table = any(map(is_dataclass, (hints[f.name], *get_args(hints[f.name]))))
                if f.name in theirs and not has_table and theirs[f.name] is not inspect.Parameter.empty:
                    compared += 1
                    if f.default != theirs[f.name]:
                        different[f.name] = (f.default, theirs[f.name])
    assert different == DIFFERENT
    assert compared > 20


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
    "optimizer=adamw": "unknown key optimizer (did you mean local.optimizer?)",
    "compressor={kind='Sign', rato=1}": "unknown key compressor.rato (Sign takes per_tensor)",
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


# What is added to BASE, of 9 lines; overrides; and what the error says after the file's folder.
ORIGINS: list[tuple[str, list[str], str]] = [
    ("[noise]\nstdd = 1\n", [], "config.toml, line 11: unknown key noise.stdd (did you mean noise.std?)"),
    ("[noise]\n# std = 1\nstd = 'one'", [], "line 12: noise.std must be of type float, got 'one'"),
    ("noise = {std = -1}\n", [], "line 10: unknown key model.noise (did you mean noise at the top level?)"),
    ("[escape]\ninterval = 3\n", [], "line 10: missing key escape.radius"),
    ("[escape]\ninterval = 3\n", ["escape.radius=-1"], "--set escape.radius=-1: escape: radius of Escape must be"),
    ("", ["escape.interval=3"], "--set escape.interval=3: missing key escape.radius"),
    ("", ["model.name=resnet18"], "line 9 (with --set model.name=resnet18): model: widths must be set for the auto"),
]


@pytest.mark.parametrize(("extra", "overrides", "message"), ORIGINS, ids=[message for _, _, message in ORIGINS])
def test_errors_say_where_the_key_is(tmp_path: Path, extra: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, extra), overrides)
    said = str(caught.value)
    assert message in said
    assert "\n" not in said
    assert said.startswith("--set" if message.startswith("--set") else f"{tmp_path / 'config.toml'}, line ")


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


def test_a_certificates_options_are_those_of_a_search() -> None:
    """All are keys of [certify]; infinities survive the JSON of a run folder, which has none."""
    keys = {"epsilon": 0.1, "tolerance": 0.1, "hvp": "differences", "pilot_examples": 64, "memory_limit": 0}
    rule = build(CertifyConfig, keys)
    assert (rule.tolerance, rule.sharpness, rule.max_hvps, rule.pilot_examples) == (0.1, math.inf, 100, 64)
    assert CertifyConfig(epsilon=1.0).pilot_examples == 0
    kept = json.dumps(plain(rule), allow_nan=False)
    assert build(CertifyConfig, json.loads(kept)) == rule
    for key, value, message in (
        ("hvp", "exact", "hvp must be one of 'auto', 'double-backward', 'differences', got 'exact'"),
        ("generator", 1, "unknown key generator"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(CertifyConfig, {**keys, key: value})


def test_an_empty_override_drops_a_key() -> None:
    data = {"lr": 0.1, "epochs": 1.0, "batch_size": 8, "data": {"name": "digits"}, "model": {"name": "resnet18"}}
    top_k = {"compressor": {"kind": "TopK", "ratio": 0.1}}
    config = configure({**data, **copy.deepcopy(top_k)}, ["compressor.kind=Sign", "compressor.ratio="])
    assert type(config.compressor).__name__ == "Sign"
    with pytest.raises(ValueError, match=r"--set compressor.ratio= drops it"):
        configure({**data, **top_k}, ["compressor.kind=Sign"], lambda key: "config.toml, line 9")
