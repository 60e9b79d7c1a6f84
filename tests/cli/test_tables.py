"""Tables of the command line: 80 columns, or a hint where they are whole; nothing of a cell is cut off."""

import json
import re

import pytest
from commandline import command
from rich.table import Table

from packsaddle.cli.console import brief, print_table
from packsaddle.cli.progress import countdown

pytestmark = pytest.mark.usefixtures("first_timings")  # the form of tables does not depend on them


def test_long_cells_are_wrapped_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("compressor", "exchange", "bytes")
    table.add_row("TopK(0.01, values='int2', chunk=4096) " * 2, "projected all-reduce " * 2, "1,000,000 " * 3)
    print_table(table, "--json prints it whole")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count("values='int2',") == printed.count("chunk=4096)") == 2
    assert "…" not in printed
    assert "--json" not in printed


def test_wider_tables_say_where_they_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("a", "b")
    table.add_row("x" * 50, "y" * 50)
    print_table(table, "--json prints it whole")
    printed = capsys.readouterr().out
    assert "x" * 50 + "  " + "y" * 50 in printed
    assert "The table is 102 columns wide; --json prints it whole." in printed


def test_brief_names_may_be_typed() -> None:
    assert brief("TopK(ratio=0.01, values='int8')") == "TopK(0.01, values='int8')"
    assert brief("LowRank(matrix_rank=2)") == "LowRank(2)"


LINK = ("plan", "link", "20mbit", "--d", "1e4", "--compute", "0.1")
TABLES = {
    "link": (*LINK, "--table"),
    "link, the verdict": LINK,
    "theory": ("plan", "theory", "--d", "25M", "--epsilon", "0.2", "--lipschitz-gradient", "1"),
    "table": ("plan", "table", "--d", "25M", "--epsilon", "0.01"),
    "compressors": ("compressors", "--d", "30000"),
}


@pytest.mark.parametrize("words", TABLES.values(), ids=TABLES)
def test_tables_fit_80_columns(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headings have the units; rows are single lines, except for a compressor's options and formulas of Table 1."""
    monkeypatch.setenv("COLUMNS", "80")
    assert command(*words) == 0
    printed = capsys.readouterr().out
    assert "columns wide" not in printed
    tables = re.findall(r"(?:.*\n)*?(─+\n(?:.+\n)+)\n", printed)
    assert printed.count("─\n") == len(tables) > 0
    for table in tables:
        rule, *rows = table.splitlines()
        assert max(map(len, (rule, *rows))) <= 80
        for row in rows:
            if words[1] != "table":
                continued = len(re.split(r"  +", row.strip())) == 1
                assert not row.startswith(" "), row
                assert not continued or re.fullmatch(r"(\w+=\S+[,)])+", row.strip()), row


def test_compressors_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The list agrees with the protocols' own arithmetic, for d = 5000 and three workers."""
    assert command("compressors", "--d", 5000, "--workers", 3, "--ratio", "0.02", "--json") == 0
    entries = {e["compressor"]: e for e in map(json.loads, capsys.readouterr().out.splitlines())}
    dense, random_k = entries["Identity()"], entries["RandomK(ratio=0.02)"]
    assert dense["sent"] == dense["received"] == round(4 / 3 * 4 * 5000)
    assert (random_k["mu"], random_k["linear"], random_k["protocol"]) == (0.02, True, "all-reduce")
    assert random_k["sent"] == round(4 / 3 * 4 * 100)
    sign = next(e for name, e in entries.items() if name.startswith("Sign"))
    assert sign["sent"] == 2 * (5000 // 8 + 4)
    assert sign["kept"] == pytest.approx(2 / 3.14159, abs=0.02)
    assert command("compressors", "--d", 5000) == 0
    assert "QSGD" in capsys.readouterr().out


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("packsaddle.cli.progress._BETWEEN_LINES", 0.0)
    with countdown("plan", 9) as report:
        report(3, "timing Sign() (4 of 9)")
    assert capsys.readouterr().err == "plan: timing Sign() (4 of 9)\n"
