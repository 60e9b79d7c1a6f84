"""A rehearsal of `make gpu`: its parts run on the pretended device, where it counts the host's waits.

The parts of two processes get the environment of a launcher, and a device each; gloo plays NCCL.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pretended_device import FAULTS, start

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
        "waits": gpu.waits("cuda", 20_000),
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


def _parts_of_two(library: Path, folder: Path) -> tuple[dict[str, Rows], list[str], list[str]]:
    """Return the rows by part, NCCL's collectives, and the faults, of which gloo with the device's tensors is one."""
    device, rank = start("cuda", library, devices=2), dist.get_rank()
    from lab.bench import gpu

    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = torch.tensor([free.getsockname()[1] for free in (one, other)])
        dist.broadcast(ports, 0)
    dist.destroy_process_group()
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}
    found = dict[str, Rows]()
    with device.record() as log:
        for port, part in zip(ports.tolist(), ("trained", "exchanged"), strict=True):
            os.environ["MASTER_PORT"] = str(port)
            found[part] = getattr(gpu, part)("cuda", *((5000, 1) if part == "exchanged" else ()))
    dist.init_process_group("gloo", init_method=f"file://{folder}/after", rank=rank, world_size=2)  # the caller ends it
    waits = [line for line in log.lines("wait", "background wait") if "gloo on the device" in line]
    return found, log.lines("collective"), waits + log.lines(*FAULTS)


def test_the_parts_of_two_processes(in_child: Callable[..., list[Any]], library: Path, tmp_path: Path) -> None:
    for found, collectives, faults in in_child(_parts_of_two, library, tmp_path, workers=2):
        assert collectives
        assert not faults, "\n".join(faults)
        assert found["trained"].keys() == {"hook", "local updates"}
        assert all(row["one model"] and row["last loss"] < row["first loss"] for row in found["trained"].values())
        assert found["exchanged"].keys() == {"copy", "all-reduce", "SGD's step and a round of local updates"}
        assert all(0 < row["low"] <= row["copies"] <= row["high"] for row in found["exchanged"].values())
