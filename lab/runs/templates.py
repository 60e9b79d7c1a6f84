"""Configurations to start from: the presets of `python -m lab init`, and their TOML text."""

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lab.runs.config import (
    CertifyConfig,
    Config,
    EscapeConfig,
    LocalConfig,
    NoiseConfig,
)
from lab.tasks.options import DataConfig, ModelConfig
from packsaddle.compressors import RandomK, Sign, TopK
from packsaddle.local.options import OuterSGD, Overlap
from packsaddle.options.describe import descriptions
from packsaddle.options.schema import choices, settable

# Example values of keys and tables that are None by default. They are written as comments.
_EXAMPLES: dict[str, Any] = {
    "exchange": "two-way",
    "momentum": 0.0,
    "test_every": 1.0,
    "plateau": 0.1,
    "data.limit": 1000,
    "noise.lower_from": 10.0,
    "noise.lower_until": 14.0,
    "compressor.k": 1000,
    "compressor.block_size": 16,
    "compressor.chunk": 4096,
    "compressor.values": "bfloat16",
    "back": TopK(0.05),
    "back.k": 1000,
    "back.values": "bfloat16",
    "back.chunk": 4096,
    "escape": EscapeConfig(interval=5000, radius=5.0),
    "certify": CertifyConfig(epsilon=2e-3),
    "certify.hessian_lipschitz": 1e-3,
    "certify.every": 1.0,
    "certify.last_epsilon": 1e-2,
    "local": LocalConfig("adamw"),
    "local.clip": 1.0,
    "local.mean_momentum": 0.0,
    "local.overlap": Overlap(),
    "local.outer": OuterSGD(),
    "local.outer.nesterov": True,
}
_COLUMN, _WIDTH = 28, 120


def template(config: Config, heading: str) -> str:
    """Return `config` as TOML text with every key. Keys with default values are commented out.

    Keys that are None are commented out too, with example values. `heading` is written as a comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    return "\n".join([*lines, "", *_content(config, "")]) + "\n"


def _content(value: Any, where: str, off: str = "") -> Iterator[str]:
    """Yield the lines of a TOML table: first its keys, then the tables inside it, as TOML requires.

    `where` is the prefix of the names of these tables: "" or "TABLE.".
    """
    hints, fields = get_type_hints(type(value)), settable(type(value))
    tables = [f for f in fields if any(map(dataclasses.is_dataclass, (hints[f.name], *get_args(hints[f.name]))))]
    for f in fields:
        if f not in tables:
            yield from _key(value, f, hints[f.name], where + f.name, off)
    for f in tables:
        inner = None if off else getattr(value, f.name)
        yield ""
        yield from _table(inner if inner != f.default else None, where + f.name, hints[f.name])


def _table(value: Any, name: str, hint: Any) -> Iterator[str]:
    off = "# " if value is None else ""
    value = _EXAMPLES[name] if value is None else value
    cls, kinds = type(value), [c.__name__ for c in choices(hint)]
    about = descriptions(Config).get(name) or (inspect.getdoc(cls) or "").partition("\n")[0].removesuffix(".")
    yield from _line(f"{off}[{name}]", about)
    if kinds:
        yield from _line(f"{off}kind = {json.dumps(cls.__name__)}", f"one of {', '.join(kinds)}")
    yield from _content(value, f"{name}.", off)


def _key(owner: Any, f: dataclasses.Field[Any], hint: Any, name: str, off: str = "") -> Iterator[str]:
    value, required = getattr(owner, f.name), f.default is dataclasses.MISSING
    cls: type = type(owner)
    described = descriptions(cls).get(f.name, "").removesuffix(".").replace("None: ", "left out: ")  # TOML has no None
    about = [described] + ["needed"] * (required and bool(off))
    if options := [c for h in (hint, *get_args(hint)) if get_origin(h) is Literal for c in get_args(h)]:
        about.insert(0, f"one of {', '.join(options)}")
    if value is not None and value != f.default and f.default not in (None, (), dataclasses.MISSING):
        about.append(f"by default {_toml(f.default)}")
    off = "# " if value is None or value == f.default else off
    shown = _EXAMPLES[name] if value is None else value
    yield from _line(f"{off}{f.name} = {_toml(shown)}", "; ".join(filter(None, about)))


def _line(statement: str, about: str) -> Iterator[str]:
    at = max(_COLUMN, len(statement) + 1)
    first, *others = textwrap.wrap(about, _WIDTH - at - 2, break_on_hyphens=False) or [""]
    yield f"{statement:<{at}}# {first}" if first else statement
    yield from (f"{'':<{_COLUMN}}# {other}" for other in others)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


TaskName = Literal["char-transformer", "char-transformer-local", "digits", "mnist-autoencoder", "resnet18"]


@dataclass(frozen=True)
class Task:
    """A preset of `python -m lab init`: a configuration with its description."""

    about: str
    config: Config
    flags: str = ""  # further flags that `python -m lab run` needs, with a leading space


_CHARACTERS = Config(
    data=DataConfig("text"),
    model=ModelConfig("char-transformer"),
    lr=0.3,
    epochs=30.0,
    batch_size=16,
    compressor=TopK(0.01),
    workers=2,
    plateau=3.25,  # the loss, in nats, of predicting each character by its frequency
)
TASKS: dict[TaskName, Task] = {
    "char-transformer": Task(
        "A small language model over the characters of Python's own reference: no download, some minutes on two cores.",
        _CHARACTERS,
    ),
    "char-transformer-local": Task(
        "The small language model by local updates, for slow links: Muon and AdamW inside, an exchange every 8 steps.",
        replace(
            _CHARACTERS,
            lr=0.01,
            compressor=Sign(per_tensor=True),
            weight_decay=0.1,
            local=LocalConfig("muon", every=8, betas=(0.8, 0.99), warm_up=0.5, schedule="cosine", clip=1.0),
        ),
    ),
    "digits": Task(
        "A deep autoencoder on scikit-learn's digits, from a start where SGD without noise stalls at a saddle.",
        Config(
            data=DataConfig("digits"),
            model=ModelConfig("autoencoder", (256, 128, 64, 32, 10)),
            lr=1.0,
            epochs=60.0,
            batch_size=16,
            workers=2,
            compressor=RandomK(0.01),
            noise=NoiseConfig(0.003, lower_from=36.0, lower_until=51.0),
            log_every=23,
            plateau=0.0735,  # the loss of the best constant output
        ),
    ),
    "mnist-autoencoder": Task(
        "The paper's deep MNIST autoencoder (its footnote 7 and Figure 2).",
        Config(
            data=DataConfig("mnist"),
            model=ModelConfig("mnist-autoencoder"),
            lr=0.1,
            epochs=16.0,
            batch_size=64,
            compressor=RandomK(0.001),
            noise=NoiseConfig(0.01, lower_from=10.0, lower_until=14.0),
            plateau=0.095,  # the loss if every output pixel has the same, best gray value
        ),
        " --data-dir DIR --download",
    ),
    "resnet18": Task(
        "ResNet-18 on CIFAR-10: not tuned, and for a GPU: on two cores an epoch takes half an hour or more.",
        Config(
            data=DataConfig("cifar10"),
            model=ModelConfig("resnet18"),
            lr=0.1,
            epochs=30.0,
            batch_size=64,
            compressor=TopK(0.01),
            weight_decay=5e-4,
            workers=2,
            test_every=1.0,
        ),
        " --data-dir DIR --download",
    ),
}
