"""The table of all compressors, from packsaddle.compressors.registry; numbers are computed, not measured."""

import dataclasses
import inspect

from generated import table
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor, Sign
from packsaddle.compressors.registry import SUMMARIES

_D, _WORKERS, _RATIO = 1_000_000, 4, 0.01


def markdown() -> str:
    """Return the table: arguments, bound, message, exchange, and bytes in one setting."""
    rows = []
    for cls, about in SUMMARIES.items():
        c = _example(cls)
        choice = choose(c, "direct", d=_D, dense=0, workers=_WORKERS)
        sent = choice.aggregator.wire(_D, 0, 1, _WORKERS, 4).sent
        linear = "yes" if c.linear else "no"
        rows.append(
            [f"`{cls.__name__}({_arguments(cls)})`", about.mu, about.message, linear, choice.name, f"{sent / 1e3:,.1f}"]
        )
    setting = f"kB: sent by each of {_WORKERS} workers in a step, for {_D:,} coordinates and a ratio of {_RATIO:.0%}."
    return table(["compressor", "mu", "message", "linear", "averaged by", "kB"], rows) + f"\n\n{setting}"


def _example(cls: type[Compressor]) -> Compressor:
    parameters = inspect.signature(cls).parameters
    if "ratio" in parameters:
        return cls(ratio=_RATIO)  # type: ignore[call-arg]
    if "share" in parameters:
        return cls(share=0.5)  # type: ignore[call-arg]
    return cls(Sign()) if "compressor" in parameters else cls()  # type: ignore[call-arg]


def _arguments(cls: type[Compressor]) -> str:
    assert dataclasses.is_dataclass(cls)
    shown = [f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("internal")]
    return ", ".join(f.name if f.default in (None, dataclasses.MISSING) else f"{f.name}={f.default!r}" for f in shown)
