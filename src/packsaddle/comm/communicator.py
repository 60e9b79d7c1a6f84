"""A group's collectives with their bytes counted, collectives for plain objects, and the check of equal arguments.

Hop factors, for W workers: a ring all-reduce of n bytes makes each worker send and receive 2 (W - 1) / W n; a ring
all-gather of n bytes each, (W - 1) n; an all-to-all, what is addressed to others; a broadcast of n bytes is counted
as n received by every worker but rank 0, which sends n to each. Objects travel outside of training and are in no
ledger.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from packsaddle.comm.group import Group
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.version import __version__

Parts = Mapping[str, Tensor]


def ring_all_reduce(payload: int, workers: int) -> Bytes:
    """Bytes of one worker in an all-reduce."""
    wire = round(2 * (workers - 1) / workers * payload)
    return Bytes(payload, wire, wire)


def ring_all_gather(payload: int, workers: int) -> Bytes:
    """Bytes of one worker in an all-gather of equal messages."""
    return Bytes(payload, (workers - 1) * payload, (workers - 1) * payload)


def star_broadcast(payload: int, rank: int, workers: int) -> Bytes:
    """Bytes of one worker in a broadcast from rank 0."""
    return Bytes(payload, payload * (workers - 1), 0) if rank == 0 else Bytes(0, 0, payload)


class Communicator:
    """A group's collectives, entered in a ledger under `step`, which the caller advances."""

    def __init__(self, group: Group, ledger: Ledger) -> None:
        self.group = group
        self.ledger = ledger
        self.step = 0

    def mean(self, tensor: Tensor, purpose: str | Mapping[str, int]) -> Tensor:
        """Average a tensor over workers in place by all-reduce, and return it.

        `purpose` is a name, or how many elements of the tensor serve which purpose.
        """
        self.group.all_reduce(tensor)
        if self.group.size > 1:
            tensor.div_(self.group.size)
        self.count_mean(tensor, purpose)
        return tensor

    def count_mean(self, tensor: Tensor, purpose: str | Mapping[str, int]) -> None:
        """Enter the bytes of a `mean`, which has been found otherwise."""
        for name, elements in ({purpose: tensor.numel()} if isinstance(purpose, str) else purpose).items():
            self._count(name, "all-reduce", ring_all_reduce(elements * tensor.element_size(), self.group.size))

    def gather(self, parts: Parts, *, fixed_size: bool, purpose: str | None = None) -> list[Parts]:
        """Return every worker's parts, by rank; names and dtypes are equal everywhere, and sizes if `fixed_size`.

        Otherwise sizes are announced first, and shorter messages are padded to the longest. Bytes are entered
        under the parts' names, "sizes" and "padding", or all under `purpose`.
        """
        wire = _join(parts)
        sizes = [_sizes(parts)] * self.group.size
        if not fixed_size:
            announced = self.group.all_gather(torch.tensor(sizes[0], device=wire.device))
            sizes = [s.tolist() for s in announced]
            self._count(purpose or "sizes", "all-gather", ring_all_gather(8 * len(parts), self.group.size))
        padding = max(map(sum, sizes)) - len(wire)
        gathered = self.group.all_gather(torch.nn.functional.pad(wire, (0, padding)))
        for name, size in zip((*parts, "padding"), (*_sizes(parts), padding), strict=True):
            self._count(purpose or name, "all-gather", ring_all_gather(size, self.group.size))
        return [_split(w, parts, s) for w, s in zip(gathered, sizes, strict=True)]

    def gather_text(self, text: str, device: torch.device, purpose: str | None = None) -> list[str]:
        """Return every worker's text, by rank."""
        parts = {"text": torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)}
        gathered = self.gather(parts, fixed_size=False, purpose=purpose)
        return [bytes(p["text"].tolist()).decode() for p in gathered]

    def exchange(self, outgoing: Sequence[Parts | None], like: Parts) -> list[Parts]:
        """Send parts to each worker (None: nothing) and return what each sent here, by rank; an all-to-all.

        `like` has the names and dtypes of parts. Sizes are announced first.
        """
        nothing = [0] * len(like)
        sizes = [nothing if parts is None else _sizes(parts) for parts in outgoing]
        device = next(iter(like.values())).device
        headers = self.group.all_to_all(
            [torch.tensor(s, device=device).view(torch.uint8) for s in sizes], [8 * len(like)] * self.group.size
        )
        incoming = [h.view(torch.int64).tolist() for h in headers]
        wires = [torch.empty(0, dtype=torch.uint8, device=device) if p is None else _join(p) for p in outgoing]
        received = self.group.all_to_all(wires, [sum(s) for s in incoming])
        others = [r for r in range(self.group.size) if r != self.group.rank]
        self._count("sizes", "all-to-all", Bytes(*(3 * [8 * len(like) * len(others)])))
        for i, name in enumerate(like):
            sent, got = (sum(s[r][i] for r in others) for s in (sizes, incoming))
            self._count(name, "all-to-all", Bytes(sum(s[i] for s in sizes), sent, got))
        return [_split(w, like, s) for w, s in zip(received, incoming, strict=True)]

    def broadcast(self, tensor: Tensor, purpose: str) -> None:
        """Replace a tensor by rank 0's, in place."""
        self.group.broadcast(tensor)
        payload = tensor.numel() * tensor.element_size()
        self._count(purpose, "broadcast", star_broadcast(payload, self.group.rank, self.group.size))

    def broadcast_parts(self, parts: Parts | None, like: Parts) -> Parts:
        """Return rank 0's parts; others pass None. `like` has the names and dtypes. Sizes are announced first."""
        device = next(iter(like.values())).device
        sizes = torch.tensor([0] * len(like) if parts is None else _sizes(parts), device=device)
        self.broadcast(sizes, "sizes")
        wire = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device) if parts is None else _join(parts)
        self.group.broadcast(wire)
        for name, size in zip(like, sizes.tolist(), strict=True):
            self._count(name, "broadcast", star_broadcast(size, self.group.rank, self.group.size))
        return _split(wire, like, sizes.tolist())

    def _count(self, purpose: str, collective: str, moved: Bytes) -> None:
        if moved != Bytes() and self.group.sends:
            self.ledger.add(self.step, purpose, collective, moved)


