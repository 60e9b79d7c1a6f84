"""Compressors that change along a run: gentle at first, when gradients change fastest."""

from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from packsaddle.compressors.base import Compressor, check_share


@dataclass(frozen=True)
class RatioRamp:
    """The compressor for a step: its ratio falls geometrically from `first` to the compressor's own at step `stop`.

    Deep Gradient Compression (Lin et al. 2018, section 3.3) warms up so, from 25% over the first epochs. Raises
    ValueError if the compressor has no ratio, or `first` is below it or above 1.
    """

    compressor: Compressor
    stop: int
    first: float = 0.25

    def __post_init__(self) -> None:
        ratio = getattr(self.compressor, "ratio", None)
        if not (is_dataclass(self.compressor) and isinstance(ratio, float)):
            raise ValueError(
                f"compressor of RatioRamp must have a ratio, as RandomK(0.01) has, got {self.compressor!r}"
            )
        check_share("first of RatioRamp", self.first, "it is a share of the coordinates, and 1% is 0.01")
        if ratio > self.first:
            raise ValueError(f"first of RatioRamp must be between the ratio {ratio:g} and 1, got {self.first}")
        if self.stop < 1:
            raise ValueError(f"stop of RatioRamp must be at least 1 step, got {self.stop}")

    def __call__(self, step: int) -> Compressor:
        if step >= self.stop:
            return self.compressor
        compressor: Any = self.compressor
        ratio = self.first * (compressor.ratio / self.first) ** (step / self.stop)
        changed: Compressor = replace(compressor, ratio=ratio)
        return changed
