"""Random inputs for fuzzing, and the functions that read them.

For every input, a reader must either raise ConfigError or return a valid object.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from lab.runs.certification import read_config
from lab.runs.config import Config, configure, load
from lab.runs.job import Job
from lab.runs.report import tables
from lab.runs.report.curves import curve
from lab.runs.report.page import title
from lab.runs.report.settings import settings as grouped
from lab.runs.report.tables import document
from lab.runs.run_folder import read_runs
from packsaddle.curvature import Verdict
from packsaddle.errors import ConfigError
from packsaddle.options.schema import choices, settable

GOOD = """lr = 0.5
epochs = 1
batch_size = 16
[data]
name = "digits"
limit = 640
[model]
name = "autoencoder"
widths = [16, 8]
[compressor]
kind = "TopK"
ratio = 0.1
[noise]
std = 0.001
[escape]
interval = 8
radius = 2.0
[certify]
epsilon = 0.1
"""

# The integers are small, since a large network would be valid but would take long to make.
INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 16])
FLOATS = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-3, 0.1, 0.5, 1.0, 3.0])
_HOSTILE = ["", "\x1b[31m", "[red]", "</script>", "=1+1", "../x", "a" * 5000]
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(_HOSTILE))
LEAVES = st.one_of(INTEGERS, FLOATS, TEXTS, st.booleans())
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)


def _mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 39).flatmap(lambda n: wrong if n == 0 else right)


def of(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy of values for a type hint: mostly of this type, at its limits, and sometimes of another."""
    kinds = choices(hint)
    if kinds:
        return _mostly(st.sampled_from(kinds).flatmap(lambda c: table(c, c.__name__)), VALUES)
    if type(None) in get_args(hint):
        (inner,) = (a for a in get_args(hint) if a is not type(None))
        return of(inner)
    if get_origin(hint) is Literal:
        return _mostly(st.sampled_from(get_args(hint)), VALUES)
    if get_origin(hint) is tuple:
        return _mostly(st.lists(of(get_args(hint)[0]), max_size=3), VALUES)
    plain = {int: INTEGERS, float: FLOATS, bool: st.booleans(), str: TEXTS}
    return _mostly(plain[hint], VALUES) if hint in plain else _mostly(table(hint), VALUES)


def table(cls: Any, kind: str | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of TOML tables for a dataclass: some of its keys, and sometimes an unknown key."""
    hints = get_type_hints(cls)
    some = st.fixed_dictionaries(
        {} if kind is None else {"kind": st.just(kind)}, optional={f.name: of(hints[f.name]) for f in settable(cls)}
    )
    return _mostly(some, st.tuples(some, st.dictionaries(TEXTS, VALUES, max_size=1)).map(lambda t: t[0] | t[1]))


def toml(value: Any) -> str:
    """Return a value in TOML's notation, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


# A valid configuration with some keys replaced, so that one mistake does not hide the rest.
BASE: dict[str, Any] = {
    "data": {"name": "digits", "limit": 64},
    "model": {"name": "autoencoder", "widths": [8]},
    "lr": 0.1,
    "epochs": 1.0,
    "batch_size": 4,
}
FILES = table(Config).map(lambda t: "".join(f"{json.dumps(k)} = {toml(v)}\n" for k, v in (BASE | t).items()))


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(GOOD.encode())
    for _ in range(draw(st.integers(1, 4))):
        at, end = sorted(draw(st.integers(0, len(content))) for _ in range(2))
        content[at : draw(st.sampled_from([at, min(at + 1, len(content)), end]))] = draw(st.binary(max_size=6))
    return bytes(content)


_KEYS = [*BASE, "label", "seed", "momentum", "compressor", "compressor.ratio", "noise.std", "model.widths", "x"]
NAMES = st.sampled_from(_KEYS)
ASSIGNMENTS = st.one_of(st.text(max_size=30), st.tuples(NAMES | TEXTS, VALUES.map(toml) | TEXTS).map("=".join))

_METRICS = ("step", "epoch", "loss", "grad_norm", "payload", "sent", "received", "seconds", "test_loss", "mu")
_BOUNDS = ("threshold", "loss", "grad_norm")
_VERDICTS = st.sampled_from([*map(str, Verdict)])
_FINITE = FLOATS.filter(math.isfinite)
_NUMBERS = st.one_of(FLOATS, INTEGERS, st.sampled_from([5e-324, 1.8e308]))


def _lines(needed: dict[str, Any], names: tuple[str, ...]) -> st.SearchStrategy[Any]:
    fields = {name: _NUMBERS | st.none() for name in names if name not in needed}
    return st.lists(_mostly(st.fixed_dictionaries(needed, optional=fields), LEAVES), max_size=3)


_METRIC = {"step": st.integers(0, 9), "epoch": _FINITE, "loss": FLOATS, "seconds": _FINITE}
_ENDS = dict.fromkeys(("lambda_min_lower", "lambda_min_upper"), FLOATS)
_CERTIFICATE = {"verdict": _VERDICTS, "step": st.integers(0, 9), "epoch": _FINITE, **_ENDS}
_CONFIG = {"label": TEXTS, "seed": st.integers(0, 9), "plateau": _FINITE}
RUNS = st.fixed_dictionaries(
    {
        "config.json": _mostly(st.fixed_dictionaries({}, optional=_CONFIG), LEAVES),
        "environment.json": _mostly(st.just({"packsaddle": "0.0"}), LEAVES),
        "metrics.jsonl": _lines(_METRIC, _METRICS),
        "summary.json": _mostly(
            st.dictionaries(st.sampled_from(["final_loss", "test_loss", "compression", "steps"]), _NUMBERS), LEAVES
        ),
        "certificates.jsonl": _lines(_CERTIFICATE, _BOUNDS),
    }
)


def _constructed(config: Config) -> None:
    Job((config,), (Path("unused"),)).check(config.workers, "serial")


def read_file(content: bytes | str, folder: Path) -> None:
    """Read a configuration file, and construct its run."""
    path = folder / "config.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    _constructed(load(path))


def read_assignment(text: str, folder: Path) -> None:
    """Apply an assignment, as of --set, to a valid configuration, and construct its run."""
    _constructed(configure(json.loads(json.dumps(BASE)), [text]))


def read_run(files: dict[str, Any], folder: Path) -> None:
    """Read a run folder as reports and certificates do. Lines of its files may be JSON values that are no objects."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for name, content in files.items():
            lines = content if name.endswith("l") else [content]
            (Path(made) / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        with contextlib.suppress(ConfigError):  # ignored, since a report may be valid without a valid configuration
            read_config(Path(made))
        runs = read_runs([Path(made)])
        found = grouped(runs)
        for shown in (tables.run_table(runs), tables.setting_table(found), tables.certificate_table(runs)):
            assert all(isinstance(cell, str) for row in shown.rows for cell in row)
        for setting in found:
            curve(setting)
        assert isinstance(title(runs), str)
        json.dumps(document(runs), allow_nan=False)


TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], None]]] = {
    "configurations": (FILES, read_file),
    "mutated files": (_mutated(), read_file),
    "assignments": (ASSIGNMENTS, read_assignment),
    "run folders": (RUNS, read_run),
}


def outcome(read: Callable[[Any, Path], None], value: Any, folder: Path) -> str:
    """Return "valid" if `read` accepts a value, and "refused" if it raises ConfigError. Other exceptions are raised."""
    try:
        read(value, folder)
    except ConfigError:
        return "refused"
    return "valid"
