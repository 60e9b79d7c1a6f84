"""Options: dataclasses built from TOML, and numbers as people write them; `schema` first."""

from packsaddle.options.schema import build, first_difference, nearest, plain

__all__ = ["build", "first_difference", "nearest", "plain"]
