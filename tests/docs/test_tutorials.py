"""The tutorials: each page has its script's prose and code, and the script still prints what the page says."""

import math
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from forked_python import environment, python
from nightly import nightly

from lab.docs import tutorials as maker

ROOT = Path(__file__).parents[2]
SCRIPTS = maker.SCRIPTS
LONG = {"03_adamw_over_a_slow_link", "04_one_machine_to_four_hosts"}

NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")
TIME = re.compile(r"[\d.,]+ (s|ms)\b")


def same(new: str, old: str) -> bool:
    """Tell if two texts have the same words and about the same numbers, but for times and what aligns columns."""
    new, old = (re.sub(r" +", " ", TIME.sub(r"T \1", text)) for text in (new, old))
    if NUMBER.sub("N", new) != NUMBER.sub("N", old):
        return False
    numbers = ([float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (new, old))
    return all(math.isclose(a, b, rel_tol=0.1, abs_tol=0.005) for a, b in zip(*numbers, strict=True))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_pages_have_the_prose_and_code_of_their_scripts(script: Path) -> None:
    text = (maker.PAGES / f"{script.stem}.md").read_text()
    assert maker.page(script, maker.printed_in(script, text)) == text, "run `make tutorials`, or with --prose"
    for name in maker.pictures(script):
        assert all((maker.PAGES / f"{Path(name).stem}-{shade}.svg").exists() for shade in ("light", "dark"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", [nightly(SCRIPTS[0]), *SCRIPTS[1:]], ids=lambda p: p.stem)
def test_scripts_print_what_their_pages_say(script: Path, tmp_path: Path) -> None:
    if script.stem in LONG and "PACKSADDLE_ALL_TUTORIALS" not in os.environ:
        pytest.skip("a minute of processes that other tests start too: see `make test-integrations`")
    words = [python(), "-m", "lab.docs.tutorials", "--out", str(tmp_path), str(script)]
    commands = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # torchrun is not beside python()
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment(PATH=commands), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    new, old = (
        maker.printed_in(script, (where / f"{script.stem}.md").read_text()) for where in (tmp_path, maker.PAGES)
    )
    code = [cell for cell in maker.cells(script) if not cell.is_prose]
    for cell, printed, said in zip(code, new, old, strict=True):
        assert bool(printed) == bool(said), cell.text
        assert cell.varies or same(printed, said), f"{cell.text}\nprints\n{printed}\nand not\n{said}"
    assert {p.name for p in tmp_path.glob("*-dark.svg")} == {n.replace(".", "-dark.") for n in maker.pictures(script)}
