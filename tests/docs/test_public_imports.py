"""Public homes: pages and scripts import packages, and every name that a package exports is there."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import packsaddle

ROOT = Path(__file__).parents[2]
PACKAGES = ["packsaddle"] + [p.name for p in pkgutil.walk_packages(packsaddle.__path__, "packsaddle.") if p.ispkg]
ALLOWED = {
    "packsaddle.integrations.huggingface": "imports transformers, which is optional",
    "packsaddle.integrations.lightning": "imports lightning, which is optional",
    "packsaddle.compressors.selection": "lab/bench/pieces.py measures this internal function",
    "packsaddle.numerics.seeds": "examples/reference.py draws the random numbers of CompressedSGD",
    "packsaddle.numerics.devices": "lab/bench/gpu.py lists the accelerators",
    "packsaddle.cli.commands": "lab/__main__.py lists its commands as the command line does",
    "packsaddle.options.describe": "lab/docs/docstrings.py shows the comments of fields",
    "packsaddle.messages": "lab/pool.py prints what a terminal must not obey",
    "packsaddle.options.schema": "the lab's commands propose the nearest name, as the library's do",
    "packsaddle.checkpoint.atomic_files": "lab/paper/study.py writes its files whole, as the library does",
    "packsaddle.comm.simulation": "lab/paper/figure1.py trains on all workers' batches at once",
    "packsaddle.comm.group": "as the last",
    "packsaddle.curvature.mean_loss": "lab/paper/figure2.py catches its error where a run has diverged",
    "packsaddle.curvature.narrow_convolutions": "lab/tasks/models.py chooses a layout",
    "packsaddle.cli.folders": "lab/demo/command.py makes its folder as the commands do",
    "packsaddle.cli.certificate_figure": "lab/demo/story.py draws in the colors of the certificate's figure",
}


def sources() -> list[str]:
    """Return the Python code of pages, examples and the lab, without lab/docs/generated, which
    reads the package itself."""
    found = [p for d in ("docs", "examples", "experiments", "lab") for p in (ROOT / d).rglob("*")]
    found = [p for p in found if not {"generated.py"} & {*p.relative_to(ROOT).parts}]
    texts = [p.read_text() for p in found if p.suffix == ".py"]
    for page in [ROOT / "README.md", *(p for p in found if p.suffix == ".md")]:
        texts += re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return texts


def test_pages_and_scripts_import_packages() -> None:
    imported = set()
    for text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "packsaddle":
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names if alias.name.split(".")[0] == "packsaddle"}
    assert "packsaddle.theory" in imported
    assert imported - {*PACKAGES, "packsaddle.errors"} == ALLOWED.keys()  # a reason without a use is out of date


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_exports_is_there(package: str) -> None:
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", []):
        found = getattr(module, name)
        assert not isinstance(found, type(packsaddle)), f"{package}.{name} is a module"
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        module.missing  # noqa: B018


def test_the_package_lists_its_public_names_alone() -> None:
    assert set(dir(packsaddle)) == {*packsaddle.__all__, "__version__"}
