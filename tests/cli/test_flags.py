"""Option classes as flags: one flag for each field, and errors that name the flag."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from packsaddle.cli.flags import Overrides, flags_of
from packsaddle.cli.parsing import Group, parse
from packsaddle.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits.

    Args:
        most: At most this many.
        names: All of these.
    """

    most: int = 3
    names: tuple[str, ...] = ()
    own: object = field(default=None, metadata={"internal": True})

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most must be at least 1, got {self.most}")


FOUND: list[Any] = []


def whole(where: Path, /, limits: Limits = Limits(most=5), seed: int = 0) -> None:
    """Do.

    Args:
        where: There.
        seed: Of it.
    """
    FOUND.append((where, limits, seed))


def partial(limits: Overrides[Limits] = Overrides()) -> None:  # noqa: B008
    """Do."""
    FOUND.append(limits)


def obey(words: str) -> Any:
    parse(Group("", {"whole": whole, "partial": partial}), words.split(), "packsaddle")()
    return FOUND.pop()


def test_the_fields_of_an_option_class_are_flags() -> None:
    assert list(flags_of(whole)) == ["where", "most", "names", "seed"]
    assert flags_of(whole)["most"].default == 5
    assert obey("whole x") == (Path("x"), Limits(5), 0)
    assert obey("whole x --names a --most 2 --names b --seed 7") == (Path("x"), Limits(2, ("a", "b")), 7)


def test_options_not_given_keep_their_values() -> None:
    stated = Limits(8, ("a",))
    assert replace(stated, **obey("partial").values) == stated
    assert replace(stated, **obey("partial --most 2").values) == Limits(2, ("a",))
    assert flags_of(partial)["most"].default is None


@pytest.mark.parametrize("words", ["whole x --most 0", "partial --most 0"])
def test_an_error_names_the_flag(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^--most must be at least 1, got 0$"):
        obey(words)
    with pytest.raises(ConfigError, match=r"unknown flag --msot \(did you mean --most\?\)"):
        obey(words.replace("most", "msot"))
    with pytest.raises(ConfigError, match="unknown flag --own"):
        obey(words.replace("most", "own"))


def test_help_has_the_texts_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        obey("whole --help")
    shown = capsys.readouterr().out
    assert "At most this many. (default: 5)" in shown
    assert "All of these." in shown
    with pytest.raises(SystemExit):
        obey("partial --help")
    assert "At most this many." in (shown := capsys.readouterr().out)
    assert "default" not in shown
