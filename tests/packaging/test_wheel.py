"""The wheel: it holds the package and nothing else, and what it holds works without any extra."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("wheel")  # built once
NEEDING_PLOT = ("certify-script train:problem checkpoint.pt --out new",)
EXTRAS = ("matplotlib", "jinja2", "sklearn", "torchvision", "PIL", "numba")

# The README's library example, then the command line; as where no extra is installed.
SCRIPT = f"""
import re, sys
from pathlib import Path
for module in {EXTRAS}:
    sys.modules[module] = None  # so that importing it fails
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {EXTRAS} else found(name, *rest)

import packsaddle
from packsaddle import cli
print(packsaddle.__file__)
names = {{}}
for block in re.findall(r"```python\\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL):
    exec(block, names)
for arguments in ("--help", "plan link --help", "doctor --no-try", "compressors --d 1000", *{NEEDING_PLOT}):
    sys.argv = ["packsaddle", *arguments.split()]
    try:
        cli.main()
    except SystemExit as stop:
        print(f"{{arguments}}: code {{stop.code or 0}}")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("packsaddle-*-py3-none-any.whl")
    return path


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    files = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert inside == {name for name in files if name.startswith("packsaddle/")} | {"packsaddle_command.py"}
    assert "packsaddle/py.typed" in inside


def test_its_metadata_has_the_command_the_licence_and_the_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    files = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "packsaddle = packsaddle_command:main" in archive.read(files["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in files
    metadata = archive.read(files["METADATA"]).decode()
    for extra in ("plot", "lab", "digits", "vision", "fast", "all"):
        assert f"Provides-Extra: {extra}\n" in metadata


@pytest.mark.nightly
def test_what_it_holds_works_without_extras(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, str(ROOT / "README.md")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "usage: packsaddle COMMAND" in done.stdout
    assert "plan link --help: code 0" in done.stdout
    assert "torch alone: numba is not installed" in done.stdout
    for command in NEEDING_PLOT:
        assert f"{command}: code 2" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("packsaddle: error: ")]
    assert len(errors) == len(NEEDING_PLOT)
    assert all(error.endswith("needs matplotlib: pip install 'packsaddle[plot]'") for error in errors)
    assert not (tmp_path / "new").exists()  # it is said before the work
