"""Workers telling each other plain things outside of training: what they found, what went wrong, a state."""

import io
import json
from typing import Any

import torch

from packsaddle.channel import Channel
from packsaddle.exchange import Group
from packsaddle.ledger import Ledger


class Together:
    """Collectives for plain values, in no ledger; every method is collective."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self._channel = Channel(group, Ledger())

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value, as JSON carries it, by rank."""
        if self.group.size == 1:
            return [json.loads(json.dumps(value))]
        mine = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        gathered = self._channel.gather({"text": mine}, fixed_size=False)
        return [json.loads(bytes(parts["text"].tolist())) for parts in gathered]

    def send(self, content: Any, source: int) -> Any:
        """Return the source's tensors and plain types on every worker; the others' `content` is not looked at."""
        if self.group.size == 1:
            return content
        file = io.BytesIO()
        if self.group.rank == source:
            torch.save(content, file)
        (size,) = (n for n in self.gather(len(file.getbuffer())) if n)
        wire = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.group.rank == source:
            wire.copy_(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
        self.group.all_reduce(wire)  # all others have zeros
        return torch.load(io.BytesIO(wire.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
