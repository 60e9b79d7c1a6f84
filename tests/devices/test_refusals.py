"""Texts of the errors for tensors on devices where they cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretended_device import start

from packsaddle import CompressedSGD, LocalUpdates
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
