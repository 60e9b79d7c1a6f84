"""An optimizer's learning rates, which an error memory in units of a gradient must follow."""

from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from packsaddle.sections import Place


class Rates:
    """What e is to be multiplied by when a learning rate changes from a to b, a / b, so that y = x - eta e stays.

    Nothing without an optimizer. A rate of 0 leaves e as it is until the next that is not.
    Raises ValueError if the optimizer does not have all of the parameters.
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
        self.units: list[float] = []  # the rate that e is in units of, by group, once there was one
        self._next: list[float] = []

    def now(self) -> list[float]:
        """Return the learning rates by parameter group."""
        return [] if self._optimizer is None else [float(group["lr"]) for group in self._optimizer.param_groups]

    def of(self, place: Place) -> float:
        """Return a parameter's learning rate."""
        return self.now()[self._group[place.name]]

    def factors(self) -> Mapping[str, float]:
        """Return the factor of every parameter whose rate has changed, and take note of the rates for `settle`."""
        rates = self.now()
        units = self.units or rates
        self._next = [rate or unit for rate, unit in zip(rates, units, strict=True)]
        factors = [unit / rate if rate and unit else 1.0 for rate, unit in zip(rates, units, strict=True)]
        return {name: factors[i] for name, i in self._group.items() if factors[i] != 1.0}

    def settle(self, *, taken: bool) -> None:
        """Take e to be in the rates of the last `factors`, or not."""
        if taken:
            self.units = self._next
