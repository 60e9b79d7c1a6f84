"""Frozen and trained parameters, told apart at the steps of their own optimizers."""

from torch import Tensor


class Trained:
    """A parameter, which an exchange takes as frozen only if it is, and was at all steps of its optimizer since the
    last exchange.

    An exchange cannot ask the parameter alone: it runs in another optimizer's step, during which GANs freeze what that
    one does not train (`set_requires_grad(D, False)`, Lightning's `toggle_optimizer`).
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._before = parameter.requires_grad  # at a step up to the last exchange
        self._since: bool | None = None  # at a step since then; None: there was none

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad or self._before or bool(self._since)

    @property
    def requires_grad_next(self) -> bool:
        """`requires_grad` in the next exchange; after `begin_exchange`, in this one."""
        return self.parameter.requires_grad or (self._before if self._since is None else self._since)

    def note_step(self) -> None:
        """Note `requires_grad` at a step of the parameter's optimizer."""
        self._since = bool(self._since) or self.parameter.requires_grad

    def begin_exchange(self) -> None:
        if self._since is not None:
            self._before, self._since = self._since, None

    def cancel_exchange(self) -> None:
        """Go on with the steps up to an exchange that was rejected, or without this worker."""
        if self._before:
            self._since = True

    def state(self) -> tuple[bool, bool | None]:
        return self._before, self._since

    def load(self, saved: tuple[bool, bool | None]) -> None:
        self._before, self._since = saved
