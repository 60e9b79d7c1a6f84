"""Aggregation through owners: every chunk of the vector has a worker that averages it and sends the mean back.

`TwoWay` gives each worker an equal chunk; `Coordinator` gives all of it to rank 0, the paper's star. The mean may be
compressed again on the way back, with an error memory at the owner.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from packsaddle.average import Averaged, Protocol, Term, mean_of_dense
from packsaddle.channel import Channel, Parts, ring_all_gather, ring_all_reduce, star_broadcast
from packsaddle.compress import Compressor, Identity, Message
from packsaddle.ledger import Bytes
from packsaddle.seeds import mix


class Owners(Protocol):
    """Workers send C(chunk) to the chunk's owner; it sends back B(mean + its own error), B the `back` compressor.

    A compressor with k= keeps its share of k in each chunk. The owner's error is a mean over workers already, so
    for the mean of all errors it counts W times on its owner alone (`add_residual`).
    """

    def __init__(self, compressor: Compressor, back: Compressor) -> None:
        super().__init__(compressor)
        self.back = back
        self._residual: Tensor | None = None  # float[own chunk], this owner's error
        self._place = (0, 0, 1)  # this owner's chunk, and W

    def bounds(self, d: int, workers: int) -> list[int]:
        """Return where chunks begin and end: worker j owns [bounds[j], bounds[j + 1])."""
        raise NotImplementedError

    def average(self, channel: Channel, v: Tensor, dense: Tensor, *, seed: int, step: int) -> Averaged:
        mean_dense = mean_of_dense(channel, dense)
        if not len(v):
            return Averaged((), (), mean_dense)
        rank, size = channel.group.rank, channel.group.size
        bounds = self.bounds(len(v), size)
        chunks = list(pairwise(bounds))
        own = tuple(
            self._compress(v, j, chunk, channel, seed, step) for j, chunk in enumerate(chunks) if chunk[0] < chunk[1]
        )
        by_owner = {term.start: term for term in own}
        outgoing = [by_owner[a].message.parts if a < b else None for a, b in chunks]
        received = channel.exchange(outgoing, own[0].message.parts)
        a, b = chunks[rank]
        reply = self._reply(v, received, (a, b), rank, size, seed, step) if a < b else None
        return Averaged(own, self._return(channel, reply, v, chunks, seed, step), mean_dense)

    def wire(self, d: int, dense: int, rank: int, workers: int, itemsize: int) -> Bytes:
        total = ring_all_reduce(dense * itemsize, workers)
        if not d:
            return total
        sizes = [b - a for a, b in pairwise(self.bounds(d, workers))]
        up = [round(self.compressor.restrict(n, d).message_bytes(n, itemsize)) if n else 0 for n in sizes]
        others = sum(up) - up[rank]
        total += Bytes(sum(up), others, (workers - 1) * up[rank])
        headers = 8 * self._part_count(self.compressor) * (workers - 1)
        total += Bytes(headers, headers, headers)
        down = [round(self.back.restrict(n, d).message_bytes(n, itemsize)) if n else 0 for n in sizes]
        return total + self._wire_back(down, rank, workers)

    def _compress(self, v: Tensor, owner: int, chunk: tuple[int, int], channel: Channel, seed: int, step: int) -> Term:
        a, b = chunk
        compressor = self.compressor.restrict(b - a, len(v))
        message = compressor.encode(v[a:b], seed=mix(self._own_seed(channel, seed), owner), step=step)
        return Term(compressor, message, a, b)

    def _reply(
        self, v: Tensor, received: list[Parts], chunk: tuple[int, int], rank: int, size: int, seed: int, step: int
    ) -> Message:
        """Average the messages of this worker's chunk and compress the mean plus the error of earlier replies."""
        a, b = chunk
        up, back = self.compressor.restrict(b - a, len(v)), self.back.restrict(b - a, len(v))
        if self._residual is None or len(self._residual) != b - a:
            self._residual = torch.zeros(b - a, dtype=v.dtype, device=v.device)
        self._place = (a, b, size)
        for parts in received:
            up.add_decoded(up.receive(parts, b - a, seed=mix(seed, rank), step=step), self._residual, 1.0 / size)
        reply = back.encode(self._residual, seed=mix(seed, rank, 1), step=step)
        back.add_decoded(reply, self._residual, -1.0)
        return reply

    def _return(
        self, channel: Channel, reply: Message | None, v: Tensor, chunks: list[tuple[int, int]], seed: int, step: int
    ) -> tuple[Term, ...]:
        """Send every owner's reply to every worker, and return them as terms of the mean."""
        like = self.back.encode(v.new_zeros(1), seed=seed, step=step).parts  # names and dtypes
        empty = {name: part[:0] for name, part in like.items()}
        gathered = self._send_back(channel, empty if reply is None else reply.parts, like)
        terms = []
        for owner, ((a, b), parts) in enumerate(zip(chunks, gathered, strict=True)):
            if a < b:
                back = self.back.restrict(b - a, len(v))
                terms.append(Term(back, back.receive(parts, b - a, seed=mix(seed, owner, 1), step=step), a, b))
        return tuple(terms)

    def _send_back(self, channel: Channel, parts: Parts, like: Parts) -> list[Parts]:
        raise NotImplementedError

    def _wire_back(self, down: list[int], rank: int, workers: int) -> Bytes:
        raise NotImplementedError

    def add_residual(self, pending: Tensor) -> Tensor:
        if self._residual is None:
            return pending
        a, b, size = self._place
        total = pending.clone()
        total[a:b].add_(self._residual, alpha=size)
        return total

    def reset(self) -> None:
        self._residual = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._residual is None else {"residual": self._residual, "place": list(self._place)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._residual = state["residual"].clone() if "residual" in state else None
        a, b, size = state.get("place", (0, 0, 1))
        self._place = (a, b, size)


class TwoWay(Owners):
    """Each worker owns an equal chunk: an all-to-all up, an all-gather back. By default B = C."""

    def __init__(self, compressor: Compressor, back: Compressor | None = None) -> None:
        super().__init__(compressor, back or compressor)

    def bounds(self, d: int, workers: int) -> list[int]:
        return [j * d // workers for j in range(workers + 1)]

    def _send_back(self, channel: Channel, parts: Parts, like: Parts) -> list[Parts]:
        return channel.gather(parts, fixed_size=False)  # chunks may differ by one coordinate

    def _wire_back(self, down: list[int], rank: int, workers: int) -> Bytes:
        headers = ring_all_gather(8 * self._part_count(self.back), workers)
        return headers + ring_all_gather(max(down), workers)  # shorter replies are padded


class Coordinator(Owners):
    """Rank 0 owns everything: a gather to it, and a broadcast. By default the mean comes back uncompressed."""

    def __init__(self, compressor: Compressor, back: Compressor | None = None) -> None:
        super().__init__(compressor, back or Identity())

    def bounds(self, d: int, workers: int) -> list[int]:
        return [0] + [d] * workers

    def _send_back(self, channel: Channel, parts: Parts, like: Parts) -> list[Parts]:
        first = channel.group.rank == 0
        nothing = {name: part[:0] for name, part in like.items()}
        return [channel.broadcast_parts(parts if first else None, like)] + [nothing] * (channel.group.size - 1)

    def _wire_back(self, down: list[int], rank: int, workers: int) -> Bytes:
        headers = star_broadcast(8 * self._part_count(self.back), rank, workers)
        return headers + star_broadcast(down[0], rank, workers)
