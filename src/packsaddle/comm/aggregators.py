"""Aggregators: averaging of compressed vectors over workers. Each class here returns the exact mean of the messages."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator, Parts, most_bytes
from packsaddle.comm.cost_model import Collective, RingAllGather, RingAllReduce, message_bytes
from packsaddle.comm.ledger import Bytes
from packsaddle.compressors import Compressor, LowRank, Message
from packsaddle.compressors.base import part_count
from packsaddle.compressors.low_rank import orthonormal, scaled
from packsaddle.compressors.parts import Checks, deferred
from packsaddle.compressors.shared import SharedSupport
from packsaddle.errors import MessageError
from packsaddle.numerics.finite import magnitude
from packsaddle.numerics.seeds import mix


@dataclass(frozen=True)
class Term:
    """One term of a sum of compressed vectors. The term is a decoded message times `weight`. The decoded message has
    the coordinates [start, stop) of the vector; all other coordinates of the term are 0."""

    compressor: Compressor
    message: Message
    start: int
    stop: int
    weight: float = 1.0

    def add_to(self, out: Tensor, alpha: float) -> None:
        self.compressor.add_decoded(self.message, out[self.start : self.stop], alpha * self.weight)

    def magnitude(self) -> Tensor:
        """Return the approximate largest absolute value of this term, i.e. of a decoded message times its weight, as
        float64[]. It is finite if the message is finite."""
        parts = [magnitude(part) for part in self.message.parts.values() if part.is_floating_point()]
        return torch.stack(parts).sum() * self.weight


# The uncompressed part of a vector, float[m], or a function that computes it from the terms of this worker's compressed
# vector C(v).
Dense = Tensor | Callable[[tuple[Term, ...]], Tensor]


class Invalid:
    """Suppresses MessageErrors in `with invalid.of(worker):` blocks, and records them. Checks of messages on a GPU are
    recorded without reading their results, since reading makes the host wait for the GPU."""

    def __init__(self) -> None:
        self._checks: Checks = []

    @contextmanager
    def of(self, worker: int | None) -> Iterator[None]:
        """Context manager that suppresses and records a MessageError raised in its block. The recorded error names
        `worker` as the sender of the message. If `worker` is None, the error already names the rank."""
        first, token = len(self._checks), deferred.set(self._checks)
        try:
            yield
        except MessageError as error:
            self._checks.append((torch.tensor(False), error))
        finally:
            deferred.reset(token)
        for _, each in self._checks[first:]:
            each.worker = worker if each.worker is None else each.worker

    @property
    def error(self) -> MessageError | None:
        """The first MessageError that was recorded, or None if all messages are valid. The host waits for checks on a
        GPU."""
        return next((error for is_valid, error in self._checks if not is_valid), None)

    def report_in(self, number: Tensor) -> None:
        """Set `number`, float[], to NaN in place if a recorded check has failed. The host does not wait for checks on a
        GPU."""
        for is_valid, _ in self._checks:
            number.masked_fill_(~is_valid.to(number.device), float("nan"))


@dataclass(frozen=True)
class Averaged:
    """The result of averaging a vector over workers. Each of `own` and `mean` represents a vector of the compressed
    coordinates as a tuple of terms, whose sum is the vector."""

    # This worker's compressed vector C(v); its error memory becomes v - C(v). If this worker owns a chunk of the vector
    # (see `Owners`), C(v) is v - W r in that chunk. There r is the residual of the chunk's mean, i.e. the part of the
    # mean that was lost when this worker compressed it for all W workers.
    own: tuple[Term, ...]
    mean: tuple[Term, ...]  # the mean of C(v) over workers, identical on all workers
    dense: Tensor  # float[m], the mean of the uncompressed parts
    invalid: Invalid = field(default_factory=Invalid)  # invalid messages, for which all workers reject the mean

    def write_to(self, out: Tensor) -> Tensor:
        """Write the mean into `out` and return `out`. `out` is a vector of d zeros, float[d], where d is the number
        of all coordinates. The uncompressed coordinates are at its end."""
        n = len(out) - len(self.dense)
        for term in self.mean:
            term.add_to(out[:n], 1.0)
        out[n:] = self.dense
        return out

    def magnitude(self) -> Tensor:
        """Return the approximate largest absolute value of the mean, float64[], identical on all workers. No message is
        decoded.

        Workers send no vector v whose C(v) could overflow (see `numerics.finite.is_in_range`), so the mean is finite if
        the messages and the uncompressed part are finite.
        """
        return torch.stack([magnitude(self.dense), *(term.magnitude() for term in self.mean)]).sum()


@dataclass(frozen=True)
class Work:
    """The number of operations of each kind (encoding, decoding and adding messages) that a worker performs in one
    exchange, on vectors of `coordinates` numbers."""

    compressor: Compressor
    coordinates: int
    encode: int = 0
    decode: int = 0  # number of messages from other workers that are decoded and added to a vector
    # Number of messages that are added to a vector without decoding. The worker encoded or decoded them earlier, so it
    # has their context (`Message.context`) already.
    add: int = 0


class Aggregator(ABC):
    """A method of averaging compressed vectors C(v), and uncompressed parts (such as small tensors), over workers."""

    # Ranks of the workers that may own a chunk in the next exchange (see `Owners`), sorted; None: all workers.
    owners: Sequence[int] | None = None

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    @abstractmethod
    def average(
        self, channel: Communicator, v: Tensor, dense: Dense, *, seed: int, step: int, flag: int | None = None
    ) -> Averaged:
        """Average the compressed vector C(v), where v is float[d], and the uncompressed part `dense` over workers;
        collective. Inputs do not change.

        If a message from another worker is invalid, this worker sends NaN as dense[flag], so that all workers reject
        the mean, and `Averaged.invalid` has the error. If `flag` is None, this worker raises MessageError instead.
        """

    @abstractmethod
    def collectives(self, d: int, dense: int, workers: int, itemsize: int) -> list[Collective]:
        """Return the collectives of one exchange of d compressed and `dense` uncompressed coordinates, in order.
        Their sizes are expected sizes if the size of the compressor's messages varies."""

    def wire(self, d: int, dense: int, rank: int, workers: int, itemsize: int) -> Bytes:
        return sum((c.wire(rank, workers) for c in self.collectives(d, dense, workers, itemsize)), Bytes())

    def most_sent(self, d: int, dense: int, workers: int, itemsize: int) -> int:
        """Return the number of bytes sent by the worker that sends the most in one exchange of d compressed and `dense`
        uncompressed coordinates."""
        collectives = self.collectives(d, dense, workers, itemsize)
        return max(sum(c.wire(rank, workers).sent for c in collectives) for rank in range(workers))

    def work(self, d: int, workers: int) -> list[Work]:
        """Return the numbers of operations (encoding, decoding and adding messages) in one exchange, for the worker
        with the most operations. The numbers include the operations that apply the mean."""
        return [Work(self.compressor, d, encode=1, add=2)]

    def owned(self, d: int, workers: int, rank: int) -> slice:
        """Return the range of coordinates for which worker `rank` keeps the residual of the mean, i.e. the part of the
        mean that is lost when the worker compresses it (see `Owners`). By default this range is empty."""
        return slice(0, 0)

    def mu(self, d: int, workers: int) -> float:
        """Return the contraction mu of one exchange, i.e. the fraction of norm(v)^2 that compression keeps, for a
        vector v whose d coordinates are equally large."""
        return self.compressor.mu(d) if d else 1.0

    def validate(self, d: int, workers: int) -> None:
        """Raise ValueError if the compressor does not support vectors of d coordinates. If each worker averages a
        chunk of the vector, the compressor must support vectors of every chunk's length too."""
        if d:
            self.compressor.validate(d)

    def reset(self) -> None:  # noqa: B027 -- most aggregators have no state
        """Discard the state that the aggregator keeps from one exchange to the next, such as the start matrices of
        low-rank compression."""

    def snapshot(self) -> Any:
        return None

    def restore(self, snapshot: Any) -> None:  # noqa: B027 -- most aggregators have no state
        """Roll the state back to `snapshot`, a result of the method `snapshot`, as if the exchanges since then had not
        happened."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, such as the owners or the low-rank warm start, as tensors and plain types."""
        return {} if self.owners is None else {"owners": list(self.owners)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore `state`, a result of `state_dict`, and move its tensors to `device`. Start matrices of low-rank
        compression are ignored if their shapes do not fit the model."""
        self.owners = state.get("owners")

    def _terms(self, message: Message, d: int, weight: float = 1.0) -> tuple[Term, ...]:
        return (Term(self.compressor, message, 0, d, weight),) if d else ()

    def _seed_of(self, worker: int, seed: int) -> int:
        """Return the random seed with which `worker` encodes. With a `private` compressor each worker has its own seed,
        derived from `seed`. With any other compressor all workers use `seed`."""
        return mix(seed, worker + 1) if self.compressor.private else seed


class AllReduce(Aggregator):
    """One all-reduce of a linear compressor's message and the uncompressed part (such as small tensors). The reduced
    message decodes exactly to the mean of the workers' vectors C(v), because the compressor is linear. The
    communication buffer is reused: a result is valid only until the next exchange."""

    def __init__(self, compressor: Compressor) -> None:
        super().__init__(compressor)
        self._buffer = torch.zeros(0)

    def average(
        self, channel: Communicator, v: Tensor, dense: Dense, *, seed: int, step: int, flag: int | None = None
    ) -> Averaged:
        own = self.compressor.encode(v, seed=seed, step=step)
        dense = dense_of(dense, self._terms(own, len(v)))
        ((name, payload),) = own.parts.items()
        shares = {name: payload.numel(), "dense": dense.numel()}
        n = len(payload) + len(dense)
        if len(self._buffer) != n or self._buffer.dtype != payload.dtype or self._buffer.device != payload.device:
            self._buffer = payload.new_empty(n)
        mean = channel.mean(torch.cat([payload, dense], out=self._buffer), shares)
        reduced = Message({name: mean[: payload.numel()]}, own.context)
        return Averaged(self._terms(own, len(v)), self._terms(reduced, len(v)), mean[payload.numel() :])

    def collectives(self, d: int, dense: int, workers: int, itemsize: int) -> list[Collective]:
        return [RingAllReduce((message_bytes(self.compressor, d, itemsize), dense * itemsize))]


class AllGather(Aggregator):
    """All-gather of the workers' compressed messages, which every worker averages locally, and an all-reduce of the
    uncompressed part (such as small tensors)."""

    def average(
        self, channel: Communicator, v: Tensor, dense: Dense, *, seed: int, step: int, flag: int | None = None
    ) -> Averaged:
        if not len(v):
            return Averaged((), (), mean_of_dense(channel, dense_of(dense, ())))
        own = self.compressor.encode(v, seed=self._seed_of(channel.group.rank, seed), step=step)
        mean: list[Term] = []
        gathered: list[Parts] = []
        invalid, most = Invalid(), most_bytes(len(v), own.parts)
        with invalid.of(None):
            gathered = channel.gather(own.parts, fixed_size=self.compressor.fixed_size, most=most)
        for worker, parts in enumerate(gathered):
            message = own
            with invalid.of(worker):
                if worker != channel.group.rank:
                    message = self.compressor.receive(parts, len(v), seed=self._seed_of(worker, seed), step=step)
                mean += self._terms(message, len(v), 1.0 / channel.group.size)
        # The uncompressed part is averaged last, so that a NaN in it reports an invalid message to all workers.
        sent = self._terms(own, len(v))
        mean_dense = mean_of_dense(channel, dense_of(dense, sent), invalid, flag)
        return Averaged(sent, tuple(mean), mean_dense, invalid)

    def collectives(self, d: int, dense: int, workers: int, itemsize: int) -> list[Collective]:
        sizes = 0 if self.compressor.fixed_size or not d else 8 * part_count(self.compressor, d)
        message = message_bytes(self.compressor, d, itemsize) if d else 0
        return [RingAllGather(sizes), RingAllGather(message), RingAllReduce((dense * itemsize,))]

    def work(self, d: int, workers: int) -> list[Work]:
        # A worker adds its own message without decoding it.
        return [Work(self.compressor, d, encode=1, decode=workers - 1, add=2)]


class SharedSupportAllReduce(Aggregator):
    """An all-reduce of sketches, and then an all-reduce of the exact values at the coordinates that the mean sketch
    selects. The mean sketch is identical on all workers, and so are these coordinates. The method follows Ivkin et al.
    2019 (SketchTopK) and ARC-TopK (SharedTopK)."""

    compressor: SharedSupport

    def average(
        self, channel: Communicator, v: Tensor, dense: Dense, *, seed: int, step: int, flag: int | None = None
    ) -> Averaged:
        d, compressor = len(v), self.compressor
        if not d:
            return Averaged((), (), mean_of_dense(channel, dense_of(dense, ())))
        drawn = compressor.draw(d, seed=seed, step=step)
        sketch = compressor.sketch(v, drawn)
        if len(sketch):
            sketch = channel.mean(sketch, "sketch")
        places = compressor.places(sketch, drawn, d)
        own = places.gather(v)
        # C(v) depends on the mean of the values, so a `dense` computed from C(v) needs a separate all-reduce.
        with_values = dense if isinstance(dense, Tensor) else v[:0]
        mean, mean_dense = mean_with_dense(channel, own, "values", with_values)
        kept = compressor.keep(places, mean, d)
        sent, reduced = (self._terms(Message({"values": values}, kept), d) for values in (own, mean))
        if not isinstance(dense, Tensor):
            mean_dense = mean_of_dense(channel, dense(sent))
        return Averaged(sent, reduced, mean_dense)

    def collectives(self, d: int, dense: int, workers: int, itemsize: int) -> list[Collective]:
        sketch, values = (part.nbytes(itemsize) for part in self.compressor.expected_parts(d).values())
        return [RingAllReduce((sketch,)), RingAllReduce((values, dense * itemsize))]


class LowRankAllReduce(Aggregator):
    """PowerSGD's two all-reduces (Vogels et al. 2019, Algorithm 1). The second one includes the uncompressed part.

    P is an orthonormal basis of the columns of M Q, with M the mean of the workers' matrices M_i. All workers apply
    P P^T M. Worker i subtracts P P^T M_i, the projection of its own matrix, from its error memory. PowerSGD subtracts
    P P^T M from every M_i, which lets differences between workers grow without bound. Q is (P^T M)^T of the last step
    (the warm start) plus a tenth of a fresh Gaussian matrix, identical on all workers, so that Q recovers lost
    directions.
    """

    compressor: LowRank

    def __init__(self, compressor: LowRank) -> None:
        super().__init__(compressor)
        # The warm starts of all matrices, and a bool[] that is True if all warm starts are valid; None: there are no
        # warm starts.
        self._warm: tuple[list[Tensor], Tensor] | None = None

    def average(
        self, channel: Communicator, v: Tensor, dense: Dense, *, seed: int, step: int, flag: int | None = None
    ) -> Averaged:
        compressor, d = self.compressor, len(v)
        matrices = compressor.matrices(v)
        # If there is a valid warm start, Q is the warm start plus a tenth of a fresh Gaussian matrix. Otherwise Q is
        # that Gaussian matrix.
        qs = fresh = compressor.gaussian(v, seed=seed, step=step)
        if self._warm and [q.shape for q in self._warm[0]] == [f.shape for f in fresh]:
            qs = [torch.where(self._warm[1], q + 0.1 * f, f) for q, f in zip(self._warm[0], fresh, strict=True)]
        # The first all-reduce: the mean of M_i Q over workers, M Q. P is an orthonormal basis of the columns of M Q.
        products = [m @ q for m, q in zip(matrices, qs, strict=True)]
        if d:
            flat = channel.mean(torch.cat([p.reshape(-1) for p in products]), "left")
            pieces = torch.split(flat, [p.numel() for p in products])
            products = [piece.view(p.shape) for piece, p in zip(pieces, products, strict=True)]
        # The second all-reduce: the mean of P^T M_i. This worker's C(v) is P P^T M_i; all workers apply P P^T M.
        own = compressor.message(matrices, [orthonormal(scaled(p)) for p in products])
        dense = dense_of(dense, self._terms(own, d))
        right = own.parts["right"] if d else dense[:0]
        mean, mean_dense = mean_with_dense(channel, right, "right", dense)
        message = Message({"left": own.parts["left"], "right": mean}) if d else own
        self._warm = self._next(message, qs)
        return Averaged(self._terms(own, d), self._terms(message, d), mean_dense)

    def collectives(self, d: int, dense: int, workers: int, itemsize: int) -> list[Collective]:
        left, right = self.compressor.factor_sizes(d)
        return [RingAllReduce((left * itemsize,)), RingAllReduce((right * itemsize, dense * itemsize))]

    def _next(self, message: Message, qs: list[Tensor]) -> tuple[list[Tensor], Tensor] | None:
        """Return the matrices from which the next exchange starts, and a bool[] that is True if they are valid.

        The start matrix of a matrix M is (P^T M)^T divided by its largest magnitude, where P and P^T M are the low-rank
        factors of M in `message`. The bool[] is False if any start matrix is zero or non-finite. `qs` are the start
        matrices of this exchange. Returns None if the compressor has no matrix shapes.
        """
        right, following = message.parts["right"], []
        for q, (n, m) in zip(qs, self.compressor.shapes, strict=False):
            size = q.numel() or n * m
            following.append(scaled(right[:size].view(-1, m).T).clone() if q.numel() else q)
            right = right[size:]
        # A compressor that `for_tensors` has not bound to shapes has no warm start: Q stays Gaussian.
        if len(following) != len(qs):
            return None
        valid = [q.any() & q.isfinite().all() for q in following if q.numel()]
        return (following, torch.stack(valid).all()) if valid else None

    def reset(self) -> None:
        self._warm = None

    def snapshot(self) -> Any:
        # The list of start matrices is replaced at every exchange and never modified in place, so no copy is needed.
        return self._warm

    def restore(self, snapshot: Any) -> None:
        self._warm = snapshot

    def state_dict(self) -> dict[str, Any]:
        return {"qs": self._warm[0] if self._warm and self._warm[1] else []}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        warm = [q.to(device, copy=True) for q in state.get("qs", [])]
        self._warm = (warm, torch.ones((), dtype=torch.bool, device=device)) if warm else None


def mean_of_dense(
    channel: Communicator, dense: Tensor, invalid: Invalid | None = None, flag: int | None = None
) -> Tensor:
    """Return the mean of the uncompressed part over workers. If the part is empty, there is no collective. If `invalid`
    has recorded the error of an invalid message, this worker sends NaN as dense[flag], or raises the error if `flag` is
    None."""
    mine = dense.clone()
    if invalid is not None and flag is not None:
        invalid.report_in(mine[flag])
    elif invalid is not None and (error := invalid.error) is not None:
        raise error
    return channel.mean(mine, "dense") if len(mine) else mine


def dense_of(dense: Dense, own: tuple[Term, ...]) -> Tensor:
    return dense if isinstance(dense, Tensor) else dense(own)


def mean_with_dense(channel: Communicator, part: Tensor, name: str, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Average a part of a message and the uncompressed part over workers in one all-reduce, and return both means. The
    bytes of `part` are counted under `name`."""
    mean = channel.mean(torch.cat([part, dense]), {name: len(part), "dense": len(dense)})
    return mean[: len(part)], mean[len(part) :]
