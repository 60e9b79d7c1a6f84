"""The page of migrations: its diffs are those of the scripts, and its tables those of the measured rows."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pytest
from stored_rows import at_best_rate, read

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrations.md").read_text()
CARD = (ROOT / "experiments" / "migrations" / "README.md").read_text()
METHODS = {
    "torchft's DiLoCo, every 25 steps": "torchft's DiLoCo, every 25",
    "`LocalUpdates(every=25, outer=OuterSGD())`": "local updates, every 25, OuterSGD()",
    "`LocalUpdates(every=8)`, no outer optimizer": "local updates, every 8",
    "LocalSGD, every 8 steps (Accelerate's and torchft's)": "local SGD, every 8",
    "`LocalUpdates(every=8)`": "local updates, every 8",
    "DistributedDataParallel": "DDP",
    "1-bit Adam, frozen after 50 of the 200 steps": "1-bit Adam",
    "0/1 Adam, frozen after 50 of the 200 steps": "0/1 Adam",
    "`LocalUpdates(every=1)`": "local updates, every 1",
    "`register_ddp_hook`, `QSGD(127)`": "hook, QSGD(127)",
    "`register_ddp_hook`, `Sign()`": "hook, Sign()",
}


def code(script: str) -> list[str]:
    """The lines of a script without its docstring."""
    text = (ROOT / "examples" / "migrations" / f"{script}.py").read_text()
    return re.sub(r'^""".*?"""\n\n', "", text, flags=re.DOTALL).splitlines()


@pytest.mark.parametrize("name", ["torchft_diloco", "accelerate_local_sgd", "deepspeed_onebit_adam"])
def test_diffs_are_of_the_scripts(name: str) -> None:
    lines = list(difflib.unified_diff(code(f"{name}_before"), code(f"{name}_after"), n=1, lineterm=""))[3:]
    diff = "\n".join("..." if line.startswith("@@") else line.rstrip() for line in lines)
    assert f"```diff\n{diff}\n```" in PAGE


def row(label: str, method: str, rows: Sequence[dict[str, str]]) -> str:
    losses, sent = at_best_rate(rows, method)
    assert len(losses) == 3
    return f"| {label} | {sent:,.1f} | {mean(losses):.3f} | {min(losses):.3f} to {max(losses):.3f} |"


def test_tables_are_of_the_rows() -> None:
    rows = read(ROOT / "experiments" / "migrations" / "runs.csv")
    written = [line for line in PAGE.splitlines() if re.search(r"\| [\d.]+ to [\d.]+ \|$", line)]
    assert set(written) == {row(label, method, rows) for label, method in METHODS.items()}
    in_card = [line for line in CARD.splitlines() if line.startswith("| ") and line.count(" to ") == 1]
    assert len(in_card) == len({each["method"] for each in rows})
    for line in in_card:
        method, sent, *rates, best = (cell.strip() for cell in line.strip("|").split("|"))
        losses = [f"{float(each['validation_loss']):.3f}" for each in rows if each["method"] == method]
        assert {rate for rate in rates if rate != "-"} <= set(losses)
        assert row("", method, rows).split("|")[3].strip() in best
        assert sent == next(each["kB_a_step"] for each in rows if each["method"] == method)
