"""Selection of the aggregator for a compressor and an exchange. With exchange "auto", the selection depends on the
number of bytes that the busiest worker would send."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from packsaddle.comm.aggregators import Aggregator, AllGather, AllReduce, LowRankAllReduce, SharedSupportAllReduce
from packsaddle.comm.owner_aggregators import Coordinator, TwoWay
from packsaddle.compressors import Compressor

# The aggregator class for each value of a compressor's attribute `aggregation`.
_DIRECT: Mapping[str, Callable[[Any], Aggregator]] = {
    "all-reduce": AllReduce,
    "all-gather": AllGather,
    "sketched all-reduce": SharedSupportAllReduce,
    "projected all-reduce": SharedSupportAllReduce,
    "low-rank all-reduce": LowRankAllReduce,
}

# "auto" selects "two-way" instead of "direct" only if "two-way" sends at most this fraction of the bytes of "direct".
_CLEARLY_LESS = 0.95

Exchange = Literal["direct", "auto", "all-reduce", "all-gather", "two-way", "coordinator", "senders"]


@dataclass(frozen=True)
class Choice:
    """The selected aggregator, its name, and the reason for the selection."""

    aggregator: Aggregator
    name: str
    reason: str


def warn_if_nothing_compressed(compressor: Compressor, d: int, dense_below: int, *, stacklevel: int) -> None:
    """Warn if the number d of compressed coordinates is 0, so that everything is sent uncompressed. There is no
    warning for a lossless compressor. `stacklevel` is the value that the caller of this function would pass to
    `warnings.warn`."""
    if d == 0 and not compressor.lossless:
        warnings.warn(
            f"nothing will be compressed: every tensor is a vector or below dense_below={dense_below} elements "
            f"(dense_below=0 compresses everything)",
            stacklevel=stacklevel + 1,
        )


def check_exchange(exchange: str, back: Compressor | None) -> None:
    """Raise ValueError if `exchange` is unknown, or if `back` is given and `exchange` is neither "two-way" nor
    "coordinator". `back` is the compressor of the means that are sent back to the workers."""
    if exchange not in get_args(Exchange):
        raise ValueError(f"exchange must be one of {', '.join(get_args(Exchange))}, got {exchange!r}")
    if back is not None and exchange not in ("two-way", "coordinator"):
        raise ValueError(f'back is for exchange "two-way" or "coordinator", not {exchange!r}')


def choose(
    compressor: Compressor,
    exchange: str,
    *,
    d: int,
    dense: int,
    workers: int,
    itemsize: int = 4,
    back: Compressor | None = None,
) -> Choice:
    """Return the aggregator for vectors of d compressed and `dense` uncompressed coordinates, with its name and the
    reason for the selection.

    The values of `exchange` are:

    - "direct": the exact mean of the workers' messages, with the aggregator that the compressor's attribute
      `aggregation` names. It uses one all-reduce if the compressor is linear, two all-reduces for SketchTopK,
      SharedTopK and LowRank, and an all-gather for all other compressors.
    - "senders": the same aggregator. Local updates then divide each coordinate of the sum by the number of its senders.
    - "all-reduce" and "all-gather": the exact mean by this collective.
    - "two-way": each worker averages a chunk of the vector, and may compress the mean of the chunk with `back`.
    - "coordinator": rank 0 averages the whole vector, and may compress the mean with `back`.
    - "auto": as "direct". But if that is an all-gather, and with "two-way" the busiest worker is predicted to send over
      5% fewer bytes, then as "two-way".

    Raises ValueError if the exchange is unknown, or if the compressor does not support the exchange or vectors of d
    coordinates.
    """
    check_exchange(exchange, back)
    name = compressor.aggregation
    if name not in _DIRECT:
        raise ValueError(f"aggregation of {compressor!r} must be one of {', '.join(_DIRECT)}, got {name!r}")
    direct = _DIRECT[name](compressor)
    # The exact mean, with the aggregator that the compressor names. For "senders", local updates convert this mean to
    # one in which each coordinate is divided by the number of workers that sent it, instead of by W.
    if exchange in ("direct", "senders", name):
        choice = Choice(direct, name, "asked for")
    elif name not in get_args(Exchange) and exchange != "auto":
        raise ValueError(f"exchange of {type(compressor).__name__} is its own {name}, it cannot be {exchange!r}")
    elif exchange == "all-reduce":
        raise ValueError(f'exchange "all-reduce" needs a linear compressor, and {compressor!r} is not')
    elif exchange == "all-gather":
        choice = Choice(AllGather(compressor), exchange, "asked for")
    elif exchange in ("two-way", "coordinator"):
        owners = TwoWay if exchange == "two-way" else Coordinator
        choice = Choice(owners(compressor, back), exchange, "asked for")
    else:
        # "auto": minimize the bytes that the busiest worker sends. The exact mean needs fewer messages than a two-way
        # exchange, and is preferred unless the two-way exchange saves 5% of these bytes. A two-way exchange needs at
        # least one coordinate per worker.
        candidates: dict[str, Aggregator] = {name: direct}
        if name == "all-gather" and d >= workers:
            candidates["two-way"] = TwoWay(compressor)
        costs = {n: p.most_sent(d, dense, workers, itemsize) for n, p in candidates.items()}
        best = min(costs, key=lambda n: costs[n] * (_CLEARLY_LESS if n == name else 1.0))
        others = ", ".join(f"{n} {costs[n]:,}" for n in costs if n != best) or "nothing else applies"
        reason = f"{costs[best]:,} bytes sent per exchange by the busiest worker; {others}"
        choice = Choice(candidates[best], best, reason)
    choice.aggregator.validate(d, workers)
    return choice
