"""Progress where there is no terminal: a line at every tenth, what was measured once, and the time left."""

import re

import pytest

from lab.runs.progress import live


def test_a_measurement_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with live("run", 20, quiet=False) as report:
        for step in range(1, 21):
            report(step, "loss 1" if step < 12 else "loss 2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("%")[0] for line in lines] == [f"run: {10 * i:3d}" for i in range(1, 11)]
    assert [i for i, line in enumerate(lines) if "loss" in line] == [0, 5]
    assert [bool(re.search(r"about \d+ s left$", line)) for line in lines] == [True] * 9 + [False]


def test_what_was_done_before_takes_no_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds a step, from step 8 of 20 on."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("lab.runs.progress.time.monotonic", lambda: next(clock))
    with live("run", 20, quiet=False, first=8) as report:
        for step in (10, 12):  # the clock is read once each
            report(step, "loss 1")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("run:  50%")
    assert first.endswith("about 10 s left")  # 2 s for two steps, ten to go
    assert second.endswith("about 8 s left")  # 4 s for four, eight to go
