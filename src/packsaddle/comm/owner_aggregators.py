"""Two-way exchanges: every chunk of the vector has an owner, a worker that averages it and sends the mean back.

With `TwoWay` each worker of the exchange owns an equal chunk. With `Coordinator` rank 0 owns the whole vector, as in
the paper.

Workers send their vectors v_i compressed, as C(v_i), except that owner j does not send its own v_j for its chunk, and
so includes it uncompressed in the chunk's mean m. The owner sends m back as B(m), where B may be another compressor or
the identity. It keeps W times the residual r = m - B(m) in its error memory, so that the next mean over the W workers
contains r once:

    m = (v_j + sum_{i != j} C(v_i)) / W,    r = m - B(m),    e_j <- W r    in the chunk of worker j

The workers that own a chunk may differ from one exchange to the next, since e_j is part of the v_j that worker j sends.
"""

from abc import abstractmethod
from itertools import accumulate, pairwise

from torch import Tensor

from packsaddle.comm.aggregators import Aggregator, Averaged, Dense, Invalid, Term, Work, dense_of, mean_of_dense
from packsaddle.comm.communicator import Communicator, Parts, most_bytes, part_sizes
from packsaddle.comm.cost_model import AllToAll, Broadcast, Collective, RingAllGather, RingAllReduce, message_bytes
from packsaddle.compressors import Compressor, Identity, Message
from packsaddle.compressors.base import part_count
from packsaddle.numerics.finite import fill_where, is_in_range
from packsaddle.numerics.seeds import mix

Chunk = tuple[int, int]


