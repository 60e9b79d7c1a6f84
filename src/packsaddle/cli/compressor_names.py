"""Parsing of --compressor and --ratio in `packsaddle plan`: a name such as topk, or a call such as TopK(0.01)."""

from collections.abc import Callable, Mapping

from packsaddle import compressors
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import parse_compressor
from packsaddle.errors import ConfigError, config_errors
from packsaddle.options.schema import nearest

WITH_RATIO: Mapping[str, Callable[[float], Compressor]] = {
    "randomk": compressors.RandomK,
    "topk": compressors.TopK,
    "sketchtopk": compressors.SketchTopK,
    "sharedtopk": compressors.SharedTopK,
    "linearsketch": compressors.LinearSketch,
    "adaptivetopk": compressors.AdaptiveTopK,
}
FIXED: Mapping[str, Compressor] = {
    "identity": compressors.Identity(),
    "sign": compressors.Sign(),
    "rounded": compressors.Rounded(),
    "qsgd": compressors.QSGD(),
    "lowrank": compressors.LowRank(),
}


def check_name(name: str) -> None:
    names = ["best", *WITH_RATIO, *FIXED]
    if name not in names:
        raise ConfigError(f"compressor must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}")


def called(text: str, ratio: float | None) -> Compressor:
    """Return the compressor that a call such as "TopK(0.01)" makes. Raises ConfigError if invalid, or with a ratio."""
    if ratio is not None:
        raise ConfigError(f"ratio is for a compressor by name, got compressor {text!r}")
    with config_errors():
        return parse_compressor(text)
