"""Messages that a device finds invalid."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pretended_device import FAULTS, start

from packsaddle import QSGD, CompressedSGD, Compression, Compressor, TopK
from packsaddle.comm.communicator import Communicator, Parts

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
