"""One exchange of one vector by any aggregator, in the present group."""

from typing import Any

import torch
from torch import Tensor

from packsaddle import Compressor
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.select_aggregator import choose


def decoded(terms: Any, d: int) -> Tensor:
    """Return the sum of an average's terms, float[d]."""
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
    """Average this worker's vector of `vs` with the others' `steps` times, and its rank in `dense` coordinates.

    Return the last exchange's results, this worker's vector, and the bytes that were counted and predicted.
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
