"""Workers must have been given the same arguments: said at the start, not found out by drifting apart."""

import re
import sys
from collections.abc import Mapping
from itertools import zip_longest

import torch

from packsaddle.channel import Channel


def check_agreement(channel: Channel, arguments: Mapping[str, object], device: torch.device) -> None:
    """Raise ValueError on every worker, naming the first argument that differs and the workers; collective."""
    if channel.group.size == 1:
        return
    arguments = {"packsaddle": sys.modules["packsaddle"].__version__, **arguments}
    text = "\n".join(f"{name}={value!r}" for name, value in arguments.items())
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # where an object lies is each process's own matter
    parts = {"text": torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)}
    gathered = channel.gather(parts, fixed_size=False, purpose="start")
    texts = [bytes(p["text"].tolist()).decode().split("\n") for p in gathered]
    for lines in zip_longest(*texts, fillvalue="nothing more"):
        for worker, line in enumerate(lines):
            if line != lines[0]:
                ours, theirs = f"worker 0 has {lines[0]}", f"worker {worker} has {line}"
                raise ValueError(f"workers must be given the same arguments, but {ours} and {theirs}")