class Owners(Aggregator):
    """Base of two-way exchanges: workers send compressed chunks to the chunks' owners, which return compressed means.

    An owner replies with B(m), where m is the mean and B the compressor `back`. If a compressor has a parameter k= or
    columns=, the value of that parameter is divided among the chunks in proportion to their sizes. With
    Sign(per_tensor=True), each piece of a tensor in a chunk counts as a tensor.
    """

    def __init__(self, compressor: Compressor, back: Compressor) -> None:
        super().__init__(compressor)
        self.back = back

    @property
    def _knows_replies(self) -> bool:
        """True if the reply for a chunk, which the chunk's owner (the worker that averages it) returns, has the same
        size as every worker's message for that chunk. The sizes of replies are then not sent."""
        return self.compressor.fixed_size and self.back == self.compressor

    @abstractmethod
    def bounds(self, d: int, workers: int) -> list[int]:
        """Return the chunk boundaries, W + 1 integers: worker j owns the coordinates [bounds[j], bounds[j + 1])."""

    def average(
        self, channel: Communicator, v: Tensor, dense: Dense, *, seed: int, step: int, flag: int | None = None
    ) -> Averaged:
        if not len(v):
            return Averaged((), (), mean_of_dense(channel, dense_of(dense, ())))
        rank, size = channel.group.rank, channel.group.size
        chunks, own = list(pairwise(self.bounds(len(v), size))), {}
        for owner, (a, b) in enumerate(chunks):
            if a < b:
                part, own_seed = self.compressor.restrict(a, b, len(v)), mix(self._seed_of(rank, seed), owner)
                own[owner] = Term(part, part.encode(v[a:b], seed=own_seed, step=step), a, b)
        outgoing = [own[j].message.parts if j in own else None for j in range(size)]
        like, invalid = own[min(own)].message.parts, Invalid()
        is_fixed, most = self.compressor.fixed_size, most_bytes(len(v), like)
        received = channel.exchange(outgoing, like, fixed_size=is_fixed, most=most)
        mine = slice(*chunks[rank])
        reply, residual = None, v[mine]
        if rank in own:
            reply, residual = self._reply(v, received, chunks[rank], rank, seed, step, invalid)
        sizes = [part_sizes(own[j].message.parts) if j in own else [0] * len(like) for j in range(size)]
        known = sizes if self._knows_replies else None
        mean = self._return(channel, reply, v, chunks, seed, step, invalid, known)
        # The uncompressed part is averaged last, so that a NaN in it reports an invalid message to all workers.
        others = [term for owner, term in own.items() if owner != rank]

        def with_own(values: Tensor) -> tuple[Term, ...]:
            return (*others, Term(Identity(), Message({"values": values}), *chunks[rank]))

        mean_dense = mean_of_dense(channel, dense_of(dense, with_own(v[mine])), invalid, flag)
        return Averaged(with_own(v[mine].sub(residual, alpha=size)), mean, mean_dense, invalid)

    def _reply(
        self, v: Tensor, received: list[Parts], chunk: Chunk, rank: int, seed: int, step: int, invalid: Invalid
    ) -> tuple[Message, Tensor]:
        """Return the reply of this worker as an owner, i.e. the compressed mean of its chunk [a, b), and the residual
        of this compression, float[b - a]. If the mean is invalid, the reply is NaN, even if compression would have
        dropped the invalid coordinates."""
        a, b = chunk
        up, back = self.compressor.restrict(a, b, len(v)), self.back.restrict(a, b, len(v))
        # Compute the mean of the chunk over workers: this worker's own vector v uncompressed, and all other vectors as
        # decoded from their messages.
        mean = v[a:b] / len(received)
        for worker, parts in enumerate(received):
            with invalid.of(worker):
                if worker != rank:
                    message = up.receive(parts, b - a, seed=mix(self._seed_of(worker, seed), rank), step=step)
                    up.add_decoded(message, mean, 1.0 / len(received))
        # Replace invalid coordinates of the mean with 1, since the compressor may be undefined for them.
        bad = ~is_in_range(mean)
        fill_where(mean, bad, 1.0)
        reply = back.encode(mean, seed=mix(seed, rank, 1), step=step)
        back.add_decoded(reply, mean, -1.0)
        # Put NaN into the reply if a coordinate is invalid, so that every worker rejects the exchange.
        for part in reply.parts.values():
            if part.is_floating_point():
                fill_where(part, bad, float("nan"))
        return reply, mean

    def _return(
        self,
        channel: Communicator,
        reply: Message | None,
        v: Tensor,
        chunks: list[Chunk],
        seed: int,
        step: int,
        invalid: Invalid,
        sizes: list[list[int]] | None,
    ) -> tuple[Term, ...]:
        """Send `reply`, the compressed mean of the chunk that this worker owns, to all workers. Return the replies of
        all owners as terms of the mean of the whole vector. `reply` is None if this worker owns no chunk. `sizes`, the
        bytes of the replies' parts by owner, are None if they must be exchanged."""
        # Workers without a chunk derive the names and dtypes of the parts of an owner's reply by compressing zeros.
        first, last = next((a, b) for a, b in chunks if a < b)
        zeros = v.new_zeros(last - first)
        example = reply or self.back.restrict(first, last, len(v)).encode(zeros, seed=seed, step=step)
        like = example.parts
        mine, gathered, terms = reply.parts if reply else {name: p[:0] for name, p in like.items()}, [], []
        with invalid.of(None):
            gathered = self._send_back(channel, mine, like, most_bytes(len(v), like), sizes)
        for owner, ((a, b), parts) in enumerate(zip(chunks, gathered, strict=False)):
            with invalid.of(owner):
                if a < b:
                    back = self.back.restrict(a, b, len(v))
                    terms.append(Term(back, back.receive(parts, b - a, seed=mix(seed, owner, 1), step=step), a, b))
        return tuple(terms)

    @abstractmethod
    def _send_back(
        self, channel: Communicator, parts: Parts, like: Parts, most: int, sizes: list[list[int]] | None
    ) -> list[Parts]:
        """Send `parts`, the parts of this worker's reply (the compressed mean of its chunk), to all workers. Return the
        replies of all workers, of at most `most` bytes each, by rank."""

    def owned(self, d: int, workers: int, rank: int) -> slice:
        return slice(*self.bounds(d, workers)[rank : rank + 2])

    def mu(self, d: int, workers: int) -> float:
        """Return the contraction mu of one exchange, the mean over chunks, weighted by chunk size. The contraction of a
        chunk is the product of two: that of the compressor of messages, and that of the compressor of replies."""
        chunks = self._chunks(d, workers)
        parts = [(b - a, self.compressor.restrict(a, b, d), self.back.restrict(a, b, d)) for a, b in chunks]
        return sum(n / d * up.mu(n) * back.mu(n) for n, up, back in parts) if d else 1.0

    def validate(self, d: int, workers: int) -> None:
        for a, b in self._chunks(d, workers):
            for compressor in (self.compressor, self.back):
                compressor.validate(d)
                compressor.restrict(a, b, d).validate(b - a)

    def collectives(self, d: int, dense: int, workers: int, itemsize: int) -> list[Collective]:
        last = RingAllReduce((dense * itemsize,))
        if not d:
            return [last]
        chunks, both = list(pairwise(self.bounds(d, workers))), (self.compressor, self.back)
        up, down = (
            [message_bytes(c.restrict(a, b, d), b - a, itemsize) if a < b else 0 for a, b in chunks] for c in both
        )
        a, b = self._chunks(d, workers)[-1]
        header, back_header = (8 * part_count(c.restrict(a, b, d), b - a) for c in both)
        announced = AllToAll([0 if self.compressor.fixed_size else header] * workers, to_self=False)
        return [announced, AllToAll(up), *self._sent_back(down, back_header), last]

    @abstractmethod
    def _sent_back(self, down: list[int], header: int) -> list[Collective]:
        """Return the collectives that send the owners' replies, i.e. the compressed means of all chunks, to all
        workers. `down` contains the size of each reply in bytes. `header` is the number of bytes in which an owner
        announces the sizes of its reply's parts."""

    def work(self, d: int, workers: int) -> list[Work]:
        """Return the numbers of operations (encoding, decoding and adding messages) in one exchange, for the worker
        with the most operations. That worker is the owner of the largest chunk, i.e. it averages this chunk. The
        owner decodes the other workers' messages for its chunk, and the replies (compressed means) of all owners."""
        if not d:
            return []
        chunks = self._chunks(d, workers)
        (a, b), owners = chunks[-1], len(chunks)  # no chunk is larger than the last one
        return [
            Work(self.compressor.restrict(a, b, d), b - a, encode=owners, decode=workers - 1, add=owners - 1),
            Work(self.back.restrict(a, b, d), b - a, encode=1, decode=owners, add=1),
        ]

    def _chunks(self, d: int, workers: int) -> list[Chunk]:
        return [(a, b) for a, b in pairwise(self.bounds(d, workers)) if a < b]


