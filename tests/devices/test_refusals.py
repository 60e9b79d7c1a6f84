"""Tensors on devices where they cannot be, and messages that a device finds invalid."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pretended_device import FAULTS, start

from packsaddle import QSGD, CompressedSGD, Compression, Compressor, LocalUpdates, TopK
from packsaddle.comm.communicator import Communicator, Parts
from packsaddle.feedback.background import Background


def _errors(library: Path) -> dict[str, str]:
    start("cuda", library, devices=2)
    here, there, on_host = (torch.nn.Parameter(torch.zeros(64, 64, device=d)) for d in ("cuda:0", "cuda:1", "cpu"))

    def submit() -> None:
        background = Background(torch.device("cuda", 0))
        background.submit(lambda: None, [(background.promise(), torch.zeros(1))])

    programs: dict[str, Callable[[], object]] = {
        "two devices": lambda: CompressedSGD([here, there], 0.1),
        "a device and the CPU": lambda: CompressedSGD([here, on_host], 0.1),
        "local updates": lambda: LocalUpdates(torch.optim.AdamW([here, there])),
        "background": submit,
    }
    found = {}
    for name, program in programs.items():
        try:
            program()
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found


def test_errors_name_the_devices(in_child: Callable[..., list[Any]], library: Path) -> None:
    (found,) = in_child(_errors, library)
    pair = "parameter 0 is torch.float32 on cuda:0 and parameter 1 is torch.float32 on"
    assert found == {
        "two devices": f"params must share one dtype and device, but {pair} cuda:1",
        "a device and the CPU": f"params must share one dtype and device, but {pair} cpu",
        "local updates": "parameters must be on one device, but parameter 1 is on cuda:1 and others on cuda:0",
        "background": "results must be on cuda:0, and one is on cpu",
    }


# What worker 1 changes in a part of its messages, and a part of the error.
INVALID: dict[str, tuple[Compressor, str, slice]] = {
    "from worker 1 must be the gaps between": (TopK(0.1), "indices", slice(2, 9)),
    "from worker 1 must be the code of 1200 levels": (QSGD(127), "levels", slice(2, 9)),
}


def _corrupted(folder: Path, library: Path) -> list[tuple[str, bool, list[str]]]:
    """Return for each of `INVALID` the skipped step, whether x is unchanged, and the faults."""
    device, rank, gather = start("cuda", library, devices=2), dist.get_rank(), Communicator.gather
    dist.destroy_process_group()
    dist.init_process_group("nccl", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.accelerator.set_device_index(rank)
    found = []
    for compressor, part, which in INVALID.values():
        weight = torch.nn.Parameter(torch.zeros(40, 30, device="cuda"))
        opt = CompressedSGD([weight], 0.1, Compression(compressor, dense_below=0))
        weight.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(rank)).to("cuda")

        def corrupted(self: Communicator, parts: Parts, *, part: str = part, which: slice = which, **given: Any) -> Any:
            changed = {name: each.clone() for name, each in parts.items()}
            if rank == 1 and part in changed:
                changed[part][which] = 0
            return gather(self, changed, **given)

        with device.record() as log, mock.patch.object(Communicator, "gather", corrupted):
            opt.step()
        found.append((str(opt.skips[0]), not bool(weight.any()), log.lines(*FAULTS)))
    return found


def test_an_invalid_message_is_found_on_the_device(
    in_child: Callable[..., list[Any]], library: Path, tmp_path: Path
) -> None:
    for found in in_child(_corrupted, tmp_path, library, workers=2):
        for text, (skip, is_unchanged, faults) in zip(INVALID, found, strict=True):
            assert text in skip
            assert (is_unchanged, faults) == (True, [])
