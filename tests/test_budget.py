"""The budget of the code: files and code lines of each room, and of the library, the lab and the tests.

Who needs more removes as much elsewhere, or raises a number here and says why in the commit.
"""

from pathlib import Path

import pytest
from code_size import code_lines, members, sizes, total

import packsaddle

pytestmark = pytest.mark.xdist_group("budget")  # files are counted once
ROOT = Path(packsaddle.__file__).parent
REPOSITORY = Path(__file__).parents[1]
# The most files and code lines of a room of the library; "" are the modules in its root.
ROOMS = {
    "": (4, 170),
    "checkpoint": (7, 655),
    "cli": (17, 1380),
    "comm": (16, 1690),
    "compressors": (15, 1585),
    "curvature": (11, 1210),
    "feedback": (14, 1390),
    "hooks": (6, 780),
    "integrations": (5, 660),
    "local": (31, 3180),
    "numerics": (13, 1195),
    "options": (5, 200),
    "plan": (7, 590),
    "sgd": (4, 590),
    "theory": (5, 430),
}
# The most code lines in all.
LIBRARY, LAB, TESTS = 16_000, 11_500, 23_000
# The most methods of LocalUpdates, and attributes that it sets at construction. (Pairs of its arguments that exclude
# each other are counted in local/test_exclusions.py.)
METHODS, ATTRIBUTES = 24, 13


def test_the_rooms() -> None:
    assert sizes(ROOT).keys() == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room(room: str) -> None:
    (files, lines), (most_files, most_lines) = sizes(ROOT)[room], ROOMS[room]
    assert files <= most_files
    assert lines <= most_lines


def test_the_whole() -> None:
    lab = [REPOSITORY / name for name in ("lab", "experiments", "docs")]
    for most, roots in ((LIBRARY, [ROOT]), (LAB, lab), (TESTS, [REPOSITORY / "tests"])):
        assert total(roots)[1] <= most, roots


def test_local_updates() -> None:
    methods, attributes = members((ROOT / "local" / "updates.py").read_text(), "LocalUpdates")
    assert methods <= METHODS
    assert attributes <= ATTRIBUTES


def test_code_lines_are_no_docstrings_comments_or_blanks() -> None:
    source = '''"""A module.

Two lines."""

# a comment
def f() -> str:  # one line
    """A docstring."""

    return """two
lines"""
'''
    assert code_lines(source) == 3
