"""The shape of the code in numbers: sizes, imports, and the files that a reader of one step must open.

make shape
"""

import ast
import inspect
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "support")]
from gloo import run_in_processes  # noqa: E402 -- the tests' helper

ROOT = Path(packsaddle.__file__).parent
SHORT = 50  # lines
CONFIG = """
lr = 0.1
epochs = 1
batch_size = 256
noise.std = 0.001
data.name = "digits"
model = { name = "autoencoder", widths = [16, 4] }
compressor = { kind = "RandomK", ratio = 0.1 }
"""


def traced(work: Callable[[], Any]) -> set[str]:
    """Return the package's files in which a function ran, also in threads."""
    found: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            found.add(frame.f_code.co_filename)

    sys.setprofile(note)
    threading.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return {str(Path(name).relative_to(ROOT)) for name in found if Path(name).is_relative_to(ROOT)}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 60))


def step_files() -> set[str]:
    """Trace the third step of CompressedSGD with RandomK and noise."""
    model = network()
    opt = packsaddle.CompressedSGD(model.parameters(), 0.1, compressor=packsaddle.RandomK(0.1), noise=0.01)
    for t in range(3):
        model.zero_grad()
        model(torch.ones(4, 60)).square().mean().backward()
        if t == 2:
            return traced(opt.step)
        opt.step()
    raise AssertionError


def hook_files() -> set[str]:
    """Trace three backward passes through the hook, whose thread starts in the first, and the steps after them."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.01)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    packsaddle.register_ddp_hook(model, packsaddle.RandomK(0.1), noise=0.01, optimizer=inner)

    def iterations() -> None:
        for _ in range(3):
            model(torch.ones(4, 60)).square().mean().backward()
            inner.step()

    return traced(iterations)


def run_files() -> set[str]:
    """Trace `packsaddle run` with one worker, four steps and checkpoints."""
    from packsaddle.cli import main

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(CONFIG)
        sys.argv = ["packsaddle", "run", str(config), "--out", str(Path(folder) / "run"), "--checkpoint-every", "4"]
        with open(os.devnull, "w") as nowhere:
            sys.stdout, before = nowhere, sys.stdout
            try:
                return traced(main)
            finally:
                sys.stdout = before


def imports() -> Counter[str]:
    """Return how many of the package's modules import each of them, at any depth of their code."""
    modules = {".".join(("packsaddle", *p.relative_to(ROOT).with_suffix("").parts)) for p in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in modules}
    importers: dict[str, set[str]] = {name: set() for name in modules}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("packsaddle"):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    importers[whole if whole in modules else node.module].add(str(path))
    return Counter({name: len(who) for name, who in importers.items()})


def main() -> None:
    files = sorted(ROOT.rglob("*.py"))
    lines = {path: len(path.read_text().splitlines()) for path in files}
    entries = [p for p in ROOT.iterdir() if p.name not in ("__init__.py", "py.typed", "__pycache__")]
    short = [p for p in files if lines[p] < SHORT and p.name != "__init__.py"]
    marks = sum(path.read_text().count("# line 12") for path in files)
    with tempfile.TemporaryDirectory() as folder:
        step = run_in_processes(step_files, 2, Path(folder))[0]
    with tempfile.TemporaryDirectory() as folder:
        hook = run_in_processes(hook_files, 2, Path(folder))[0]
    rows = {
        "entries in the package root": len(entries),
        f"files under {SHORT} lines": len(short),
        "files that one step runs": len(step),
        "files that the DDP hook runs in three iterations": len(hook),
        "files that packsaddle run executes": len(run_files()),
        "places where e absorbs what was not sent": marks,
        "parameters of CompressedSGD": len(inspect.signature(packsaddle.CompressedSGD.__init__).parameters) - 1,
        "modules imported by exactly one other": sum(n == 1 for n in imports().values()),
        "files of src": len(files),
        "lines of src": sum(lines.values()),
    }
    for what, count in rows.items():
        print(f"{count:>7,}  {what}")


if __name__ == "__main__":
    main()
