"""Several optimizers as one, for frameworks that accept one."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.feedback.optimizers import as_optimizers, parameters_of
from packsaddle.local.inner import load_states


class JoinedOptimizer(Optimizer):
    """Several optimizers of different parameters as one optimizer, with all their groups and states.

    For frameworks that accept only one: transformers' Trainer, Lightning's automatic mode. `members` are the
    optimizers; `step` steps them in that order. A state dict is that of one torch optimizer with all groups, made of
    the members' own state dicts. Raises RuntimeError if `LocalUpdates` has this optimizer, and a member is stepped
    alone.

    >>> import torch
    >>> from packsaddle.integrations import JoinedOptimizer
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = JoinedOptimizer([torch.optim.Muon([model.weight]), torch.optim.AdamW([model.bias])])
    >>> [type(member).__name__ for member in optimizer.members], len(optimizer.param_groups)
    (['Muon', 'AdamW'], 2)
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = list(as_optimizers(list(members)))
        self._steps_members = self._is_made = False
        super().__init__(parameters_of(self.members), {})
        self._is_made = True
        self._watch_members()

    def _watch_members(self) -> None:
        def check(member: Optimizer, args: object, kwargs: object) -> None:
            if getattr(self, "exchanged_by", None) is not None and not self._steps_members:
                raise RuntimeError(
                    f"{type(member).__name__} is a member of a JoinedOptimizer that LocalUpdates counts the steps of: "
                    f"step the JoinedOptimizer, or make LocalUpdates with the list of its members"
                )

        outside: Any = torch.compiler.disable
        for member in self.members:
            member.register_step_pre_hook(outside(check))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members, in their order."""
        return [group for member in self.members for group in member.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Do nothing: torch sets it at construction."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The states of all parameters; those of a member are in its own `state`."""
        return defaultdict(dict, {p: entry for member in self.members for p, entry in member.state.items()})

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        """Do nothing: torch sets it at construction."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise RuntimeError: no member would step `param_group`."""
        if self._is_made:  # torch calls it at construction
            raise RuntimeError("a group must be added to a member of JoinedOptimizer before they are joined")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure, if any, then step all members. Returns the value of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._steps_members = True
        try:
            for member in self.members:
                member.step()
        finally:
            self._steps_members = False
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the members' state dicts as one. What a member has besides "state" and "param_groups" is in a list
        "members"."""
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        others = []
        start = 0
        for member in self.members:
            saved = dict(member.state_dict())
            states |= {start + i: entry for i, entry in saved.pop("state").items()}
            mine = saved.pop("param_groups")
            groups += [{**group, "params": [start + i for i in group["params"]]} for group in mine]
            others.append(saved)
            start += len(parameters_of([member]))
        return {"state": states, "param_groups": groups} | ({"members": others} if any(others) else {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load `state_dict`, which this class saved, into all members. Raises ValueError, with nothing changed, if
        their groups are others."""
        groups, others = state_dict["param_groups"], state_dict.get("members") or [{} for _ in self.members]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state has {len(groups)} parameter groups, and there are {len(self.param_groups)}")
        states, first, start = [], 0, 0
        for member, other in zip(self.members, others, strict=True):
            mine = groups[first : first + len(member.param_groups)]
            n = sum(len(group["params"]) for group in mine)
            states.append(
                {
                    **other,
                    "state": {i - start: e for i, e in state_dict["state"].items() if start <= i < start + n},
                    "param_groups": [{**group, "params": [i - start for i in group["params"]]} for group in mine],
                }
            )
            first, start = first + len(mine), start + n
        load_states(self.members, states)

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "members": self.members, "_is_made": True, "_steps_members": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_members()
