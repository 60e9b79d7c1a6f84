"""What importing costs: nothing that only some functions need is imported with the package or its command line."""

import subprocess
import sys

SLOW = {"scipy", "matplotlib", "jinja2", "plotly", "sklearn", "torchvision", "PIL", "numba", "triton"}


def test_importing_brings_nothing_slow_but_torch() -> None:
    """Beyond what torch itself imports, in a fresh interpreter. (Seconds would depend on the machine.)"""
    script = "import sys, torch; before = {*sys.modules}; import packsaddle.cli; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert {name.partition(".")[0] for name in done.stdout.split()} & SLOW == set()
