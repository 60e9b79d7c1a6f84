"""Support for torch's `Join`, for workers with different numbers of steps: ended workers still join every exchange.

Before a step with collectives, each worker announces these collectives by an all-reduce, in which `Join` counts the
workers that still train. An ended worker runs the same step without training: in its first exchange after the end it
sends its last local update (the change of its parameters), and later only its error memory (the part of its updates
that compression has not sent yet). Each mean is over all workers, so no update is lost.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from packsaddle.comm.group import Group


class JoinableSteps(Joinable):
    """An object for torch's `Join` that counts the steps of this worker's optimizer. It does not support `elastic`
    workers, which may join and leave. `equal` is True if all workers make the same number of steps between two
    exchanges."""

    steps: int

    def __init__(self, group: Group, device: torch.device, *, elastic: bool, equal: bool) -> None:
        super().__init__()
        self._group, self._device, self._has_manager, self._is_equal = group, device, elastic, equal

    @abstractmethod
    def _attempted(self, *, has_ended: bool = False) -> bool:
        """Count one step, and run an exchange if one is due. `has_ended` is True on a worker that no longer trains.
        Returns True if the step had collectives."""

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return the hook for torch's `Join`, as in `with Join([local]):` around the training loop. Raises RuntimeError
        if the workers have a torchft Manager or no process group, and ValueError if divide_by_initial_world_size is
        False."""
        if self._has_manager:
            raise RuntimeError("Join is for fixed workers: with a manager, a worker that has ended calls leave()")
        if self.join_process_group is None:
            raise RuntimeError("Join needs a process group: call init_process_group before LocalUpdates is made")
        if not kwargs.get("divide_by_initial_world_size", True):
            raise ValueError("divide_by_initial_world_size must be True: rounds average the updates of all workers")
        return EndedWorker(self)

    @property
    def join_device(self) -> torch.device:
        # `Join` calls torch's collectives directly. Unlike `Group`, they do not copy tensors of an accelerator to the
        # host, so give them a CPU tensor if the group needs such copies.
        return torch.device("cpu") if self._group.stages(self._device) else self._device

    @property
    def join_process_group(self) -> Any:
        return getattr(self._group, "process_group", None)

    def _announce(self) -> None:
        """Announce this worker's next collectives to the workers that have ended, so that the ended workers join
        these collectives. No-op outside of `Join`. Raises RuntimeError if `Join` has another object before this one:
        ended workers would run this object's collectives only at steps of the first object."""
        if not self._join_config.enable:
            return
        if not self._join_config.is_first_joinable:
            raise RuntimeError("Join must have one LocalUpdates and nothing else: Join([local])")
        work: Any = Join.notify_join_context(self)  # None if `Join` is disabled
        if work is not None:
            # Wait before `work` is freed, since it holds the tensor of the all-reduce.
            work.wait()


class EndedWorker(JoinHook):
    """The hook of a worker that has ended its training: it joins the exchanges of the other workers."""

    def __init__(self, of: JoinableSteps) -> None:
        self._of = of

    def main_hook(self) -> None:
        """Advance the step count to the next step with collectives, and join these collectives."""
        while not self._of._attempted(has_ended=True):
            pass

    def post_hook(self, is_last_joiner: bool) -> None:
        """Set the step count to the maximum over workers, so that later exchanges are due at the same step on all of
        them. No-op if workers may make different numbers of steps between two exchanges."""
        mine = torch.tensor([self._of.steps], device=self._of.join_device)
        steps = [int(n) for n in self._of._group.all_gather(mine)]
        self._of.steps = max(steps) if self._of._is_equal else self._of.steps
