"""Learning rates behind a hook: an error memory in units of a gradient follows plain SGD's, so that y does not jump."""

from collections.abc import Mapping, Sequence

from torch.optim import SGD, Optimizer

from packsaddle.feedback.slices import Place


def is_plain_sgd(optimizer: Optimizer | None) -> bool:
    """Tell if an optimizer only subtracts eta times the gradient: then the effect of an error e on x is known."""
    return type(optimizer) is SGD and not any(g["momentum"] or g["maximize"] for g in optimizer.param_groups)


class Rates:
    """The factor of e when plain SGD's rate changes from a to b: a / b, so that y = x - eta e stays.

    Without an optimizer, or with another one, nothing: momentum and second moments would take what is multiplied for
    gradients. Raises ValueError if the optimizer does not have all of the parameters.
    """

    def __init__(self, optimizer: Optimizer | None, places: Sequence[Place]) -> None:
        self._optimizer = optimizer
        self._group: dict[str, int] = {}  # the parameter group of each parameter
        if optimizer is not None:
            owner = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
            for place in places:
                if id(place.parameter) not in owner:
                    raise ValueError(f"optimizer must have all parameters of the model, and lacks {place.name}")
                self._group[place.name] = owner[id(place.parameter)]
        self.units: dict[str, float] = {}  # the rate that each parameter's e is in units of, once there was one
        self._next: dict[str, float] = {}

    def now(self) -> dict[str, float]:
        """Return each parameter's learning rate."""
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        return {name: float(groups[i]["lr"]) for name, i in self._group.items()}

    def factors(self) -> Mapping[str, float]:
        """Return the factor of every parameter whose rate has changed, and note the rates for `close`.

        It is 0 where the rate is 0: x will not move, so e is to be left as it is, and out of what is exchanged.
        """
        if not is_plain_sgd(self._optimizer):
            return {}
        rates = self.now()
        units = {name: self.units.get(name) or rate for name, rate in rates.items()}
        self._next = {name: rate or units[name] for name, rate in rates.items()}
        factors = {name: units[name] / rate if rate else 0.0 for name, rate in rates.items()}
        return {name: factor for name, factor in factors.items() if factor != 1.0}

    def close(self, *, apply: bool) -> None:
        """Commit the rates of the last `factors` as the units of e, or roll back."""
        if apply:
            self.units = self._next
