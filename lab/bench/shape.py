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

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "tests" / "support"), str(REPOSITORY / "tests" / "local")]
from code_size import members, sizes, total  # noqa: E402 -- the tests' helpers
from gloo import run_in_processes  # noqa: E402
from test_exclusions import EXCLUDED  # noqa: E402

ROOT = Path(packsaddle.__file__).parent
LAB = [REPOSITORY / "lab", REPOSITORY / "experiments", REPOSITORY / "docs"]
SHORT = 50  # a file with fewer lines counts as short
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
    """Run `work`, and return the number of calls by (calling file, called file) within the package.

    Calls in all threads are counted.
    """
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
    """Return the number of files in which at least one function was called."""
    return len({callee for _, callee in calls})


def hops_of(calls: Counter[tuple[str, str]]) -> int:
    """Return the number of calls from one file of the package into another."""
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


def round_calls() -> Counter[tuple[str, str]]:
    """Trace a round of LocalUpdates with its default settings and period 1: the second round and the step before it."""
    model = network()
    inner = torch.optim.AdamW(model.parameters())
    local = packsaddle.LocalUpdates(inner, every=1)
    calls: Counter[tuple[str, str]] = Counter()
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(4, 60) + torch.distributed.get_rank()).square().mean().backward()
        calls = traced(inner.step)
    local.flush()
    return calls


def hook_calls() -> Counter[tuple[str, str]]:
    """Trace three backward passes with DDP's hook and three optimizer steps. The hook's thread starts in the first."""
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
    """Return, for each module of the package, the number of the package's modules that import it.

    Imports inside functions count too.
    """
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
    """Return the number of arguments of a function, without self."""
    return len(inspect.signature(of).parameters.keys() - {"self"})


def uncommented() -> tuple[int, int]:
    """Return two counts of functions of more than 15 lines: those without a comment line, and all of them."""
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


def imports_of(path: Path) -> int:
    """Return the number of the package's modules that a file imports."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    return len({n.module for n in nodes if n.module and n.module.startswith("packsaddle.")})


def in_processes(work: Callable[[], Counter[tuple[str, str]]]) -> Counter[tuple[str, str]]:
    """Return the trace of `work` on the first of two workers."""
    with tempfile.TemporaryDirectory() as folder:
        found: list[Counter[tuple[str, str]]] = run_in_processes(work, 2, Path(folder))
    return found[0]


def main() -> None:
    """Print the sizes of the package's folders, and the table of the architecture's targets."""
    for room, (files, lines) in sizes(ROOT).items():
        print(f"{files:>7,} files {lines:>7,} code lines  {room or 'the root'}")
    print()
    paths = sorted(ROOT.rglob("*.py"))
    short = [p for p in paths if len(p.read_text().splitlines()) < SHORT and p.name != "__init__.py"]
    step, one_round, hook = map(in_processes, (step_calls, round_calls, hook_calls))
    updates = ROOT / "local" / "updates.py"
    methods, attributes = members(updates.read_text(), "LocalUpdates")
    bare, whole = uncommented()
    library, lab, tests = total([ROOT]), total(LAB), total([REPOSITORY / "tests"])
    rows = {
        "files of the library": library[0],
        "code lines of the library": library[1],
        "code lines of the lab": lab[1],
        "code lines of the tests": tests[1],
        "lines of local/updates.py": len(updates.read_text().splitlines()),
        "methods of LocalUpdates": methods,
        "attributes of LocalUpdates": attributes,
        "modules that local/updates.py imports": imports_of(updates),
        "files that one round of local updates runs": files_of(one_round),
        "calls from file to file in it": hops_of(one_round),
        "files that one CompressedSGD step runs": files_of(step),
        "calls from file to file in such a step": hops_of(step),
        "files that the DDP hook runs in three iterations": files_of(hook),
        "files of the library that python -m lab run executes": files_of(run_calls()),
        "pairs of arguments of LocalUpdates that exclude each other": len(EXCLUDED),
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
