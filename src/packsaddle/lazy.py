"""Packages whose public names are imported on first use, so that the command line starts without them."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importing(package: str, files: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's module-level `__getattr__` (PEP 562).

    Args:
        package: The package's `__name__`.
        files: The public names that each of its modules defines, separated by blanks.
    """
    files = {name: file for file, names in files.items() for name in names.split()}

    def home(name: str) -> Any:
        if name not in files:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{files[name]}"), name)

    return home
