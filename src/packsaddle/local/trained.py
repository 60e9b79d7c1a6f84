"""Frozen and trained parameters, distinguished by `requires_grad` at the steps of the optimizers that own them."""

from torch import Tensor


class Trained:
    """A parameter, with a record of when it was frozen (requires_grad=False). A parameter counts as frozen in an
    exchange if it is frozen now, and was frozen at all steps of its optimizer since the last exchange.

    The current `requires_grad` is not sufficient. With several optimizers, an exchange may run at the end of a step of
    an optimizer that does not train this parameter. Scripts for GANs freeze the parameters of other optimizers during a
    step (`set_requires_grad(D, False)`, Lightning's `toggle_optimizer`).
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        # True if the parameter was trained at one of the steps that led to the last exchange. Before the first exchange
        # it is `requires_grad` at construction.
        self._before = parameter.requires_grad
        # True if the parameter was trained at a step since the last exchange; None: there was no step.
        self._since: bool | None = None

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad or self._before or bool(self._since)

    @property
    def requires_grad_next(self) -> bool:
        """True if the parameter counts as trained in the next exchange or, after `begin_exchange`, in the exchange that
        has begun."""
        return self.parameter.requires_grad or (self._before if self._since is None else self._since)

    def note_step(self) -> None:
        """Record the current `requires_grad` of the parameter. Call at each step of its optimizer."""
        self._since = bool(self._since) or self.parameter.requires_grad

    def begin_exchange(self) -> None:
        if self._since is not None:
            self._before, self._since = self._since, None

    def cancel_exchange(self) -> None:
        """Count the steps that led to the current exchange among the steps that lead to the next exchange. Call if the
        current exchange is rejected, or does not include this worker."""
        if self._before:
            self._since = True

    def state(self) -> tuple[bool, bool | None]:
        return self._before, self._since

    def load(self, saved: tuple[bool, bool | None]) -> None:
        self._before, self._since = saved