class TwoWay(Owners):
    """Each worker in `owners`, by default every worker, owns an equal chunk of the vector. An all-to-all sends the
    messages to the owners, and an all-gather sends the means, by default compressed too, to all workers."""

    def __init__(self, compressor: Compressor, back: Compressor | None = None) -> None:
        super().__init__(compressor, back or compressor)

    def bounds(self, d: int, workers: int) -> list[int]:
        owners = range(workers) if self.owners is None else self.owners
        ends = {rank: j * d // len(owners) for j, rank in enumerate(owners, start=1)}
        return [0, *accumulate((ends.get(rank, 0) for rank in range(workers)), max)]

    def _send_back(
        self, channel: Communicator, parts: Parts, like: Parts, most: int, sizes: list[list[int]] | None
    ) -> list[Parts]:
        # The replies for two chunks may differ in size, so `fixed_size` is not passed.
        return channel.gather(parts, sizes=sizes, most=most)

    def _sent_back(self, down: list[int], header: int) -> list[Collective]:
        sizes = RingAllGather(0 if self._knows_replies else header)
        return [sizes, RingAllGather(max(down))]  # shorter replies are padded


class Coordinator(Owners):
    """Rank 0 owns, i.e. averages, the whole vector. It gathers the compressed messages, and broadcasts the mean, by
    default uncompressed."""

    def __init__(self, compressor: Compressor, back: Compressor | None = None) -> None:
        super().__init__(compressor, back or Identity())

    def bounds(self, d: int, workers: int) -> list[int]:
        return [0] + [d] * workers

    def _send_back(
        self, channel: Communicator, parts: Parts, like: Parts, most: int, sizes: list[list[int]] | None
    ) -> list[Parts]:
        first = channel.group.rank == 0
        nothing = {name: part[:0] for name, part in like.items()}
        reply = channel.broadcast_parts(parts if first else None, like, most=most)
        return [reply] + [nothing] * (channel.group.size - 1)

    def _sent_back(self, down: list[int], header: int) -> list[Collective]:
        return [Broadcast(header), Broadcast(down[0])]
