"""Several optimizers as one, for a framework that takes one: transformers' Trainer, Lightning's automatic optimization.

`LocalUpdates` itself takes a list.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class JoinedOptimizer(Optimizer):
    """Several optimizers of different parameters as one; it has their groups and their state.

    Muon for the matrices of the hidden layers and AdamW for all else, say, with one scheduler for both. `members` are
    the optimizers, and `step` steps them in that order.

    >>> import torch
    >>> from packsaddle.integrations import JoinedOptimizer
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = JoinedOptimizer([torch.optim.Muon([model.weight]), torch.optim.AdamW([model.bias])])
    >>> [type(member).__name__ for member in optimizer.members], len(optimizer.param_groups)
    (['Muon', 'AdamW'], 2)
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = list(members)
        self._sizes = [len(member.param_groups) for member in members]
        super().__init__([group for member in members for group in member.param_groups], {})
        for member in members:
            self.state.update(member.state)
        self._share()

    def _share(self) -> None:
        """Set the groups and the state of the members to those of the whole."""
        start = 0
        for member, size in zip(self.members, self._sizes, strict=True):
            member.param_groups = self.param_groups[start : start + size]
            member.state = self.state
            start += size

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all of them, after the closure, whose value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the whole, and with it that of the members."""
        super().load_state_dict(state_dict)
        self._share()
