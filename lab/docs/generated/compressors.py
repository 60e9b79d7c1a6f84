"""The table and the reference of all compressors, made from packsaddle.compressors.registry. Numbers are computed."""

import dataclasses

from lab.docs.generated import table
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import CLASSES, variants

_D, _WORKERS, _RATIO = 1_000_000, 4, 0.01


def markdown() -> str:
    """Return a table of all compressors: arguments, contraction mu, message, exchange, and bytes in one setting."""
    rows = []
    for name, cls in CLASSES.items():
        c = variants(cls, _RATIO)[0]
        choice = choose(c, "direct", d=_D, dense=0, workers=_WORKERS)
        sent = choice.aggregator.wire(_D, 0, 1, _WORKERS, 4).sent
        linear = "yes" if c.linear else "no"
        rows.append(
            [f"`{name}({_arguments(cls)})`", c.summary.mu, c.summary.message, linear, choice.name, f"{sent / 1e3:,.1f}"]
        )
    setting = f"kB: sent by each of {_WORKERS} workers in a step, for {_D:,} coordinates and a ratio of {_RATIO:.0%}."
    return table(["compressor", "mu", "message", "linear", "averaged by", "kB"], rows) + f"\n\n{setting}"


def classes() -> str:
    """Return the reference pages' text: a directive for each compressor's class, which inserts its docstring."""
    return "\n\n".join(["```{eval-rst}", *(f".. autoclass:: packsaddle.{name}" for name in CLASSES), "```"])


def _arguments(cls: type[Compressor]) -> str:
    assert dataclasses.is_dataclass(cls)
    shown = [f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("internal")]
    return ", ".join(f.name if f.default in (None, dataclasses.MISSING) else f"{f.name}={f.default!r}" for f in shown)
