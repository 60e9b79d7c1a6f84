"""Progress where there is no terminal: a line at every tenth, what was measured once, and the time left."""

import re

import pytest

from packsaddle.experiments.progress import live


def test_a_measurement_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with live("run", 20, quiet=False) as report:
        for step in range(1, 21):
            report(step, "loss 1" if step < 12 else "loss 2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("%")[0] for line in lines] == [f"run: {10 * i:3d}" for i in range(1, 11)]
    assert [i for i, line in enumerate(lines) if "loss" in line] == [0, 5]
    assert [bool(re.search(r"about \d+ s left$", line)) for line in lines] == [True] * 9 + [False]


def test_quiet_it_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with live("run", 2, quiet=True) as report:
        report(2, "loss 1")
    assert capsys.readouterr().out == ""
