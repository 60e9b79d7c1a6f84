"""Options: dataclasses built from TOML (start with `schema`), and parsing of numbers with units (`numerals`)."""

from packsaddle.options.schema import build, first_difference, nearest, plain

__all__ = ["build", "first_difference", "nearest", "plain"]
