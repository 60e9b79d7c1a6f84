"""Workers with different numbers of steps, by torch's `Join`: one that has ended takes part in the others' rounds.

`Join` counts the workers that are still training by an all-reduce, which they announce before each step with a
collective. An ended worker runs the same step without training: its next round has its last local update, and later
ones only its error memory. The mean is always of all workers, so no update is lost.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from packsaddle.comm.group import Group


class JoinableSteps(Joinable):
    """A Joinable whose steps are counted, on workers of a group; `elastic` workers are not supported."""

    steps: int

    def __init__(self, group: Group, device: torch.device, *, elastic: bool) -> None:
        super().__init__()
        self._group, self._device, self._has_manager = group, device, elastic

    @abstractmethod
    def _attempted(self, *, has_ended: bool = False) -> bool:
        """Count a step, on a worker that trains or `has_ended`; return True if it had collectives."""

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return the hook for torch's `Join`, as in `with Join([local]):` around the training loop.

        Raises RuntimeError with a manager or without a process group, and ValueError for options that round averages
        do not support.
        """
        if self._has_manager:
            raise RuntimeError("Join is for fixed workers: with a manager, a worker that has ended calls leave()")
        if self.join_process_group is None:
            raise RuntimeError("Join needs a process group: call init_process_group before LocalUpdates is made")
        if not kwargs.get("divide_by_initial_world_size", True):
            raise ValueError("divide_by_initial_world_size must be True: rounds average the updates of all workers")
        return EndedWorker(self)

    @property
    def join_device(self) -> torch.device:
        """The device of exchanges."""
        return self._device

    @property
    def join_process_group(self) -> Any:
        """The process group of the workers; None without one."""
        return getattr(self._group, "process_group", None)

    def _announce(self) -> None:
        """Announce a collective to workers that have ended; no-op outside of `Join`.

        Raises RuntimeError for a second object in `Join`: an ended worker would run its collectives once a round.
        """
        if not self._join_config.enable:
            return
        if not self._join_config.is_first_joinable:
            raise RuntimeError("Join must have one LocalUpdates and nothing else: Join([local])")
        Join.notify_join_context(self)


class EndedWorker(JoinHook):
    """The steps of a worker that has ended, while others train."""

    def __init__(self, of: JoinableSteps) -> None:
        self._of = of

    def main_hook(self) -> None:
        """Count steps up to the next one with collectives, and take part in these."""
        while not self._of._attempted(has_ended=True):
            pass

    def post_hook(self, is_last_joiner: bool) -> None:
        """Set the number of steps to the largest of all workers, so that the next rounds are due at one step."""
        mine = torch.tensor([self._of.steps], device=self._of.join_device)
        self._of.steps = max(int(steps) for steps in self._of._group.all_gather(mine))
