"""Numbers as people write them, on the command line and as arguments, and what is no number."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packsaddle.comm import connect
from packsaddle.options.numerals import real, seconds, whole
from packsaddle.plan import Fleet, Link

NUMBERS = {
    "25M": 25e6,
    "1.5K": 1500,
    "2G": 2e9,
    "7B": 7e9,
    "0.1%": 0.001,
    "1 %": 0.01,
    "-3k": -3000,
    "25_000_000": 25e6,
    " 1e-3 ": 1e-3,
    ".5": 0.5,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_what_numbers_mean(text: str, number: float) -> None:
    assert real(text) == number
    if float(number).is_integer():
        assert whole(text) == number


@pytest.mark.parametrize("text", ["", "M", "%", "1m", "1 k k", "1%%", "0x10", "1e", "abc", "1M5", "--1", "k1"])
def test_what_is_no_number(text: str) -> None:
    for read in (real, whole):
        with pytest.raises(ValueError):  # noqa: PT011 -- float's own
            read(text)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *((whole, text) for text in ("1.5", "1%", "inf", "nan", "1e300", "0.0001k")),
        *((seconds, text) for text in ("", "ms", "55msec", "5m", "1h", "1 min 30 s", "1MS", "s5")),
    ],
)
def test_what_is_no_whole_number_or_duration(read: Callable[[str], float], text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- float's own
        read(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("55ms", 0.055),
        ("100us", 1e-4),
        ("2min", 120.0),
        ("30s", 30.0),
        ("30", 30.0),
        ("1.5 s", 1.5),
        (" 1e3 ms ", 1.0),
        ("1k", 1000.0),
        ("-1ms", -0.001),
    ],
)
def test_what_durations_mean(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda s: Link(latency=s, rate=1.0).latency,
        lambda s: Link(latency=0.0, rate=1.0, overhead=s).overhead,
        lambda s: Link.nominal(1e9, latency=s).latency,
        lambda s: Fleet(workers=2, compute=s).compute,
    ],
)
def test_arguments_in_seconds_take_units(make: Callable[[Any], float]) -> None:
    assert [make(s) for s in ("55ms", "1.5 min", "2", 2, 0.5)] == [0.055, 90.0, 2.0, 2.0, 0.5]
    for bad in ("55msec", "", None, True):
        with pytest.raises(ValueError, match=rf"must be seconds such as 30, 55ms or 2min, got {bad!r}"):
            make(bad)


@pytest.mark.parametrize("name", ["timeout", "quorum_timeout", "connect_timeout"])
def test_connect_names_a_time_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be seconds such as 30, 55ms or 2min, got '5m'"):
        connect("http://127.0.0.1:1", **{name: "5m"})


@given(st.integers() | st.floats(allow_nan=False))
def test_what_python_writes_is_read_back(number: float) -> None:
    assert real(repr(number)) == float(number) or math.isinf(float(number))
    if isinstance(number, int):
        assert whole(repr(number)) == number
