"""The outer optimizer, which steps on the anchor, i.e. on the parameters on which all workers last agreed, and its
saved state."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from packsaddle.feedback.optimizers import parameters_of
from packsaddle.feedback.state import Value
from packsaddle.local.options import Outer
from packsaddle.messages import shown


class OuterOptimizer:
    """The outer optimizer, which steps on the anchor, i.e. on the parameters on which all workers last agreed.

    `make` is a function of the anchor's tensors that returns the optimizer, and `anchor` has these tensors by parameter
    name. Raises TypeError if `make` does not return a torch optimizer, and ValueError if the optimizer's parameters are
    not exactly the anchor's tensors.
    """

    def __init__(self, make: Outer, anchor: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer = make(list(anchor.values()))
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"outer must be a function that returns a torch optimizer, got {type(optimizer).__name__}")
        if {id(p) for p in parameters_of([optimizer])} != {id(tensor) for tensor in anchor.values()}:
            raise ValueError("outer must return an optimizer of all tensors that it is given, and of no others")
        self._names = {id(tensor): name for name, tensor in anchor.items()}

    def field(self) -> Value:
        """Return the field of the saved state that contains the optimizer's state dict, its class, and the names of the
        parameters in each of its groups."""
        return Value(("outer",), dict[str, Any], self._state, self._load, self._check)

    @property
    def _groups(self) -> list[list[str]]:
        return [[self._names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]

    def _state(self) -> dict[str, Any]:
        return {"class": type(self.optimizer).__name__, "names": self._groups, **self.optimizer.state_dict()}

    def _check(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError unless `saved` is the state of an optimizer of the same class as this one, and each of its
        groups has the same parameters, in any order, as this optimizer's group with the same index."""
        name = type(self.optimizer).__name__
        if saved.get("class") != name:
            raise ValueError(f"outer must be the state of {name}, found that of {saved.get('class', 'nothing')}")
        found = saved.get("names", [])
        if list(map(sorted, found)) != list(map(sorted, self._groups)):
            raise ValueError(f"outer must be the state of groups of {shown(self._groups)}, found {shown(found)}")

    def _load(self, saved: Mapping[str, Any]) -> None:
        # torch assigns states to parameters by their order in the groups, which may differ here from the saved order.
        groups = []
        for group, theirs, ours in zip(saved["param_groups"], saved["names"], self._groups, strict=True):
            index = dict(zip(theirs, group["params"], strict=True))
            groups.append({**group, "params": [index[name] for name in ours]})
        # Copy the saved tensors, since `load_state_dict` does not, and the next step would change them in place.
        self.optimizer.load_state_dict(deepcopy({"state": saved["state"], "param_groups": groups}))
