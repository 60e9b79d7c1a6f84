"""What does an optimizer step cost, beside torch.optim.SGD's own, and beside the memory it must move?"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from packsaddle.bench.result import Result, machine
from packsaddle.bench.timing import copy_bandwidth, side_by_side
from packsaddle.compress import RandomK, TopK
from packsaddle.optimizer import CompressedSGD


def run(d: int, repeats: int) -> list[Result]:
    """Time step() + zero_grad() on one parameter of d coordinates. Raises ValueError if d is too small."""
    if d < 1000:
        raise ValueError(f"d must be at least 1,000 coordinates, got {d}")
    torch.set_num_threads(1)
    works = {name: _stepper(make, d) for name, make in _OPTIMIZERS.items()}
    bandwidth = copy_bandwidth(d)
    times = side_by_side(works, repeats=repeats)
    sgd = times["torch.optim.SGD"].median
    floor = 12 * d / bandwidth  # SGD reads x and the gradient, and writes x
    rows = [
        {
            "optimizer": name,
            "ms": 1000 * t.median,
            "low": 1000 * t.low,
            "high": 1000 * t.high,
            "/ SGD": t.median / sgd,
            "/ copy": t.median * bandwidth / (8 * d),
        }
        for name, t in times.items()
    ]
    setting = {"d": d, "copy GB/s": bandwidth / 1e9, "SGD / floor": sgd / floor, **machine()}
    return [Result("step() and zero_grad(): what does an optimizer's own work cost?", setting, rows)]


_OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "torch.optim.SGD": lambda ps: torch.optim.SGD(ps, 1e-6),
    "RandomK 1%": lambda ps: CompressedSGD(ps, 1e-6, compressor=RandomK(0.01)),
    "RandomK 1%, noise": lambda ps: CompressedSGD(ps, 1e-6, compressor=RandomK(0.01), noise=0.01),
    "TopK 0.1%": lambda ps: CompressedSGD(ps, 1e-6, compressor=TopK(0.001)),
}


def _stepper(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], d: int) -> Callable[[], None]:
    weight = nn.Parameter(torch.zeros(d // 1000, 1000))
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer = make([weight])

    def step() -> None:
        weight.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step
