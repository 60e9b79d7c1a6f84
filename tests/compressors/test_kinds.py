"""A new compressor is one file, and one line of `compressors.kinds`: all names, tables and tests then have it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import packsaddle

ROOT = Path(__file__).parents[2]
TOY = '''
from dataclasses import dataclass, field
from typing import ClassVar

from packsaddle.compressors.base import Summary
from packsaddle.compressors.sparse import Identity


@dataclass(frozen=True)
class Toy(Identity):
    """A compressor with a ratio of no effect."""

    summary: ClassVar[Summary] = Summary("one", "all values", ({}, {"extra": 2}))
    ratio: float = field(default=0.5, metadata={"share": True})  # no effect
    extra: int = 1  # no effect either
'''
LINE = "from packsaddle.compressors.toy import Toy as Toy\n"
PROGRAM = """
import packsaddle
from packsaddle.cli.compressor_names import WITH_RATIO, read_compressor
from packsaddle.cli.plan_theory import theory
from packsaddle.compressors import compressors, describe, identify, parse_compressor
from packsaddle.compressors.toy import Toy
from packsaddle.errors import ConfigError
from packsaddle.options.describe import descriptions
from lab.runs.config import configure

assert packsaddle.Toy is Toy and {"Toy"} < {*packsaddle.__all__} & {*packsaddle.compressors.__all__}
assert compressors(0.1)[-2:] == [Toy(0.1), Toy(0.1, extra=2)]

# Text, the command line and its help.
assert parse_compressor("Toy(1%, extra=3)") == Toy(0.01, extra=3)
assert describe(Toy(0.1)) == "Toy(ratio=0.1)" and identify(Toy(0.1)) == {"kind": "Toy", "ratio": 0.1, "extra": 1}
assert read_compressor("TOY", None) == "toy" and WITH_RATIO["toy"](0.1) == Toy(0.1)
assert "LowRank, Toy, in any case" in descriptions(theory)["compressor"]

# Configurations.
run = {"data": {"name": "digits"}, "model": {"name": "resnet18"}, "lr": 0.1, "epochs": 1.0, "batch_size": 8}
toy = {"kind": "Toy", "ratio": 0.1}
config = configure(run | {"compressor": toy, "back": toy, "exchange": "two-way"}, [])
assert config.compressor == config.back == Toy(0.1)
try:
    configure(run, ["compressor={kind='Tay'}"])
    raise AssertionError
except ConfigError as error:
    assert str(error).endswith("LowRank, Toy, got 'Tay' (did you mean Toy?)"), error

# The tests' settings, and the pages.
from families import COMPRESSORS
assert Toy(0.3) in COMPRESSORS
try:
    from lab.docs.generated import compressors as pages, configuration
except ModuleNotFoundError:
    raise SystemExit
assert "| `Toy(ratio=0.5, extra=1)` | one | all values | yes | all-reduce | 6,000.0 |" in pages.markdown()
assert ".. autoclass:: packsaddle.Toy" in pages.classes()
assert "| `Toy` | no effect either |" in configuration.markdown()
"""


@pytest.mark.nightly
def test_a_compressor_of_one_file_and_one_line_is_in_all_lists(tmp_path: Path) -> None:
    source = tmp_path / "packsaddle"
    shutil.copytree(Path(packsaddle.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "src" / "packsaddle_command.py", tmp_path)
    (source / "compressors" / "toy.py").write_text(TOY)
    with (source / "compressors" / "kinds.py").open("a") as file:
        file.write(LINE)
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "tests" / "support", ROOT)))
    env = {**os.environ, "PYTHONPATH": path, "PACKSADDLE_KERNELS": "torch"}  # compiles nothing
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
