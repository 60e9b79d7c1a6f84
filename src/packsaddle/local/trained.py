"""Frozen and trained parameters, distinguished at the steps of their own optimizers."""

from torch import Tensor


class Trained:
    """A parameter, and whether it counts as frozen in an exchange. It does if it is frozen now, and was frozen at all
    steps of its optimizer since the last exchange.

    The current `requires_grad` is not sufficient. An exchange may run in the step of another optimizer, during which
    GANs freeze the parameters that this optimizer does not train (`set_requires_grad(D, False)`, Lightning's
    `toggle_optimizer`).
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._before = parameter.requires_grad  # True if the parameter was trained at a step up to the last exchange
        # True if the parameter was trained at a step since the last exchange; None: there was no step.
        self._since: bool | None = None

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad or self._before or bool(self._since)

    @property
    def requires_grad_next(self) -> bool:
        """True if the parameter counts as trained in the next exchange. After `begin_exchange`, the next exchange is
        the current one."""
        return self.parameter.requires_grad or (self._before if self._since is None else self._since)

    def note_step(self) -> None:
        """Record `requires_grad` at a step of the parameter's optimizer."""
        self._since = bool(self._since) or self.parameter.requires_grad

    def begin_exchange(self) -> None:
        if self._since is not None:
            self._before, self._since = self._since, None

    def cancel_exchange(self) -> None:
        """Count the steps before this exchange as steps before the next one, since this exchange was rejected or did
        not include this worker."""
        if self._before:
            self._since = True

    def state(self) -> tuple[bool, bool | None]:
        return self._before, self._since

    def load(self, saved: tuple[bool, bool | None]) -> None:
        self._before, self._since = saved
