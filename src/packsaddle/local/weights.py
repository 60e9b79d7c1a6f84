"""The weights of the workers in the mean of their updates.

The weighted mean is that of federated averaging (McMahan et al. 2017, Algorithm 1), in which the weight of a client is
its number of examples.
"""

from collections.abc import Sequence

import torch

from packsaddle.comm.communicator import Communicator
from packsaddle.numerics.devices import wide


def gather_weights(channel: Communicator, weight: float, device: torch.device) -> list[float]:
    """Gather the weights of all workers, by rank; collective. `weight` is this worker's."""
    mine = {"weight": torch.tensor([weight], dtype=wide(device), device=device)}
    return [float(parts["weight"][0]) for parts in channel.gather(mine, fixed_size=True, purpose="start")]


def share_of(weights: Sequence[float], rank: int) -> float:
    """Return the factor W w_i / sum_j w_j for worker i = `rank`, where w are the weights of the W workers. The plain
    mean of updates that are scaled by these factors is the weighted mean of the updates."""
    if len(set(weights)) == 1:
        return 1.0
    return len(weights) * weights[rank] / sum(weights)
