"""Learning rates behind a hook: an error memory in units of a gradient follows plain SGD's, so that y does not jump."""

from collections.abc import Mapping, Sequence

from torch.optim import SGD, Optimizer

from packsaddle.feedback.slices import Place


def are_plain_sgd(optimizers: Sequence[Optimizer]) -> bool:
    """Return True if optimizers only subtract eta times the gradient: then the effect of an error e on x is known."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {type(o) for o in optimizers} == {SGD} and not any(g["momentum"] or g["maximize"] for g in groups)


class Rates:
    """The factor of e when plain SGD's rate changes from a to b: a / b, so that y = x - eta e stays.

    Without optimizers, or with others, nothing: momentum and second moments would take what is multiplied for
    gradients. Raises ValueError if the optimizers do not have all of the parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer], places: Sequence[Place]) -> None:
        self._optimizers = optimizers
        # The optimizer of each parameter, by number, and its parameter group there.
        self._group: dict[str, tuple[int, int]] = {}
        groups = [(i, j, group) for i, o in enumerate(optimizers) for j, group in enumerate(o.param_groups)]
        owner = {id(p): (i, j) for i, j, group in groups for p in group["params"]}
        for place in places if optimizers else ():
            if id(place.parameter) not in owner:
                raise ValueError(f"optimizer must have all parameters of the model, and lacks {place.name}")
            self._group[place.name] = owner[id(place.parameter)]
        self.units: dict[str, float] = {}  # the rate that each parameter's e is in units of, once there was one
        self._next: dict[str, float] = {}

    def now(self) -> dict[str, float]:
        """Return each parameter's learning rate."""
        return {name: float(self._optimizers[i].param_groups[j]["lr"]) for name, (i, j) in self._group.items()}

    def factors(self) -> Mapping[str, float]:
        """Return the factor of every parameter whose rate has changed, and note the rates for `close`.

        It is 0 where the rate is 0: x will not move, so e is to be left as it is, and out of what is exchanged.
        """
        if not are_plain_sgd(self._optimizers):
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
