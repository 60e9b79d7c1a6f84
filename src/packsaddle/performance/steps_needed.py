"""Steps to the loss of dense training, by optimizer and compressor, as multiples of dense training's: measurements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from packsaddle.compressors import QSGD, Compressor, Identity, LowRank, RandomK, Sign, TopK

Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class StepsNeeded:
    """A multiple of dense training's steps, each method at its best learning rate."""

    factor: float
    at_least: bool = False  # where the measurement ended before the loss was reached


# sgd: experiments/char-transformer (30 passes); adamw: experiments/adamw (800 steps, three seeds).
MEASURED: Mapping[Optimizer, Mapping[Compressor, StepsNeeded]] = {
    "sgd": {TopK(0.01): StepsNeeded(1.0), RandomK(0.01): StepsNeeded(2.0)},
    "adamw": {
        TopK(0.1): StepsNeeded(1.3),
        LowRank(4): StepsNeeded(1.3),
        TopK(0.01): StepsNeeded(2.0),
        RandomK(0.1): StepsNeeded(4.0, at_least=True),
        QSGD(): StepsNeeded(4.0, at_least=True),
        Sign(): StepsNeeded(4.0, at_least=True),
    },
}


def steps_needed(compressor: Compressor, optimizer: Optimizer | None) -> StepsNeeded | None:
    """Return what was measured, None if nothing was; without an optimizer steps count alike."""
    if optimizer is None or isinstance(compressor, Identity):
        return StepsNeeded(1.0)
    return MEASURED[optimizer].get(compressor)
