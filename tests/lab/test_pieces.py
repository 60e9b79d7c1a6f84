"""Timed pieces of a step: every table is complete and adds up."""

import json
from typing import Any

import pytest
from commandline import command

from packsaddle.compressors import compressors


def tables(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    """Run a benchmark and return its JSON."""
    assert command("lab.bench.pieces", *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for table in found:
        assert table["question"].endswith("?")
        assert all(list(row) == list(table["rows"][0]) for row in table["rows"])
    return found


def check_times(row: dict[str, Any]) -> None:
    assert 0 < row["low"] <= row["ms"] <= row["high"]


@pytest.mark.process
def test_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    d = 20_000
    (table,) = tables(capsys, "exchange", "--d", d, "--repeats", 2)
    rows = {row["exchange"]: row for row in table["rows"]}
    rate = table["setting"]["loopback GB/s"] * 1e9
    dense = rows["dense all-reduce"]
    for row in rows.values():
        check_times(row)
        assert row["floor ms"] == pytest.approx(1000 * row["bytes"] / rate, rel=1e-3)
        assert row["/ floor"] * row["floor ms"] == pytest.approx(row["ms"])
        assert row["dense / it"] * row["ms"] == pytest.approx(dense["ms"])
    assert len(rows) == 2 + len(compressors(0.01))  # and two of torch
    assert (dense["bytes"], rows["float16 all-reduce"]["bytes"]) == (4 * d, 2 * d)
    assert (rows["Identity()"]["bytes"], rows["RandomK(ratio=0.01)"]["bytes"]) == (4 * d, 4 * d // 100)
