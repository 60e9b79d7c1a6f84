"""Participation in rounds of local updates: the weights of the workers, and a random sample of workers per round.

Both follow federated averaging (McMahan et al. 2017, Algorithm 1). There, m = ceil(C W) of the W clients are drawn at
random in each round, for a fraction C. The mean of their updates is weighted by n_k, the number of examples of client
k.
"""

import math
from collections.abc import Sequence

import torch

from packsaddle.comm.communicator import Communicator
from packsaddle.numerics.devices import wide
from packsaddle.numerics.seeds import mix, sample_without_replacement


class Participation:
    """Computes this worker's share: the factor W w_i / sum_j w_j of its update in the mean over the W workers.

    The sum is over the workers in a round. `weight` is this worker's w_i, or None on all workers for equal weights;
    `sample` is the fraction of the workers that are in each round, identical on all workers; `seed`, also identical,
    sets the random samples.
    """

    def __init__(self, weight: float | None, sample: float, workers: int, rank: int, seed: int) -> None:
        self.rank, self._seed = rank, mix(seed, _OF_ROUNDS)
        self.weights, self._mine = [1.0] * workers, weight
        self.samples = sample < 1
        # Subtract a small number before rounding up, since the rounding error of the product must not add a worker:
        # 0.07 of 100 workers are 7, not 8.
        self._chosen = max(1, math.ceil(sample * workers - 1e-9))

    def exchange(self, channel: Communicator, device: torch.device) -> None:
        """Gather the weights of all workers; collective. No-op for equal weights."""
        if self._mine is not None:
            mine = {"weight": torch.tensor([self._mine], dtype=wide(device), device=device)}
            gathered = channel.gather(mine, fixed_size=True, purpose="start")
            self.weights = [float(parts["weight"][0]) for parts in gathered]

    def members(self, step: int) -> list[int]:
        """Return the sorted ranks of the workers in the random sample of the exchange that begins at the time `step` of
        the schedule, in ticks. The result is identical on all workers."""
        chosen = sample_without_replacement(len(self.weights), self._chosen, seed=self._seed, step=step)
        return sorted(chosen.tolist())

    def share(self) -> float:
        """Return the factor W w_i / sum_j w_j of this worker's update in a mean over all W workers, sampled or not."""
        return share_of(self.weights, self.rank)

    def weights_after(self, step: int) -> list[float]:
        """Return the weights of the workers in the exchange that begins at the time `step` of the schedule, in ticks.
        The list is by rank; the weight of a worker that is not in the random sample is 0."""
        members = self.members(step) if self.samples else range(len(self.weights))
        return [w if i in members else 0.0 for i, w in enumerate(self.weights)]


def share_of(weights: Sequence[float], rank: int) -> float:
    """Return the factor W w_i / sum_j w_j for worker i = `rank`, where w are the weights of the W workers. The plain
    mean of updates that are scaled by these factors is the weighted mean of the updates."""
    if len(set(weights)) == 1:
        return 1.0
    return len(weights) * weights[rank] / sum(weights)


_OF_ROUNDS = 0x5A3F  # mixed into the seed, so that samples of workers do not depend on compressors' random numbers
