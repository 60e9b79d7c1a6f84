"""The list of all compressors, and a compressor in short and in plain types."""

from dataclasses import fields, is_dataclass
from typing import Any

from packsaddle.compressors.base import Compressor
from packsaddle.compressors.low_rank import LowRank
from packsaddle.compressors.quantized import QSGD, Sign
from packsaddle.compressors.shared import SharedTopK
from packsaddle.compressors.sketched import LinearSketch, SketchTopK
from packsaddle.compressors.sparse import AdaptiveTopK, Identity, RandomK, TopK
from packsaddle.compressors.stages import Stages

_SHARE = 0.5


def compressors(ratio: float) -> list[Compressor]:
    """Return every compressor, those that have a ratio at this one. Raises ValueError for a ratio outside (0, 1]."""
    return [
        Identity(),
        RandomK(ratio),
        RandomK(ratio, block_size=1),
        RandomK(ratio, values="bfloat16"),
        TopK(ratio),
        TopK(ratio, values="int8"),
        TopK(ratio, values="int2", chunk=4096),
        AdaptiveTopK(_SHARE),
        SharedTopK(ratio),
        SketchTopK(ratio),
        LinearSketch(ratio),
        Sign(),
        Stages(Sign()),
        QSGD(),
        LowRank(),
    ]


def describe(compressor: Compressor) -> str:
    """The compressor with those of its fields that are not at their defaults."""
    assert is_dataclass(compressor)
    changed = [f for f in fields(compressor) if getattr(compressor, f.name) != f.default]
    values = [getattr(compressor, f.name) for f in changed]
    shown = [f"{f.name}={_described(value)}" for f, value in zip(changed, values, strict=True)]
    return f"{type(compressor).__name__}({', '.join(shown)})"


def _described(value: Any) -> str:
    if isinstance(value, Compressor):
        return describe(value)
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def identify(compressor: Compressor) -> dict[str, Any]:
    """Return a compressor's name (its `kind` in a configuration) and parameters, in plain types, for a saved state."""
    names: list[str] = []
    if is_dataclass(compressor):
        names = [f.name for f in fields(compressor) if not f.metadata.get("internal")]
    return {"kind": type(compressor).__name__} | {name: _plain(getattr(compressor, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Compressor):
        return identify(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value)  # not numpy's
    return value if isinstance(value, str | int | None) else repr(value)
