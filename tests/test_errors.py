"""Checks of single numbers, and texts of messages: the words in which every package says that one is out of range."""

import math

import pytest

from packsaddle.errors import check_integers, check_not_negative, check_positive
from packsaddle.messages import one_line, shown


@pytest.mark.parametrize("value", [0, -1.5, math.inf, math.nan])
def test_what_is_not_positive_and_finite_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^rho must be positive and finite, got {value}$"):
        check_positive(epsilon=1e-300, lr=None, rho=value)


def test_a_number_given_as_text_is_named() -> None:
    with pytest.raises(ValueError, match=r"^epsilon must be positive and finite, got '0\.1'$"):
        check_positive(epsilon="0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^lr must be finite and not negative, got '1'$"):
        check_not_negative(lr="1")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1e-300, -math.inf, math.inf, math.nan])
def test_what_is_negative_or_not_finite_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^std must be finite and not negative, got {value}$"):
        check_not_negative(zero=0, absent=None, std=value)


@pytest.mark.parametrize("value", [0, 1.5, 2.0, True, "3", None])
def test_what_is_no_integer_or_too_small_is_named(value: object) -> None:
    check_integers(1, every=1)
    with pytest.raises(ValueError, match=f"^start_step must be an integer of at least 1, got {value!r}$"):
        check_integers(1, every=2, start_step=value)


def test_what_a_message_shows() -> None:
    assert one_line("a\n b\x1b[2J\x9b\u202e") == "a b\\x1b[2J\\x9b\\u202e"
    assert len(one_line("x" * 10_000)) < 1_100
    assert shown(10**5_000) == "a int that is too large to show"
    assert shown("x" * 300) == "'" + "x" * 99 + " ... " + "x" * 99 + "'"
