"""Rescaling of a hook's error memory when plain SGD's learning rate changes, so that y = x - eta e does not jump."""

from collections.abc import Mapping, Sequence

from torch.optim import SGD, Optimizer

from packsaddle.feedback.slices import Place


def are_plain_sgd(optimizers: Sequence[Optimizer]) -> bool:
    """Return True if all are SGD without momentum or maximize: only then does an error memory e change x by -lr e."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {type(o) for o in optimizers} == {SGD} and not any(g["momentum"] or g["maximize"] for g in groups)


class Rates:
    """The factor of the error memory e when plain SGD's learning rate changes: old / new keeps x - lr e unchanged.

    Other optimizers have no factor: their momentum and second moments would accumulate the rescaled error like a
    gradient. Raises ValueError if the optimizers miss a parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer], places: Sequence[Place]) -> None:
        self._optimizers = optimizers
        # By parameter name: the index of its optimizer, and of its parameter group there.
        self._group: dict[str, tuple[int, int]] = {}
        groups = [(i, j, group) for i, o in enumerate(optimizers) for j, group in enumerate(o.param_groups)]
        owner = {id(p): (i, j) for i, j, group in groups for p in group["params"]}
        for place in places if optimizers else ():
            if id(place.parameter) not in owner:
                raise ValueError(f"optimizer must have all parameters of the model, and lacks {place.name}")
            self._group[place.name] = owner[id(place.parameter)]
        self.units: dict[str, float] = {}  # by parameter name: the last nonzero rate, the unit of e
        self._next: dict[str, float] = {}

    def now(self) -> dict[str, float]:
        """Return each parameter's learning rate."""
        return {name: float(self._optimizers[i].param_groups[j]["lr"]) for name, (i, j) in self._group.items()}

    def factors(self) -> Mapping[str, float]:
        """Return the factors of the error memory, by name of each parameter whose learning rate has changed.

        Records the rates for `close`. A factor is 0 if the rate is 0: the parameter will not move, so its error memory
        must be kept and excluded from the exchange.
        """
        if not are_plain_sgd(self._optimizers):
            return {}
        rates = self.now()
        units = {name: self.units.get(name) or rate for name, rate in rates.items()}
        self._next = {name: rate or units[name] for name, rate in rates.items()}
        factors = {name: units[name] / rate if rate else 0.0 for name, rate in rates.items()}
        return {name: factor for name, factor in factors.items() if factor != 1.0}

    def close(self, *, apply: bool) -> None:
        """Commit the learning rates of the last `factors` as the units of the error memory, or roll back."""
        if apply:
            self.units = self._next
