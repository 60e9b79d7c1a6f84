"""Several optimizers as one, for frameworks that accept only one: transformers' Trainer, Lightning's automatic mode.

`LocalUpdates` itself accepts a list.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class JoinedOptimizer(Optimizer):
    """Several optimizers of different parameters as one optimizer, with all their groups and states.

    For example Muon for the hidden layers' matrices and AdamW for the other parameters, with one scheduler for both.
    `members` are the optimizers; `step` steps them in that order.

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
        """Set the parameter groups and the state of the members to those of this optimizer."""
        start = 0
        for member, size in zip(self.members, self._sizes, strict=True):
            member.param_groups = self.param_groups[start : start + size]
            member.state = self.state
            start += size

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure, if any, then step all members. Returns the value of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `state_dict`, which this class saved, into all members."""
        super().load_state_dict(state_dict)
        self._share()
