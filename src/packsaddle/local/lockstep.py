"""The check before each collective of local updates that all workers make the same call, after the same step.

Workers that differ would pair collectives of different sizes, for which gloo aborts the process and NCCL hangs.
"""

import logging
from typing import Literal, get_args

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator

_log = logging.getLogger("packsaddle")
Call = Literal["exchanges a round", "calls flush()", "calls error()", "compares anchors", "checks its first step"]
_CALLS = get_args(Call)
HEADER = 16  # bytes of a header: a call and a number of steps, int64[2]


class Lockstep:
    """Headers of all workers, gathered ahead of a collective and compared; the ledger has their bytes as "guard"."""

    def __init__(self, channel: Communicator, device: torch.device) -> None:
        self._channel, self._device = channel, device
        self._has_warned = False

    def gather(self, call: Call, steps: int) -> Tensor:
        """Return the call and the steps of every worker, int64[W, 2]; collective. On a GPU the host does not wait."""
        mine = torch.tensor([_CALLS.index(call), steps], device=self._device)
        self._channel.step = max(self._channel.step, steps - 1)
        gathered = self._channel.gather({"header": mine}, fixed_size=True, purpose="guard")
        return torch.stack([parts["header"] for parts in gathered])

    def check(self, headers: Tensor) -> None:
        """Raise RuntimeError if the calls of `headers`, int64[W, 2], differ, or the steps of a round.

        If workers flush after unequal numbers of steps, but of equal rounds, rank 0 logs a warning, once.
        """
        # The first worker with another call than worker 0, else with another number of steps.
        rows = headers.tolist()
        call, steps = rows[0]
        unlike = [worker for worker, row in enumerate(rows) if row[0] != call]
        unlike = unlike or [worker for worker, row in enumerate(rows) if row[1] != steps]
        if not unlike:
            return
        their_call, their_steps = rows[unlike[0]]
        found = (
            f"worker 0 {_CALLS[call]} after step {steps}, and worker {unlike[0]} {_CALLS[their_call]} after step "
            f"{their_steps}"
        )
        if call != their_call or _CALLS[call] == "exchanges a round":
            raise RuntimeError(
                f"{found}: all workers must make the same calls after the same number of optimizer steps. Give them "
                f"data of equal length (drop_last=True, DistributedSampler), and pass scaler= if a GradScaler skips "
                f"steps"
            )
        # Unequal steps in equal rounds pair collectives of one size, so no worker hangs.
        if self._channel.group.rank == 0 and not self._has_warned:
            self._has_warned = True
            _log.warning("%s: their numbers of rounds are equal, but not those of optimizer steps", found)
