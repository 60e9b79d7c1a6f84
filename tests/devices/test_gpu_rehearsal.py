"""A rehearsal of `make gpu`: its parts of one process run on the pretended device, where it counts the host's waits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretended_device import start

Rows = dict[str, dict[str, Any]]


def _parts(library: Path) -> dict[str, Rows]:
    device = start("cuda", library)
    from lab.bench import gpu

    def counted(_: str, work: Callable[[], object]) -> dict[str, float]:
        with device.record() as log:
            work()
        return {"waits": log.total("wait"), "launches": log.launches}

    gpu.counted = counted  # which reads torch's own counters of a CUDA build
    return {
        "waits": gpu.waits("cuda"),
        "steps": gpu.steps("cuda", 5000, 1),
        "packing": gpu.packing("cuda", 5000, 1),
    }


def test_the_parts_of_one_process(in_child: Callable[..., list[Any]], library: Path) -> None:
    (found,) = in_child(_parts, library)
    for part in ("steps", "packing"):
        assert {name: row for name, row in found[part].items() if "failed" in row} == {}
        assert all(0 < row["low"] <= row["copies"] <= row["high"] for row in found[part].values())
    waits = {name: row["waits"] for name, row in found["waits"].items()}
    assert waits["SGD, fused"] == waits["AdamW, fused"] == waits["a step between two rounds of local updates"] == 0
    assert waits["AdamW, fused, and a round of local updates"] == 1
    assert waits["CompressedSGD RandomK(ratio=0.01)"] == 1
    assert all(row["launches"] > 0 for row in found["waits"].values())
