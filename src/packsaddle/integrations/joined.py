"""`JoinedOptimizer`: one optimizer that steps several optimizers, for frameworks that accept only one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.feedback.exchanging import exchange_of
from packsaddle.feedback.optimizers import CompositeOptimizer, as_optimizers, load_states, parameters_of


class JoinedOptimizer(CompositeOptimizer):
    """Several optimizers of different parameters, joined into one optimizer that has the parameter groups and states of
    all of them.

    It is for frameworks that accept only one optimizer, such as transformers' Trainer and Lightning's automatic mode.
    `members` is the list of the joined optimizers; `step` steps them in the order of the list. The state dict combines
    their state dicts, and has the form of one torch optimizer with the groups of all members. If a `LocalUpdates`
    exchanges this optimizer's updates, stepping a member alone raises RuntimeError.

    >>> import torch
    >>> from packsaddle.integrations import JoinedOptimizer
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = JoinedOptimizer([torch.optim.Muon([model.weight]), torch.optim.AdamW([model.bias])])
    >>> [type(member).__name__ for member in optimizer.members], len(optimizer.param_groups)
    (['Muon', 'AdamW'], 2)
    """

    # `_is_made` is True after construction, and `_steps_members` is True within `step`.
    _is_made = _steps_members = False

    def __init__(self, members: Sequence[Optimizer]) -> None:
        # `as_optimizers` raises an error if an object is not an optimizer, or if a parameter is in two optimizers.
        as_optimizers(list(members))
        self.members = list(members)
        super().__init__(parameters_of(self.members), {})
        self._is_made = True
        self._watch_members()

    def _watch_members(self) -> None:
        def check(member: Optimizer, args: object, kwargs: object) -> None:
            if exchange_of(self) is not None and not self._steps_members:
                raise RuntimeError(
                    f"{type(member).__name__} is a member of a JoinedOptimizer that LocalUpdates counts the steps of: "
                    f"step the JoinedOptimizer, or make LocalUpdates with the list of its members"
                )

        outside: Any = torch.compiler.disable
        for member in self.members:
            member.register_step_pre_hook(outside(check))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all joined optimizers (`members`), in the order of the optimizers."""
        return [group for member in self.members for group in member.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Set the parameter groups of all joined optimizers (`members`), given in the order of the optimizers. Raises
        ValueError if the number of `groups` differs from the number of groups that the optimizers have in total."""
        # Ignore the assignment by the constructor of torch's Optimizer, before `members` are joined.
        if self._is_made:
            _check_number(groups, self.param_groups)
            for member, mine in zip(self.members, _divided(groups, self.members), strict=True):
                member.param_groups = mine

    @property
    def state(self) -> Any:  # torch's optimizers have a defaultdict here, which this is not
        """The states of all parameters as one mapping from parameter to state. The entry of a parameter is stored in
        the `state` of the joined optimizer that steps this parameter."""
        return _States(self.members)

    @state.setter
    def state(self, state: Any) -> None:
        """Replace the states of all joined optimizers by the entries of `state`, a mapping from parameter to state."""
        if self._is_made:
            entries = dict(state)
            self.state.clear()
            self.state.update(entries)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise RuntimeError: a parameter group such as `param_group` must be added to one of the optimizers before
        they are joined."""
        # Ignore the calls by the constructor of torch's Optimizer, before `members` are joined.
        if self._is_made:
            raise RuntimeError("a group must be added to a member of JoinedOptimizer before they are joined")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all joined optimizers, in the order of `members`. If a closure is given, it is called once before the
        steps, and its value is returned. Otherwise the result is None."""
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
        """Return the state dicts of all joined optimizers (`members`) as one state dict. It has the entries "state" and
        "param_groups" of one optimizer with all parameters. If the optimizers' state dicts have other entries, they are
        in the list "members", which has one dict for each optimizer."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        # Number the parameters of all joined optimizers in one sequence.
        result: dict[str, Any] = {"state": {}, "param_groups": []}
        others, start = [], 0
        for member in self.members:
            saved = dict(member.state_dict())
            states, groups = saved.pop("state"), saved.pop("param_groups")
            n = sum(len(group["params"]) for group in groups)
            mine = {i: entry for i, entry in states.items() if isinstance(i, int) and 0 <= i < n}
            result["state"] |= {start + i: entry for i, entry in mine.items()}
            result["param_groups"] += [{**g, "params": [start + i for i in g["params"]]} for g in groups]
            # Collect the rest of the optimizer's state dict: keys other than "state" and "param_groups", and entries of
            # "state" that belong to no parameter.
            rest = {key: entry for key, entry in states.items() if key not in mine}
            others.append(saved | ({"state": rest} if rest else {}))
            start += n
        if any(others):
            result["members"] = others
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, result) or result
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load `state_dict`, a result of the method `state_dict`, into the joined optimizers. Raises ValueError, with
        nothing changed, if the saved parameter groups differ from those of the optimizers in number or in their numbers
        of parameters."""
        # Check the number of groups. Then divide the state dict into one for each joined optimizer, in which parameters
        # are numbered from 0.
        state: Any = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state = before(self, state) or state
        groups, others = state["param_groups"], state.get("members") or [{} for _ in self.members]
        _check_number(groups, self.param_groups)
        parts = []
        for mine, other in zip(_divided(groups, self.members), others, strict=True):
            # The saved states may have names of parameters as keys instead of numbers, as those of
            # torch.distributed.checkpoint do.
            index = {key: i for i, key in enumerate(key for group in mine for key in group["params"])}
            states = {index[key]: entry for key, entry in state["state"].items() if key in index}
            renamed = [{**group, "params": [index[key] for key in group["params"]]} for group in mine]
            parts.append({**other, "state": states | other.get("state", {}), "param_groups": renamed})
        load_states(self.members, parts)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "members": self.members, "_is_made": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_members()


def _check_number(groups: Sequence[object], here: Sequence[object]) -> None:
    if len(groups) != len(here):
        raise ValueError(f"the state has {len(groups)} parameter groups, and there are {len(here)}")


def _divided(groups: Sequence[dict[str, Any]], members: Iterable[Optimizer]) -> list[list[dict[str, Any]]]:
    """Divide `groups`, the parameter groups of all joined optimizers (`members`) in their order, into one list for each
    optimizer."""
    rest = iter(groups)
    return [list(islice(rest, len(member.param_groups))) for member in members]


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers as one mapping from parameter to state. An entry is read from, and written to,
    the `state` of the optimizer that has the parameter."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self._members = members
        self._of = {id(p): member.state for member in members for p in parameters_of([member])}

    def _owner(self, p: Any) -> Any:
        if id(p) in self._of:
            return self._of[id(p)]
        return next((member.state for member in self._members if p in member.state), self._members[0].state)

    def __getitem__(self, p: Tensor) -> Any:
        return self._owner(p)[p]

    def __setitem__(self, p: Tensor, entry: Any) -> None:
        self._owner(p)[p] = entry

    def __delitem__(self, p: Tensor) -> None:
        del self._owner(p)[p]

    def __contains__(self, p: object) -> bool:
        return any(p in member.state for member in self._members)

    def __iter__(self) -> Iterator[Tensor]:
        return (p for member in self._members for p in list(member.state))

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)
