"""Options: dataclasses built from saved data (start with `schema`), and parsing of numbers with units (`numerals`)."""

from packsaddle.options.schema import build, nearest

__all__ = ["build", "nearest"]
