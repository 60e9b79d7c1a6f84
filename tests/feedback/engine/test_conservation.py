"""Nothing is lost, on any front: y, x less all that is unsent, moves as in SGD without compression.

y_T = y_0 - lr mean_i sum_t grad F_i(x_t^i), with the gradients of a network of the test's own at each worker's x.
Every compressor and exchange is tried in tests/comm/test_aggregators.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from fronts import LR, batch, flat, made, mean, network, parameters_of
from torch import Tensor

from packsaddle import QSGD, Identity, LinearSketch, LowRank, RandomK, SharedTopK, Sign, SketchTopK, TopK

COMMON: dict[str, dict[str, Any]] = {
    "TopK": {},
    "RandomK": {"compressor": RandomK(0.1)},
    "QSGD": {"compressor": QSGD()},
    "two-way": {"exchange": "two-way"},
    "SharedTopK": {"compressor": SharedTopK(0.1)},
}
FURTHER: dict[str, dict[str, Any]] = {
    "LowRank": {"compressor": LowRank(1)},
    "Sign": {"compressor": Sign()},
    "SketchTopK": {"compressor": SketchTopK(0.1)},
    "LinearSketch": {"compressor": LinearSketch(0.4)},
    "coordinator": {"exchange": "coordinator", "back": TopK(0.2)},
    "uncompressed": {"compressor": Identity()},
}
WAYS = {
    "CompressedSGD": {name: COMMON[name] for name in ("TopK", "QSGD")},
    "DDP by buckets": {**COMMON, "LowRank": FURTHER["LowRank"]},
    "FSDP": COMMON,
    "local": COMMON | FURTHER,
    "local, two optimizers": {name: COMMON[name] for name in ("TopK", "two-way")},
    "local overlapped": COMMON,
    "elastic": {name: COMMON[name] for name in ("TopK", "RandomK", "QSGD", "two-way")},
}


def trained(front: str, way: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y, and y_0 less the sum of all workers' own steps."""
    one, twin = made(front, **WAYS[front][way]), network()
    expected = one.y()
    for t in range(12):
        for p, now in zip(twin.parameters(), one.parameters(), strict=True):
            p.data.copy_(now)
        data = batch(t)
        gradients = torch.autograd.grad((twin(data) - data).square().mean(), list(twin.parameters()))
        expected -= LR * mean(flat(list(gradients)))
        one.step(t)
    return one.x(), one.y(), expected


@parameters_of(WAYS)
def test_nothing_is_lost(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    found = on_workers(trained, front, way)
    for x, y, expected in found:
        assert torch.equal(x, found[0][0])
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
        assert bool((x - y).abs().max() > 1e-6) == (way != "uncompressed")
