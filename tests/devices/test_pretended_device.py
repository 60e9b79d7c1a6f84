"""Does the pretended device find the faults that the other tests of this folder look for?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import FAULTS, Kind, start


def _planted(kind: Kind, library: Path) -> dict[str, list[str]]:
    """Return the events of small programs on the device, by name."""
    device = start(kind, library)
    x, found = torch.ones(4, device=kind), {}

    def beside(*, begins_after: bool, ends_before: bool, records: bool = False, frees: bool = False) -> None:
        """Compute 2 z on another stream, and then on this one with the result, or with the memory of z."""
        now, stream, z = torch.accelerator.current_stream(), torch.Stream(kind), torch.ones(4, device=kind)
        if begins_after:
            stream.wait_stream(now)
        torch.accelerator.set_stream(stream)
        y = z * 2
        torch.accelerator.set_stream(now)
        if records:
            z.record_stream(stream)
        if ends_before:
            now.wait_stream(stream)
        if frees:
            del z
            torch.zeros(4, device=kind)
        else:
            y.add_(1)

    def pinned(*, waits: bool) -> None:
        memory = torch.zeros(4).pin_memory()
        x.copy_(memory, non_blocking=True)
        if waits:
            torch.accelerator.synchronize()
        memory.fill_(1.0)
        torch.accelerator.synchronize()

    programs: dict[str, Callable[[], object]] = {
        "item": x.sum().item,
        "bool": lambda: bool(x.all()),
        "nonzero": x.nonzero,
        "mask": lambda: x[x > 0],
        "copy to the device": lambda: torch.tensor([1, 2], device=kind),
        "copy to the host": x.cpu,
        "synchronize": torch.accelerator.synchronize,
        "no wait": lambda: (x + x.sum()).to(torch.int64).clamp(1).float(),
        "no wait: number by mask": lambda: x.masked_fill_(x > 9, 1.0),
        "no wait: pinned": lambda: torch.ones(2).pin_memory().to(kind, non_blocking=True),
        "no fault": lambda: beside(begins_after=True, ends_before=True),
        "race: no wait at the begin": lambda: beside(begins_after=False, ends_before=True),
        "race: no wait at the end": lambda: beside(begins_after=True, ends_before=False),
        "freed too early": lambda: beside(begins_after=True, ends_before=False, frees=True),
        "no fault: record_stream": lambda: beside(begins_after=True, ends_before=False, records=True, frees=True),
        "no fault: waits before freeing": lambda: beside(begins_after=True, ends_before=True, frees=True),
        "race: pinned": lambda: pinned(waits=False),
        "no fault: pinned": lambda: pinned(waits=True),
    }
    for name, program in programs.items():
        torch.accelerator.synchronize()
        with device.record() as log:
            program()
        found[name] = log.lines("wait", *FAULTS)
    return found


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_planted_faults_are_found(kind: Kind, in_child: Callable[..., list[Any]], library: Path) -> None:
    (found,) = in_child(_planted, kind, library)
    for name, lines in found.items():
        kinds = {line.split(" x ")[1].split(":")[0] for line in lines}
        if name.startswith("no wait"):
            assert not kinds, (name, lines)
        elif name.startswith("no fault"):
            assert kinds <= {"wait"}, (name, lines)
        elif name.startswith(FAULTS):
            assert name.split(":")[0] in kinds, (name, lines)
        else:
            assert kinds == {"wait"}, (name, lines)
            assert lines[0].startswith("1 x "), (name, lines)
