"""Averaging compressed vectors over workers, and counting the bytes of every collective.

Hop factors, W workers, n bytes of message each: a ring all-reduce makes each worker send and receive
2 (W - 1) / W n, a ring all-gather (W - 1) n; a broadcast is counted as n received by everyone but rank 0,
which sends n to each.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.compress import Compressor, Message
from packsaddle.exchange import Group
from packsaddle.ledger import Bytes, Ledger


class Channel:
    """A group's collectives with their bytes entered in a ledger under `step`, which the caller advances."""

    def __init__(self, group: Group, ledger: Ledger) -> None:
        self.group = group
        self.ledger = ledger
        self.step = 0

    def mean(self, tensor: Tensor, purpose: str | Mapping[str, int]) -> Tensor:
        """Average a tensor over workers in place by all-reduce, and return it.

        `purpose` is a name, or how many elements of the tensor serve which purpose.
        """
        size = self.group.size
        self.group.all_reduce(tensor)
        if size > 1:
            tensor.div_(size)
        shares = {purpose: tensor.numel()} if isinstance(purpose, str) else purpose
        for name, elements in shares.items():
            payload = elements * tensor.element_size()
            wire = round(2 * (size - 1) / size * payload)
            self.ledger.add(self.step, name, Bytes(payload, wire, wire))
        return tensor

    def gather(self, message: Message, purpose: str) -> list[Message]:
        """Return every worker's message, by rank; all have payloads of equal shapes and dtypes."""
        wire = torch.cat([part.view(torch.uint8) for part in message.payload])
        gathered = self.group.all_gather(wire)
        forwarded = (self.group.size - 1) * wire.numel()
        self.ledger.add(self.step, purpose, Bytes(wire.numel(), forwarded, forwarded))
        return [_unpack(buffer, message) for buffer in gathered]

    def broadcast(self, tensor: Tensor, purpose: str) -> None:
        """Replace a tensor by rank 0's, in place."""
        self.group.broadcast(tensor)
        payload = tensor.numel() * tensor.element_size()
        root, others = self.group.rank == 0, self.group.size - 1
        self.ledger.add(
            self.step,
            purpose,
            Bytes(payload if root else 0, payload * others if root else 0, 0 if root else payload),
        )


def _unpack(wire: Tensor, like: Message) -> Message:
    """Cut a byte buffer, uint8[n], into parts of the sizes and dtypes of another message's payload."""
    sizes = [part.numel() * part.element_size() for part in like.payload]
    # Each part is copied, so that it is aligned for its dtype.
    parts = [b.clone().view(p.dtype) for b, p in zip(torch.split(wire, sizes), like.payload, strict=True)]
    return Message(tuple(parts), like.support)


@dataclass(frozen=True)
class Averaged:
    """The outcome of one exchange: what this worker sent, and the mean of what all sent."""

    own: Message  # C(own vector), which error feedback subtracts
    messages: tuple[Message, ...]  # mean_i C(v_i) is the sum of these ...
    weight: float  # ... times this weight
    dense: Tensor  # [d - compressed_d], the mean of the dense parts

    def subtract_from(self, x: Tensor, compressor: Compressor) -> None:
        """x <- x - mean_i C(v_i), in place (Algorithm 1, line 11; eta is already in the messages)."""
        compressed_d = x.numel() - self.dense.numel()
        for message in self.messages:
            compressor.add_decoded(message, x[:compressed_d], alpha=-self.weight)
        x[compressed_d:].sub_(self.dense)


def average(channel: Channel, compressor: Compressor, v: Tensor, compressed_d: int, seed: int, step: int) -> Averaged:
    """Average C(v_i) over workers, v float[d]; coordinates from `compressed_d` on are averaged as they are.

    A linear compressor takes one all-reduce for both parts. Any other takes an all-gather of the messages,
    from which every worker forms the same mean of compressions, and an all-reduce of the dense part.
    """
    own = compressor.encode(v[:compressed_d], seed=seed, step=step)
    dense = v[compressed_d:]
    if compressor.linear:
        (payload,) = own.payload
        shares = {"compressed": payload.numel(), "dense": dense.numel()}
        mean = channel.mean(torch.cat([payload, dense]), shares)
        reduced = Message((mean[: payload.numel()],), own.support)
        return Averaged(own, (reduced,), 1.0, mean[payload.numel() :])
    messages = channel.gather(own, "compressed")
    mean_dense = channel.mean(dense.clone(), "dense") if len(dense) else dense
    return Averaged(own, tuple(messages), 1.0 / channel.group.size, mean_dense)
