"""Options: dataclasses built from TOML (start with `schema`), and parsing of numbers with units (`numerals`)."""

from packsaddle.options.schema import build, nearest, plain

__all__ = ["build", "nearest", "plain"]
