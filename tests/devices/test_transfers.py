"""Numbers that are read from a device, and how often the host waits for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretended_device import start

from packsaddle.numerics.devices import Readback, read


def _read(library: Path) -> list[Any]:
    device = start("cuda", library)
    tensors = [
        torch.tensor([True, False, True]),
        torch.tensor(1 / 3, dtype=torch.float64),
        torch.tensor([[2**40, -1]]),
        torch.tensor([1e-8, -0.5]),
        torch.zeros(0),
    ]
    there = [tensor.to("cuda") for tensor in tensors]
    with device.record() as log:
        assert read(*there) == read(*tensors) == [tensor.tolist() for tensor in tensors]
    found = [log.total("wait")]
    with device.record() as log:
        begun = Readback(there[2])
        there[2].add_(1)
        assert begun.tolist() == [[2**40, -1]]
    return [*found, log.total("wait"), log.total("busy wait")]


def test_the_host_waits_once_for_all_tensors(in_child: Callable[..., list[Any]], library: Path) -> None:
    assert in_child(_read, library) == [[1, 0, 1]]
