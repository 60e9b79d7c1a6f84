"""Metrics of the code: sizes, imports, arguments, and the number of files that one step calls.

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

sys.path[:0] = [str(Path(__file__).parents[2] / "tests" / "support")]
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


def traced(work: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Count the calls between functions of the package by calling and called file, also in threads."""
    found: Counter[tuple[str, str]] = Counter()

    def is_ours(frame: Any) -> bool:
        return bool(frame.f_code.co_filename.startswith(f"{ROOT}{os.sep}")) and frame.f_code.co_name != "<module>"

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and is_ours(frame):
            caller = frame.f_back
            while caller is not None and not is_ours(caller):
                caller = caller.f_back
            found[caller.f_code.co_filename if caller else "", frame.f_code.co_filename] += 1

    sys.setprofile(note)
    threading.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return found


def files_of(calls: Counter[tuple[str, str]]) -> int:
    """Return the number of files with a call."""
    return len({callee for _, callee in calls})


def hops_of(calls: Counter[tuple[str, str]]) -> int:
    """Return the number of calls that lead from one file to another."""
    return sum(n for (caller, callee), n in calls.items() if caller not in ("", callee))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 60))


def step_calls() -> Counter[tuple[str, str]]:
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


def hook_calls() -> Counter[tuple[str, str]]:
    """Trace three backward passes with the hook, whose thread starts in the first, and their optimizer steps."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.01)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    packsaddle.register_ddp_hook(model, packsaddle.RandomK(0.1), noise=0.01, optimizer=inner)

    def iterations() -> None:
        for _ in range(3):
            model(torch.ones(4, 60)).square().mean().backward()
            inner.step()

    return traced(iterations)


def run_calls() -> Counter[tuple[str, str]]:
    """Trace `python -m lab run` with one worker, four steps and checkpoints."""
    from lab.__main__ import main

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
    """Return the number of the package's modules that import each of them, at any level of their code."""
    modules = {".".join(("packsaddle", *p.relative_to(ROOT).with_suffix("").parts)) for p in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in modules}
    importers: dict[str, set[str]] = {name: set() for name in modules}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith("packsaddle."):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    importers[whole if whole in modules else node.module].add(str(path))
    return Counter({name: len(who) for name, who in importers.items()})


def arguments(of: Callable[..., Any]) -> int:
    """Return the number of arguments, without self."""
    return len(inspect.signature(of).parameters.keys() - {"self"})


def uncommented() -> tuple[int, int]:
    """Return the number of functions of more than 15 lines without a comment line, and with or without one."""
    bare = whole = 0
    for path in ROOT.rglob("*.py"):
        source = path.read_text()
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                if body and (node.end_lineno or 0) - body[0].lineno + 1 > 15:
                    whole += 1
                    first = body[0].lineno - 1
                    while first > 0 and lines[first - 1].lstrip().startswith("#"):
                        first -= 1
                    bare += not any(line.lstrip().startswith("#") for line in lines[first : node.end_lineno])
    return bare, whole


def main() -> None:
    """Print the table of the architecture's targets."""
    files = sorted(ROOT.rglob("*.py"))
    lines = {path: len(path.read_text().splitlines()) for path in files}
    packages: Counter[str] = Counter()
    for path, n in lines.items():
        packages[path.relative_to(ROOT).parts[0]] += n
    short = [p for p in files if lines[p] < SHORT and p.name != "__init__.py"]
    with tempfile.TemporaryDirectory() as folder:
        step = run_in_processes(step_calls, 2, Path(folder))[0]
    with tempfile.TemporaryDirectory() as folder:
        hook = run_in_processes(hook_calls, 2, Path(folder))[0]
    bare, whole = uncommented()
    rows = {
        "files of src": len(files),
        "lines of src": sum(lines.values()),
        "lines of the engine, its fronts, compressors and comm": sum(
            packages[name] for name in ("feedback", "sgd", "hooks", "local", "compressors", "comm")
        ),
        "lines of plan and cli": packages["plan"] + packages["cli"],
        "files that one CompressedSGD step runs": files_of(step),
        "calls from file to file in it": hops_of(step),
        "files that the DDP hook runs in three iterations": files_of(hook),
        "files of src that python -m lab run executes": files_of(run_calls()),
        "arguments of LocalUpdates": arguments(packsaddle.LocalUpdates.__init__),
        "arguments of CompressedSGD": arguments(packsaddle.CompressedSGD.__init__),
        "arguments of certify": arguments(packsaddle.certify),
        "modules imported by exactly one other": sum(n == 1 for n in imports().values()),
        f"functions over 15 lines without a comment line, of {whole}": bare,
        f"files under {SHORT} lines": len(short),
    }
    for what, count in rows.items():
        print(f"{count:>7,}  {what}")


if __name__ == "__main__":
    main()
