"""What does an optimizer step cost, beside torch.optim.SGD's own, and beside the memory it must move?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from packsaddle.compressors import RandomK, TopK
from packsaddle.optim.sgd import CompressedSGD
from packsaddle.performance.bench.result import Result, machine
from packsaddle.performance.timing import copy_bandwidth, side_by_side

_LR = 1e-6


@dataclass(frozen=True)
class Contender:
    """An optimizer, and the bytes that a step of it has to move for each coordinate: its floor."""

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    moved: float
    own_memory: bool = True  # else the gradients are the memory, and stay where they are


def _ours(**settings: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return partial(CompressedSGD, lr=_LR, **settings)


# A float read or written is 4 bytes. SGD reads x and the gradient and writes x; an error memory likewise. Of k
# coordinates kept, the memory and x are read and written; the message is written and read.
_CONTENDERS: Mapping[str, Contender] = {
    "torch.optim.SGD": Contender(partial(torch.optim.SGD, lr=_LR), 12),
    "RandomK 1%": Contender(_ours(compressor=RandomK(0.01)), 12 + 0.01 * 24),
    "RandomK 1%, max_skipped=None": Contender(_ours(compressor=RandomK(0.01), max_skipped=None), 12 + 0.01 * 24),
    "RandomK 1%, noise": Contender(_ours(compressor=RandomK(0.01), noise=0.01), 12 + 0.01 * 32),
    'RandomK 1%, noise, memory="gradient"': Contender(
        _ours(compressor=RandomK(0.01), noise=0.01, memory="gradient"), 0.01 * 32, own_memory=False
    ),
    'RandomK 1%, noise, memory="gradient", max_skipped=None': Contender(
        _ours(compressor=RandomK(0.01), noise=0.01, memory="gradient", max_skipped=None), 0.01 * 32, own_memory=False
    ),
    "TopK 0.1%": Contender(_ours(compressor=TopK(0.001)), 16 + 0.001 * 24),
    "TopK 0.1%, noise": Contender(_ours(compressor=TopK(0.001), noise=0.01), 24 + 0.001 * 24),
    'TopK 0.1%, memory="gradient"': Contender(
        _ours(compressor=TopK(0.001), memory="gradient"), 4 + 0.001 * 24, own_memory=False
    ),
}


def run(d: int, repeats: int, layers: int = 1) -> list[Result]:
    """Time step() + zero_grad() on d coordinates in `layers` parameters. Raises ValueError for bad sizes."""
    if d < 1000:
        raise ValueError(f"d must be at least 1,000 coordinates, got {d}")
    if not 1 <= layers <= d // 1000:
        raise ValueError(f"layers must be between 1 and {d // 1000}, a thousand coordinates each, got {layers}")
    torch.set_num_threads(1)
    steppers = {name: Stepper(contender, d, layers) for name, contender in _CONTENDERS.items()}
    bandwidth = copy_bandwidth(d)
    times = side_by_side(steppers, repeats=repeats, warm_up=2)
    sgd = times["torch.optim.SGD"].median
    rows = [
        {
            "optimizer": name,
            "ms": 1000 * t.median,
            "low": 1000 * t.low,
            "high": 1000 * t.high,
            "/ SGD": t.median / sgd,
            "/ copy": t.median * bandwidth / (8 * d),
            "/ floor": t.median * bandwidth / (_CONTENDERS[name].moved * d),
            "memory / d": steppers[name].held() / (4 * d),
        }
        for name, t in times.items()
    ]
    setting = {"d": d, "parameters": layers, "copy GB/s": bandwidth / 1e9, **machine()}
    notes = (
        "floor: the bytes that must be moved, at the bandwidth of a copy; memory: held over the model and its gradient",
        "max_skipped=None: gradients are not looked at, and no step can be left out",
        'with memory="gradient" backward() adds to the gradients where it would have put them, which is its cost',
    )
    return [Result("step() and zero_grad(): what does an optimizer's own work cost?", setting, rows, notes)]


class Stepper:
    """An optimizer with parameters of its own; called, it steps and clears the gradients."""

    def __init__(self, contender: Contender, d: int, layers: int) -> None:
        sizes = [d // layers // 1000 * 1000] * layers
        self._weights = [nn.Parameter(torch.zeros(size // 1000, 1000)) for size in sizes]
        rng = torch.Generator().manual_seed(0)
        self._gradients = [torch.randn(w.shape, generator=rng) for w in self._weights]
        for w, gradient in zip(self._weights, self._gradients, strict=True):
            w.grad = gradient
        self._optimizer = contender.make(self._weights)
        self._clears = contender.own_memory

    def __call__(self) -> None:
        if not self._clears:
            self._optimizer.step()
            return
        for w, gradient in zip(self._weights, self._gradients, strict=True):
            w.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def held(self) -> int:
        """Bytes of the optimizer's state that are neither parameters nor gradients."""
        counted = {t.untyped_storage().data_ptr() for w in self._weights for t in (w, w.grad) if t is not None}
        held = 0
        for state in self._optimizer.state.values():
            for tensor in state.values():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in counted:
                    counted.add(storage.data_ptr())
                    held += storage.nbytes()
        if isinstance(self._optimizer, CompressedSGD):
            held += self._optimizer.spare_bytes
        return held
