"""A site: the processes that together are one worker. All decisions about a round, such as whether it is committed,
must be identical on the processes of a site."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.comm.group import Group, Solo
from packsaddle.comm.sharding import is_split
from packsaddle.comm.sites import fail_together
from packsaddle.local.fragment import Fragment


class Site(ObjectCollectives):
    """The processes of this worker, and their collectives.

    Args:
        within: the group of the processes; None: the worker is one process.
        fragments: the parts of the model that are exchanged separately. Each process has a shard of every parameter, or
            the whole model.
    """

    def __init__(self, within: Group | None, fragments: Sequence[Fragment]) -> None:
        splits = {is_split(p) for part in fragments for p in part.parameters}
        if within is not None and len(splits) > 1:
            raise ValueError("parameters must all be sharded in a site with a manager, or none, and some are not")
        super().__init__(within or Solo(), torch.device("cpu"))
        self.size = self.group.size
        # True if the site has several processes, each of which has the whole model.
        self.has_replicas = within is not None and splits == {False}

    def totals(self, *numbers: int) -> list[int]:
        """Return each of the `numbers` summed over the processes of this worker; collective over them. The sums are
        int64, modulo 2^64."""
        if self.size == 1:
            return list(map(int, numbers))
        totals = torch.tensor(numbers, dtype=torch.int64)
        self.group.all_reduce(totals)
        return totals.tolist()

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is True on at least one of this worker's processes; collective over them."""
        return self.totals(flag)[0] > 0

    def fails_together(self) -> AbstractContextManager[None]:
        """Context manager that raises an error on all processes of this worker if its block raises an error on one of
        them."""
        return fail_together(self.group)
