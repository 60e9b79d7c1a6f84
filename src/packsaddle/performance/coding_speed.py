"""How long this machine takes to code messages: measured at two lengths, and for others on the line through them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Work
from packsaddle.compressors import Compressor
from packsaddle.performance.timing import side_by_side

_SHORT = 4096  # coordinates; about where what a call costs by itself outweighs what coordinates cost
_LONG = 1 << 25  # longer vectors are extrapolated to


@dataclass(frozen=True)
class Line:
    """Seconds as a function of the number of coordinates."""

    fixed: float
    per_coordinate: float

    @classmethod
    def through(cls, a: tuple[int, float], b: tuple[int, float]) -> "Line":
        """Return the line through two points (coordinates, seconds), of equal coordinates: through the second and 0."""
        slope = (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else b[1] / b[0]
        slope = max(0.0, slope)
        return cls(max(0.0, b[1] - slope * b[0]), slope)

    def at(self, coordinates: int) -> float:
        return self.fixed + self.per_coordinate * coordinates


@dataclass(frozen=True)
class Pace:
    """Seconds of one call: `encode` a vector, `decode` what was sent, `add` a message whose context is known."""

    encode: Line
    decode: Line
    add: Line

    def seconds(self, work: Work) -> float:
        """Return the seconds of a piece of work of this compressor."""
        n = work.coordinates
        return work.encode * self.encode.at(n) + work.decode * self.decode.at(n) + work.add * self.add.at(n)


def measure(compressor: Compressor, d: int, *, repeats: int = 5, device: torch.device | str = "cpu") -> Pace:
    """Time a compressor on Gaussian vectors of d coordinates and of a few, with the threads that torch has.

    Medians of `repeats`, with few-coordinate versions of it for short vectors. Raises ValueError if it cannot act on d.
    """
    compressor.validate(d)
    lengths = (min(d, _SHORT), min(d, _LONG))
    works: dict[str, Callable[[], object]] = {}
    for n in lengths:
        for name, work in _works(compressor.restrict(n, d), n, device).items():
            works[f"{name} {n}"] = work
    times = side_by_side(works, repeats=repeats)
    lines = {
        name: Line.through(*((n, times[f"{name} {n}"].median) for n in lengths)) for name in ("encode", "decode", "add")
    }
    return Pace(**lines)


def _works(compressor: Compressor, n: int, device: torch.device | str) -> Mapping[str, Callable[[], object]]:
    v = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    out, message = torch.zeros_like(v), compressor.encode(v, seed=0, step=0)

    def decode(out: Tensor = out) -> None:
        # With a context, so that what only the sender is spared is paid here.
        compressor.add_decoded(compressor.receive(message.parts, n, seed=0, step=0), out, 1e-6)

    return {
        "encode": lambda: compressor.encode(v, seed=0, step=0),
        "decode": decode,
        "add": lambda: compressor.add_decoded(message, out, 1e-6),
    }
