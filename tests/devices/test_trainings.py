"""Trainings on a pretended device are those on the CPU, bit for bit, without a race of streams or an early free."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from device_trainings import ALONE, GLOO, HOOKS, LOCALS, MIXED, OPTIMIZERS, STAGED, Key, Outcome

from packsaddle.compressors import compressors, describe

Outcomes = dict[Key, Outcome]
TRAININGS = [*OPTIMIZERS, *LOCALS, *HOOKS]
PROGRAMS = [*ALONE, *map(describe, compressors(0.05)), "RandomK without numba", "certify", "checkpoint"]
DRAWS_OTHERWISE = ("CompressedSGD, LowRank", "LowRank()")  # Q from the device's generator
# Its steps compute with tensors in place of numbers; NCCL averages where gloo adds.
ROUNDS_OTHERWISE = ("LocalUpdates, capturable", "torch: FSDP2")
# Not bitwise equal on MPS, which has float32 in place of float64: sums, and levels that are rounded at random.
ROUNDS_ON_MPS = (
    *("CompressedSGD, noise", "LocalUpdates", "LocalUpdates, Muon and AdamW", "LocalUpdates, overlap", "Rounded()"),
    *("CompressedSGD, QSGD uncoded", "LocalUpdates, clip", "LocalUpdates, overlap fragments"),
    *("TopK(ratio=0.05, values='int2', chunk=4096)", "LocalUpdates, TopK int2", "QSGD()", "QSGD(levels=127)"),
)
# Workers without an exchange, and workers with a part of the parameters each.
UNLIKE = ("torch: SGD", "torch: AdamW", "torch: FSDP2")


def check(found: Outcome, expected: Outcome, name: str, others: Sequence[str] = ROUNDS_OTHERWISE) -> None:
    assert not expected.error
    assert not found.error
    assert not found.faults, "\n".join(found.faults)
    assert found.x.isfinite().all()
    if name in others:
        assert (found.x - expected.x).norm() <= 1e-3 * expected.x.norm()
    elif name not in DRAWS_OTHERWISE:
        assert torch.equal(found.x, expected.x)


def params(first: str, names: Iterable[str]) -> list[tuple[str, str]]:
    return [(first, name) for name in names]


def check_both(found: list[Outcomes], backend: str, name: str, others: Sequence[str] = ROUNDS_OTHERWISE) -> None:
    first, second = found
    check(first[backend, name], first["cpu", name], name, others)
    check(second[backend, name], second["cpu", name], name, others)
    if name not in UNLIKE:
        assert torch.equal(first[backend, name].x, second[backend, name].x)


@pytest.mark.parametrize(
    ("backend", "name"), [*params("nccl", TRAININGS), *params("mixed", MIXED), *params("gloo", GLOO)]
)
def test_two_workers_train_as_on_the_cpu(backend: str, name: str, together: Callable[[str], list[Outcomes]]) -> None:
    check_both(together("cuda"), backend, name)


@pytest.mark.parametrize(("kind", "name"), [*params("xpu", STAGED), *params("mps", STAGED)])
def test_two_workers_of_other_devices(kind: str, name: str, together: Callable[[str], list[Outcomes]]) -> None:
    check_both(together(kind), "gloo", name, ROUNDS_ON_MPS if kind == "mps" else ())


# torch has no capturable AdamW on MPS.
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("cuda", "xpu", "mps") for name in PROGRAMS if kind != "mps" or "capturable" not in name],
)
def test_one_worker_trains_as_on_the_cpu(kind: str, name: str, alone: Callable[[str], Outcomes]) -> None:
    found = alone(kind)
    others = ROUNDS_ON_MPS if kind == "mps" else ROUNDS_OTHERWISE
    check(found[kind, name], found["cpu", name], name, others)
