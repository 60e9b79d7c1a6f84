"""packsaddle doctor."""

import json as json_format
import sys
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from packsaddle.commands.console import is_first, print_table
from packsaddle.doctor import Fact, examine

_MARKS = {"ok": "", "note": "-", "warning": "!", "problem": "X"}
_LEGEND = "- not there, or not used   ! may fail in some uses   X training fails"


def doctor(no_try: bool = False, json: bool = False) -> None:
    """Say what training would use on this machine, what it would not, and why.

    Versions, cores, GPUs, compiled loops, optional packages, network interfaces and which of them gloo listens on,
    and the variables that matter; then two processes exchange a number. Under torchrun its workers do, on all hosts.
    The exit code is 1 if something is found that training fails at, else 0.

    Examples:
        packsaddle doctor
        packsaddle doctor --json --no-try
        torchrun --nnodes 2 --nproc-per-node 1 -m packsaddle.cli doctor

    Args:
        no_try: Start no processes.
        json: Print one JSON document.
    """
    facts = examine(try_processes=not no_try)
    problems = [fact for fact in facts if fact.verdict == "problem"]
    if is_first() and json:
        print(json_format.dumps({"ok": not problems, "facts": [asdict(fact) for fact in facts]}, indent=2))
    elif is_first():
        _show(facts)
        stopped = ", ".join(f"{fact.topic} {fact.name}" for fact in problems)
        print(f"Training fails: {stopped}." if stopped else "Nothing found that training fails at.")
    if problems:
        sys.exit(1)


def _show(facts: list[Fact]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1), caption=_LEGEND, caption_justify="left")
    before = ""
    for fact in facts:
        found = Text(f"{fact.value}\n> {fact.advice}" if fact.advice else fact.value)  # no markup: [plot] is an extra
        table.add_row(_MARKS[fact.verdict], "" if fact.topic == before else fact.topic, fact.name, found)
        before = fact.topic
    print_table(table)
