"""The number of times that the host waits for a device: a table that may only shrink.

While the host waits, it launches no kernels, and the device runs dry. So an optimizer's step should wait at most once,
to read whether the exchange is applied, and a step between two rounds never. What torch's own optimizers and wrappers
do stands beside it. A wait for a copy after which the device has more to do does not count.
"""

from collections.abc import Callable

import pytest
from device_trainings import Key, Outcome

Outcomes = dict[Key, Outcome]
# Two workers of an NCCL group: waits in each step, or in each step of a round, and in the flush after it.
STEPS: dict[str, int | list[int]] = {
    "torch: SGD": 0,
    "torch: AdamW": 0,
    "CompressedSGD": 1,
    "CompressedSGD, noise": 1,
    "CompressedSGD, momentum": 1,
    "CompressedSGD, TopK": 5,
    "CompressedSGD, TopK two-way": 14,
    "CompressedSGD, SharedTopK": 1,
    "CompressedSGD, QSGD": 5,
    "CompressedSGD, QSGD uncoded": 1,
    "CompressedSGD, LowRank": 2,
    "LocalUpdates": [0, 0, 0, 1, 1],
    "LocalUpdates, fused": [0, 0, 0, 1, 1],
    "LocalUpdates, capturable": [0, 0, 0, 1, 1],
    "LocalUpdates, GradScaler": [1, 1, 1, 2, 1],
    "LocalUpdates, Muon and AdamW": [0, 0, 0, 1, 1],
    "LocalUpdates, outer": [0, 0, 0, 1, 1],
    "LocalUpdates, mean_momentum": [0, 0, 0, 1, 1],
    "LocalUpdates, clip": [0, 0, 0, 1, 1],
    "LocalUpdates, TopK int2": [0, 0, 0, 6, 1],
    "LocalUpdates, Sign two-way": [0, 0, 0, 1, 3],
    "LocalUpdates, overlap": [0, 1, 0, 0, 2],
    "LocalUpdates, overlap agreement": [0, 1, 0, 0, 2],
    "LocalUpdates, overlap TopK int2": [0, 1, 0, 4, 2],
    "LocalUpdates, overlap fragments": [1, 0, 1, 0, 3],
    "torch: DDP": 0,
    "torch: FSDP2": 0,
    "torch: DDP, GradScaler": 1,
    "DDP hook": 5,
    "DDP hook, unprotected": 5,
    "DDP hook, uncoded": 1,
    "DDP hook, RandomK": 1,
    "DDP hook, TopK model": 5,
    "DDP hook, GradScaler": 3,
    "FSDP hook": 13,
    "FSDP hook, uncoded": 1,
}
# The same over gloo for CPU tensors and NCCL for the device's.
MIXED_STEPS: dict[str, int | list[int]] = {
    "LocalUpdates, offload": [0, 0, 0, 1, 3],
    "LocalUpdates, offload overlap": [0, 0, 0, 1, 3],
}
# One worker: a message encoded and decoded, and other programs.
PROGRAMS = {
    "Identity()": 0,
    "RandomK(ratio=0.05)": 0,
    "RandomK(ratio=0.05, block_size=1)": 0,
    "RandomK(ratio=0.05, values='bfloat16')": 0,
    "TopK(ratio=0.05)": 3,
    "TopK(ratio=0.05, values='int8')": 3,
    "TopK(ratio=0.05, values='int2', chunk=4096)": 2,
    "AdaptiveTopK(share=0.5)": 38,
    "SharedTopK(ratio=0.05)": 0,
    "SketchTopK(ratio=0.05)": 0,
    "Sign()": 0,
    "Rounded()": 0,
    "QSGD()": 8,
    "QSGD(levels=127)": 3,
    "LinearSketch(ratio=0.05)": 0,
    "LowRank()": 0,
    "Stages(compressor=Sign())": 0,
    "certify": 68,
    "RandomK without numba": 2,
}


def check(found: Outcome, expected: int | list[int]) -> None:
    waits = found.waits if len(set(found.waits)) > 1 else found.waits[0]
    advice = "a table that may only shrink: find the new waits below, or write the smaller numbers"
    assert waits == expected, "\n".join([advice, *found.lines])


@pytest.mark.parametrize(
    ("backend", "name"), [*(("nccl", name) for name in STEPS), *(("mixed", name) for name in MIXED_STEPS)]
)
def test_waits_of_a_step(backend: str, name: str, together: Callable[[str], list[Outcomes]]) -> None:
    check(together("cuda")[0][backend, name], {"nccl": STEPS, "mixed": MIXED_STEPS}[backend][name])


@pytest.mark.parametrize("name", PROGRAMS)
def test_waits_of_a_program(name: str, alone: Callable[[str], Outcomes]) -> None:
    check(alone("cuda")["cuda", name], PROGRAMS[name])