def _sizes(parts: Parts) -> list[int]:
    """Bytes of each part."""
    return [part.numel() * part.element_size() for part in parts.values()]


def _join(parts: Parts) -> Tensor:
    """Lay parts out as one byte buffer, uint8[n]."""
    return torch.cat([_packed(part).view(torch.uint8) for part in parts.values()])


def _packed(part: Tensor) -> Tensor:
    """Return a flat tensor with stride 1 (one element of a column counts as contiguous, and has another)."""
    return part if part.stride() == (1,) else part.new_empty(part.numel()).copy_(part)


def _split(wire: Tensor, like: Parts, sizes: Sequence[int]) -> Parts:
    """Cut a byte buffer into parts of the names and dtypes of `like`; the copies are aligned for their dtypes."""
    pieces = torch.split(wire, [*sizes, len(wire) - sum(sizes)])  # the last is padding
    return {name: b.clone().view(part.dtype) for (name, part), b in zip(like.items(), pieces, strict=False)}


class Together:
    """Collectives for plain values, in no ledger; every method is collective."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self._channel = Communicator(group, Ledger())

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value, as JSON carries it, by rank."""
        if self.group.size == 1:
            return [json.loads(json.dumps(value))]
        return [json.loads(text) for text in self._channel.gather_text(json.dumps(value), self.device)]

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


def check_agreement(channel: Communicator, arguments: Mapping[str, object], device: torch.device) -> None:
    """Raise ValueError on every worker, naming the first argument that differs and the workers; collective."""
    if channel.group.size == 1:
        return
    texts = [t.split("\n") for t in channel.gather_text(as_text(arguments), device, "start")]
    for lines in zip_longest(*texts, fillvalue="nothing more"):
        for worker, line in enumerate(lines):
            if line != lines[0]:
                ours, theirs = f"worker 0 has {lines[0]}", f"worker {worker} has {line}"
                raise ValueError(f"workers must be given the same arguments, but {ours} and {theirs}")


def as_text(arguments: Mapping[str, object]) -> str:
    """Return arguments as lines of text that are the same on workers which have the same."""
    arguments = {"packsaddle": __version__, **arguments}
    text = "\n".join(f"{name}={value!r}" for name, value in arguments.items())
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # where an object lies is each process's own matter
