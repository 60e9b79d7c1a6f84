"""Compiles the pretended device once a machine."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

_SOURCES = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cpp", ".h"))
_OPTIONS = ("-std=c++20", "-O0", "-fPIC", "-shared", "-w", "-DTORCH_EXTENSION_NAME=pretended")
_DEFINED = ("-DAT_PER_OPERATOR_HEADERS", "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO")
_LIBRARIES = ("-ltorch_cpu", "-lc10", "-ltorch", "-ltorch_python")


def unavailable() -> str:
    """Return why there can be no pretended device here, or an empty string."""
    if torch.version.cuda or torch.version.hip or not sys.platform.startswith("linux"):
        return "needs a build of torch for CPUs, on Linux"
    if _compiler() is None or not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "needs a C++ compiler and Python.h"
    return ""


def built() -> Path:
    """Return the compiled library, from a cache folder if it is there. Compiling takes 20 s of one core."""
    parts = [*(p.read_bytes() for p in _SOURCES), torch.__version__.encode(), sys.version.encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "packsaddle-tests"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"pretended-{key}.so"
    with (folder / "lock").open("w") as lock:  # pytest's other processes wait for the first one
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library)
    return library


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _compile(library: Path) -> None:
    source = next(p for p in _SOURCES if p.suffix == ".cpp")
    root, part = Path(torch.__file__).parent, library.with_suffix(".part")
    folders = root / "include", root / "include/torch/csrc/api/include", sysconfig.get_path("include")
    includes = [f"-I{folder}" for folder in folders]
    command = [_compiler(), *_OPTIONS, *_DEFINED, *includes, source, "-o", part, f"-L{root / 'lib'}", *_LIBRARIES]
    subprocess.run([str(word) for word in command], check=True)
    part.rename(library)
