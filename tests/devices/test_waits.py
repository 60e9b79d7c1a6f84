"""The number of times that the host waits for a device: a table that may only shrink.

While the host waits, it launches no kernels, and the device runs dry. So an optimizer's step should wait at most once,
to read whether the exchange is applied, and a step between two rounds never. What torch's own optimizers and wrappers
do stands beside it. A wait for a copy after which the device has more to do does not count.
"""

from collections.abc import Callable

import pytest
from device_trainings import Key, Outcome

from packsaddle.compressors import compressors, describe

Outcomes = dict[Key, Outcome]
Waits = int | tuple[int, ...]
NEVER = ("torch: SGD", "torch: AdamW", "torch: DDP", "torch: FSDP2", "DDP hook, uncoded", "DDP hook, RandomK")
HOOKS = (
    *("DDP hook", "DDP hook, unprotected", "DDP hook, find_unused_parameters", "DDP hook, TopK model"),
    "FSDP hook",
)
ONCE = ("", ", noise", ", momentum", ", SharedTopK", ", TopK", ", TopK two-way", ", QSGD uncoded", ", LowRank")
ROUNDS = ("", ", fused", ", capturable", ", Muon and AdamW", ", outer", ", mean_momentum", ", clip", ", TopK int2")
OVERLAPS = ("", " agreement", " TopK int2")
# Two workers of an NCCL group: waits in each step, or in each step of a round, and in the flush after it.
STEPS: dict[str, Waits] = {
    **dict.fromkeys((*NEVER, *HOOKS, "FSDP hook, uncoded"), 0),
    **dict.fromkeys((*(f"CompressedSGD{options}" for options in ONCE), "torch: DDP, GradScaler"), 1),
    "CompressedSGD, QSGD": 4,
    **dict.fromkeys((f"LocalUpdates{options}" for options in ROUNDS), (0, 0, 0, 1, 1)),
    "LocalUpdates, elastic": (0, 0, 0, 4, 4),
    "LocalUpdates, GradScaler": (1, 1, 1, 2, 1),
    "LocalUpdates, Sign two-way": (0, 0, 0, 1, 2),
    **dict.fromkeys((f"LocalUpdates, overlap{options}" for options in OVERLAPS), (0, 1, 0, 0, 2)),
    "LocalUpdates, overlap fragments": (1, 0, 1, 0, 3),
    **dict.fromkeys(("DDP hook, coded", "DDP hook, GradScaler"), 3),
    "FSDP hook, coded": 9,
}
# The same over gloo for CPU tensors and NCCL for the device's.
MIXED_STEPS: dict[str, Waits] = dict.fromkeys((f"LocalUpdates, offload{o}" for o in ("", " overlap")), (0, 0, 0, 1, 3))
# One worker: a message encoded and decoded, and other programs. Those of other compressors never wait.
PROGRAMS: dict[str, Waits] = dict.fromkeys(map(describe, compressors(0.05)), 0) | {
    **dict.fromkeys((f"TopK(ratio=0.05{o})" for o in ("", ", values='int8'", ", values='int2', chunk=4096")), 1),
    "AdaptiveTopK(share=0.5)": 36,
    "QSGD()": 8,
    "QSGD(levels=127)": 3,
    "certify": 84,
    "RandomK without numba": 2,
}


def check(found: Outcome, expected: Waits) -> None:
    waits = tuple(found.waits) if len(set(found.waits)) > 1 else found.waits[0]
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
