"""Workers with different numbers of steps, by torch's `Join`: one that has ended takes part in the others' rounds.

`Join` counts the workers that are still training by an all-reduce, which they announce before each step with a
collective. An ended worker runs the same step without training: its next round has its last local update, and later
ones only its error memory. The mean is always of all workers, so no update is lost.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from packsaddle.comm.group import Group


class EndedWorker(JoinHook):
    """The steps of a worker that has ended: `follow` runs one with a collective; `align` is called when all ended."""

    def __init__(self, follow: Callable[[], object], align: Callable[[], object]) -> None:
        self._follow, self._align = follow, align

    def main_hook(self) -> None:
        """Take part in the next collective of the workers that are still training."""
        self._follow()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Set the number of steps to that of the last worker, so that the next rounds are due at one step."""
        self._align()


def check_joins(group: Group, *, elastic: bool, **options: Any) -> None:
    """Raise RuntimeError unless `Join` supports this group, and ValueError for an option of `Join` without effect."""
    if elastic:
        raise RuntimeError("Join is for a fixed set of workers: with a manager, a worker that has ended calls leave()")
    if not hasattr(group, "process_group"):
        raise RuntimeError("Join needs a process group: call torch.distributed.init_process_group before LocalUpdates")
    if not options.get("divide_by_initial_world_size", True):
        raise ValueError("divide_by_initial_world_size must be True: rounds average the updates of all workers")


def announce(local: Joinable) -> None:
    """Announce a collective to workers that have ended; no-op outside of `Join`.

    Raises RuntimeError if other objects are joined as well: an ended worker would run their collectives once a round.
    """
    if not local._join_config.enable:
        return
    if not local._join_config.is_first_joinable:
        raise RuntimeError("Join must have one LocalUpdates and nothing else, Join([local]), and it is not the first")
    Join.notify_join_context(local)


def most_steps(group: Group, steps: int, device: torch.device) -> int:
    """Return the largest number of steps of a worker; collective."""
    return max(int(found) for found in group.all_gather(torch.tensor([steps], device=device)))
