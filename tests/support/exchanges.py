"""A function that exchanges one vector by any aggregator, in the current group of workers."""

from typing import Any

import torch
from torch import Tensor

from packsaddle import Compressor
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.select_aggregator import choose


def decoded(terms: Any, d: int) -> Tensor:
    """Return the vector that an aggregator's average represents, float[d]: the sum of its decoded terms."""
    out = torch.zeros(d)
    for term in terms:
        term.add_to(out, 1.0)
    return out


def exchanged(
    compressor: Compressor,
    vs: list[Tensor],
    *,
    exchange: Any = "direct",
    back: Compressor | None = None,
    dense: int = 2,
    steps: int = 1,
    seed: int = 7,
) -> dict[str, Any]:
    """Average the workers' vectors `vs`, one per rank, in `steps` exchanges with uncompressed parts of size `dense`.

    The uncompressed part of each worker consists of its rank. Returns the results of the last exchange, this worker's
    vector, and the counted and the predicted bytes.
    """
    channel, d = Communicator(resolve(None), Ledger()), len(vs[0])
    rank, workers = channel.group.rank, channel.group.size
    aggregator = choose(compressor, exchange, d=d, dense=dense, workers=workers, back=back).aggregator
    for step in range(steps):
        channel.step = step
        averaged = aggregator.average(channel, vs[rank], torch.full((dense,), float(rank)), seed=seed, step=step)
    return {
        "v": vs[rank],
        "own": decoded(averaged.own, d),
        "mean": decoded(averaged.mean, d),
        "dense": averaged.dense,
        "bytes": channel.ledger.total,
        "purposes": sorted(channel.ledger.by_purpose),
        "predicted": aggregator.wire(d, dense, rank, workers, 4),
        "protocol": aggregator,
    }
