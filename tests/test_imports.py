"""What importing costs: nothing that only some functions need is imported with the package or its command line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import packsaddle_command

SLOW = {"scipy", "matplotlib", "jinja2", "sklearn", "torchvision", "PIL", "numba"}


def test_importing_brings_nothing_slow_but_torch() -> None:
    """Beyond what torch itself imports, in a fresh interpreter. (Seconds would depend on the machine.)"""
    script = "import sys, torch; before = {*sys.modules}; import packsaddle.cli; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert {name.partition(".")[0] for name in done.stdout.split()} & SLOW == set()


def test_an_interrupt_while_the_package_is_imported_ends_the_command_quietly(tmp_path: Path) -> None:
    """A torch that sends SIGINT in the place of Ctrl-C, and would go on."""
    interrupting = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    (tmp_path / "torch.py").write_text(interrupting)
    source = Path(packsaddle_command.__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    words = [sys.executable, "-c", "import packsaddle_command; packsaddle_command.main()", "doctor"]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # a shell's background jobs ignore it
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
