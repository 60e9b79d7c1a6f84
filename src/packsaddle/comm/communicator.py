"""Collectives with byte counts, collectives for Python objects, and a check that all workers have equal arguments.

The bytes counted for each of W workers are:
- in a ring all-reduce of n bytes, 2 (W - 1) / W n bytes sent and the same number received;
- in a ring all-gather of n bytes per worker, (W - 1) n bytes sent and the same number received;
- in an all-to-all, the bytes that a worker sends to all other workers, and those that it receives from all others;
- in a broadcast of n bytes, (W - 1) n bytes sent by rank 0, and n bytes received by every other worker.

Python objects are exchanged outside of training, and their bytes are not counted.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor

from packsaddle.comm.group import Group
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.errors import MessageError
from packsaddle.numerics.devices import read, to_device
from packsaddle.version import __version__

Parts = Mapping[str, Tensor]
_MOST = 1 << 30  # maximum bytes of one worker's message, unless the caller sets a lower limit


def ring_all_reduce(payload: int, workers: int) -> Bytes:
    wire = round(2 * (workers - 1) / workers * payload)
    return Bytes(payload, wire, wire)


def ring_all_gather(payload: int, workers: int) -> Bytes:
    return Bytes(payload, (workers - 1) * payload, (workers - 1) * payload)


def star_broadcast(payload: int, rank: int, workers: int) -> Bytes:
    return Bytes(payload, payload * (workers - 1), 0) if rank == 0 else Bytes(0, 0, payload)


class Communicator:
    """The collectives of a group of workers. Their bytes are recorded in a ledger (byte counts by step and purpose)
    under the current `step`, which the caller sets."""

    def __init__(self, group: Group, ledger: Ledger) -> None:
        self.group = group
        self.ledger = ledger
        self.step = 0

    def mean(self, tensor: Tensor, purpose: str | Mapping[str, int]) -> Tensor:
        """Average a tensor over workers in place by all-reduce, and return it. `purpose` is the name under which the
        bytes are counted. If parts of the tensor are counted under different names, `purpose` is a dict of the number
        of elements by name."""
        self.group.all_reduce(tensor)
        if self.group.size > 1:
            tensor.div_(self.group.size)
        self.count_mean(tensor, purpose)
        return tensor

    def average(self, tensors: Sequence[Tensor], purpose: str, *, weight: float = 1.0) -> None:
        """Average floating-point tensors over workers in place. One all-reduce averages the float64 tensors. Another
        one averages all other tensors, after converting them to float32.

        `weight` multiplies this worker's tensors; the mean over workers of their weights must be 1. The bytes are
        counted under the name `purpose`.
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(torch.promote_types(tensor.dtype, torch.float32), []).append(tensor)
        for dtype, mine in by_dtype.items():
            flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in mine])
            self.mean(flat.mul_(weight) if weight != 1.0 else flat, purpose)
            for tensor, mean in zip(mine, torch.split(flat, [tensor.numel() for tensor in mine]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def count_mean(self, tensor: Tensor, purpose: str | Mapping[str, int]) -> None:
        for name, elements in ({purpose: tensor.numel()} if isinstance(purpose, str) else purpose).items():
            self._count(name, "all-reduce", ring_all_reduce(elements * tensor.element_size(), self.group.size))

    def gather(
        self,
        parts: Parts,
        *,
        fixed_size: bool = False,
        sizes: Sequence[list[int]] | None = None,
        purpose: str | None = None,
        most: int = _MOST,
    ) -> list[Parts]:
        """All-gather messages, and return the parts of every worker's message, by rank. If messages differ in size, all
        are padded to the longest.

        Args:
            parts: the parts (tensors by name) of this worker's message. Names and dtypes must match on all workers.
            fixed_size: True if the parts have equal sizes on all workers.
            sizes: the sizes in bytes of the parts of every worker, by rank. If `sizes` is None, and `fixed_size` is
                False, the sizes are gathered first.
            purpose: the name under which all bytes are counted. By default the bytes are counted under the parts'
                names, "sizes" and "padding".
            most: the maximum size in bytes of one worker's message.

        Raises MessageError on all workers if the gathered sizes of some worker's parts are invalid: negative, not
        multiples of the parts' element sizes, or above `most` in total.
        """
        wire, own = _join(parts), part_sizes(parts)
        if fixed_size:
            sizes = [own] * self.group.size
        elif sizes is None:
            sizes = read(*self.group.all_gather(to_device(torch.tensor(own), wire.device)))
            for worker, of_worker in enumerate(sizes):
                check_sizes(of_worker, parts, worker, most)
            self._count(purpose or "sizes", "all-gather", ring_all_gather(8 * len(parts), self.group.size))
        padding = max(map(sum, sizes)) - len(wire)
        gathered = self.group.all_gather(torch.nn.functional.pad(wire, (0, padding)))
        for name, size in zip((*parts, "padding"), (*own, padding), strict=True):
            self._count(purpose or name, "all-gather", ring_all_gather(size, self.group.size))
        return [_split(w, parts, s) for w, s in zip(gathered, sizes, strict=True)]

    def gather_text(self, text: str, device: torch.device, purpose: str | None = None) -> list[str]:
        parts = {"text": torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)}
        gathered = self.gather(parts, purpose=purpose)
        return [bytes(p["text"].tolist()).decode() for p in gathered]

    def exchange(
        self, outgoing: Sequence[Parts | None], like: Parts, *, fixed_size: bool = False, most: int = _MOST
    ) -> list[Parts]:
        """All-to-all: send a message to each worker, and return the parts of the received messages, by rank.

        Args:
            outgoing: the parts of the message to each worker, by rank; None: this worker gets no message.
            like: parts with the names and dtypes of the parts of every message.
            fixed_size: True if all messages to the same receiver have equal sizes. Otherwise sizes are sent first.
            most: the maximum size in bytes of one message.

        Raises MessageError, on this worker only, if the sizes that another worker has sent are invalid: negative, not
        multiples of the element sizes in `like`, or above `most` in total.
        """
        nothing, others = [0] * len(like), [r for r in range(self.group.size) if r != self.group.rank]
        sizes = [nothing if parts is None else part_sizes(parts) for parts in outgoing]
        device = next(iter(like.values())).device
        incoming = [sizes[self.group.rank]] * self.group.size
        if not fixed_size:
            headers = self.group.all_to_all(
                list(to_device(torch.tensor(sizes), device).view(torch.uint8)), [8 * len(like)] * self.group.size
            )
            incoming = read(*(h.view(torch.int64) for h in headers))
            for worker, announced in enumerate(incoming):
                check_sizes(announced, like, worker, most)
            self._count("sizes", "all-to-all", Bytes(*(3 * [8 * len(like) * len(others)])))
        wires = [torch.empty(0, dtype=torch.uint8, device=device) if p is None else _join(p) for p in outgoing]
        received = self.group.all_to_all(wires, [sum(s) for s in incoming])
        for i, name in enumerate(like):
            sent, got = (sum(s[r][i] for r in others) for s in (sizes, incoming))
            self._count(name, "all-to-all", Bytes(sum(s[i] for s in sizes), sent, got))
        return [_split(w, like, s) for w, s in zip(received, incoming, strict=True)]

    def broadcast(self, tensor: Tensor, purpose: str) -> None:
        self.group.broadcast(tensor)
        payload = tensor.numel() * tensor.element_size()
        self._count(purpose, "broadcast", star_broadcast(payload, self.group.rank, self.group.size))

    def broadcast_parts(self, parts: Parts | None, like: Parts, *, most: int = _MOST) -> Parts:
        """Broadcast rank 0's parts (tensors by name) and return them; other ranks pass None. `like` has the names and
        dtypes of the parts. Raises MessageError if the sizes that rank 0 announces are negative, are not multiples of
        the element sizes in `like`, or exceed `most` bytes in total."""
        device = next(iter(like.values())).device
        own = [0] * len(like) if parts is None else part_sizes(parts)
        self.broadcast(announced := to_device(torch.tensor(own), device), "sizes")
        (sizes,) = read(announced)
        check_sizes(sizes, like, 0, most)
        wire = torch.empty(sum(sizes), dtype=torch.uint8, device=device) if parts is None else _join(parts)
        self.group.broadcast(wire)
        for name, size in zip(like, sizes, strict=True):
            self._count(name, "broadcast", star_broadcast(size, self.group.rank, self.group.size))
        return _split(wire, like, sizes)

    def _count(self, purpose: str, collective: str, moved: Bytes) -> None:
        if moved != Bytes():
            self.ledger.add(self.step, purpose, collective, moved.part_of(self.group.processes))


def check_sizes(sizes: Sequence[int], like: Parts, worker: int, most: int) -> None:
    """Raise MessageError if the sizes in bytes that `worker` announces for the parts of its message are negative,
    exceed `most` in total, or are not multiples of the element sizes of the parts in `like`."""
    whole = all(n >= 0 and n % part.element_size() == 0 for n, part in zip(sizes, like.values(), strict=True))
    if not whole or sum(sizes) > most:
        expected, found = f"bytes of {', '.join(like)}, at most {most} in all", ", ".join(map(str, sizes))
        raise MessageError("sizes", expected, found, "any compressor", worker)


def most_bytes(d: int, parts: Parts) -> int:
    """Return a loose upper bound on the number of bytes of a message that encodes d coordinates in as many parts as
    `parts` has."""
    return (64 * d + 4096) * len(parts)


def part_sizes(parts: Parts) -> list[int]:
    """Return the size of each part of a message, in bytes."""
    return [part.numel() * part.element_size() for part in parts.values()]


def _join(parts: Parts) -> Tensor:
    return torch.cat([_packed(part).view(torch.uint8) for part in parts.values()])


def _packed(part: Tensor) -> Tensor:
    """Return the flat tensor `part` if its stride is 1, and otherwise a copy with stride 1. `contiguous()` does not
    suffice, since it keeps the stride of a tensor with a single element."""
    return part if part.stride() == (1,) else part.new_empty(part.numel()).copy_(part)


def _split(wire: Tensor, like: Parts, sizes: Sequence[int]) -> Parts:
    """Split `wire`, a message as one byte buffer, into parts with the names and dtypes of those in `like`. `sizes` are
    the numbers of bytes of the parts. The parts are copied, so that their memory is aligned."""
    pieces = torch.split(wire, [*sizes, len(wire) - sum(sizes)])  # the last piece is padding
    return {name: b.clone().view(part.dtype) for (name, part), b in zip(like.items(), pieces, strict=False)}


class ObjectCollectives:
    """Collectives for Python values, such as numbers, lists and states of optimizers. Their bytes are not counted.
    Every method is collective."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self._channel = Communicator(group, Ledger())

    def gather(self, value: Any) -> list[Any]:
        """All-gather `value`, and return every worker's value, by rank. Values are sent as JSON, so tuples become
        lists, and keys of dicts become strings."""
        if self.group.size == 1:
            return [json.loads(json.dumps(value))]
        return [json.loads(text) for text in self._channel.gather_text(json.dumps(value), self.device)]

    def send(self, content: Any, source: int) -> Any:
        """Broadcast `content`, which consists of tensors and plain types, from rank `source`, and return it. Other
        ranks may pass None."""
        if self.group.size == 1:
            return content
        file = io.BytesIO()
        if self.group.rank == source:
            torch.save(content, file)
        (size,) = (n for n in self.gather(len(file.getbuffer())) if n)
        wire = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.group.rank == source:
            wire.copy_(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
        self.group.all_reduce(wire)  # all other ranks contribute zeros
        return torch.load(io.BytesIO(wire.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def check_agreement(
    channel: Communicator,
    arguments: Mapping[str, object],
    device: torch.device,
    hints: Mapping[str, str] | None = None,
    *,
    of: Literal["worker", "process"] = "worker",
) -> None:
    """Raise ValueError on all workers if their `arguments` differ; collective. The error names the first argument that
    differs.

    Args:
        channel: the communicator of the workers.
        arguments: this worker's arguments by name.
        device: the device of the tensors to exchange.
        hints: sentences to add to the error. A sentence is added if its key is the beginning of the differing
            argument's name.
        of: "process" if the ranks of `channel` are processes of one worker. The error calls each rank by this word.
    """
    if channel.group.size == 1:
        return
    # Send the text only if its hash differs between workers.
    mine = {"hash": torch.tensor([hash_of(text := as_text(arguments))], device=device)}
    gathered = channel.gather(mine, fixed_size=True, purpose="start")
    if len({int(parts["hash"]) for parts in gathered}) == 1:
        return
    texts = [t.split("\n") for t in channel.gather_text(text, device, "start")]
    for lines in zip_longest(*texts, fillvalue="nothing more"):
        for worker, line in enumerate(lines):
            if line != lines[0]:
                ours, theirs = f"{of} 0 has {lines[0]}", f"{of} {worker} has {line}"
                all_of = {"worker": "workers", "process": "the processes of a worker"}[of]
                rest = "".join(f". {hint}" for name, hint in (hints or {}).items() if line.startswith(name))
                raise ValueError(f"{all_of} must be given the same arguments, but {ours} and {theirs}{rest}")


def as_text(arguments: Mapping[str, object]) -> str:
    """Return arguments as text, one per line. The text is identical on workers with equal arguments."""
    arguments = {"packsaddle": __version__, **arguments}
    text = "\n".join(f"{name}={value!r}" for name, value in arguments.items())
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # memory addresses in a repr differ between processes


def hash_of(text: str) -> int:
    """Return a hash of a text, below 2^63, that is identical in all processes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
