"""Packages import packages below them only, and torch.distributed is known in few places."""

import ast
from functools import cache
from pathlib import Path

import packsaddle

ROOT = Path(packsaddle.__file__).parent
# What each package may import, beside itself and the root modules, which import nothing of ours.
FRONTS = ("feedback", "sgd", "hooks", "local")  # the engine and its users
ALLOWED: dict[str, set[str]] = {
    "options": set(),
    "numerics": set(),
    "compressors": {"numerics"},
    "comm": {"options", "numerics", "compressors"},
    "checkpoint": {"numerics", "comm", "feedback"},
    "curvature": {"numerics", "comm"},
    "feedback": {"options", "numerics", "compressors", "comm"},
    "sgd": {"options", "numerics", "compressors", "comm", "feedback"},
    "hooks": {"options", "numerics", "compressors", "comm", "feedback"},
    "local": {"options", "numerics", "compressors", "comm", "feedback", "checkpoint"},
    "theory": {"numerics", "compressors", "comm"},
    "integrations": {"numerics", "compressors", "comm", *FRONTS, "checkpoint", "curvature"},
    "plan": {"options", "numerics", "compressors", "comm", *FRONTS, "theory"},
    "cli": {"options", "compressors", "comm", "checkpoint", "curvature", "theory", "plan", "numerics"},
}
ROOT_MODULES = {"errors", "messages", "version"}
# Modules that a report may import; it never imports torch.
REPORT = ("errors", "messages", "version", "checkpoint.atomic_files", "cli.certificate_figure", "cli.folders")
DISTRIBUTED = ("comm.", "hooks.ddp.")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Return all nodes of a file's syntax; the first is the module."""
    return list(ast.walk(ast.parse(path.read_text())))


def module(path: Path) -> ast.Module:
    found = nodes(path)[0]
    assert isinstance(found, ast.Module)
    return found


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, also inside functions; packsaddle's without its name."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = ROOT / node.module.removeprefix("packsaddle").strip(".").replace(".", "/")
            inside = {a.name for a in node.names if (folder / f"{a.name}.py").exists() or (folder / a.name).is_dir()}
            names |= {f"{node.module}.{name}" for name in inside}
            names |= {node.module} if len(inside) < len(node.names) else set()
    return {name.removeprefix("packsaddle.") for name in names}


@cache
def modules() -> dict[str, set[str]]:
    """What each module imports; not at the top, where collecting any test would wait for it."""
    return {module_name(p): imports(p) for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"}


def test_the_root_has_packages_and_three_modules() -> None:
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == ALLOWED.keys()
    assert {p.stem for p in ROOT.glob("*.py")} == {"__init__"} | ROOT_MODULES


def test_packages_import_what_they_may() -> None:
    for name, imported in modules().items():
        package = name.partition(".")[0]
        allowed = ALLOWED.get(package, set()) | {package} | (ROOT_MODULES if package in ALLOWED else set())
        for target in imported:
            top = target.partition(".")[0]
            if top in ALLOWED or top in ROOT_MODULES:
                assert top in allowed, f"{name} imports {target}"


def test_of_the_root_package_only_the_version_is_read() -> None:
    for path in ROOT.rglob("*.py"):
        used = {
            node.attr
            for node in nodes(path)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "packsaddle"
        }
        taken = {
            alias.name
            for node in nodes(path)
            if isinstance(node, ast.ImportFrom) and node.module == "packsaddle"
            for alias in node.names
            if not (ROOT / alias.name).is_dir() and alias.name not in ROOT_MODULES
        }
        assert used | taken <= {"__version__", "__file__"}, path


def test_modules_import_one_another_in_one_direction() -> None:
    """No cycle among the imports at the top of files."""
    above = {p: {n for n in module(p).body if isinstance(n, ast.ImportFrom)} for p in ROOT.rglob("*.py")}
    left = {
        module_name(path): {
            full if full in modules() else node.module.removeprefix("packsaddle.")
            for node in found
            if node.module and node.module.startswith("packsaddle.")
            for full in (f"{node.module}.{alias.name}".removeprefix("packsaddle.") for alias in node.names)
        }
        for path, found in above.items()
        if path != ROOT / "__init__.py"
    }
    while left:
        free = {name for name, needed in left.items() if not needed & (left.keys() - {name})}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in free}


def test_who_imports_torch_distributed() -> None:
    users = {name for name, imported in modules().items() if any(t.startswith("torch.distributed") for t in imported)}
    assert {name for name in users if not f"{name}.".startswith(DISTRIBUTED)} == set()
    assert "feedback.background" not in users


def test_one_module_knows_the_accelerators_by_name() -> None:
    """Others use `torch.accelerator` and `numerics.devices`."""
    for path in ROOT.rglob("*.py"):
        used = {
            node.attr
            for node in nodes(path)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        }
        assert module_name(path) == "numerics.devices" or not used & {"cuda", "xpu", "mps"}, path


def test_objects_are_registered_and_not_searched_for() -> None:
    """Neither among all objects in memory, nor on the call stack."""
    for path in ROOT.rglob("*.py"):
        used = {node.attr for node in nodes(path) if isinstance(node, ast.Attribute)}
        assert not used & {"get_objects", "get_referrers", "_getframe", "currentframe", "f_back"}, path


def test_the_package_imports_no_lab() -> None:
    for name, imported in modules().items():
        assert not {t for t in imported if t.partition(".")[0] == "lab"}, name
