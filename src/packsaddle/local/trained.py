"""Whether a parameter is trained, as seen at the steps of its own optimizer."""

from torch import Tensor


class Trained:
    """Whether a parameter is trained: if it required a gradient at a step of its optimizer since the last exchange.

    An exchange cannot ask the parameter itself: it runs in another optimizer's step, during which GANs freeze what that
    one does not train (`set_requires_grad(D, False)`, Lightning's `toggle_optimizer`). Without a step since the last
    exchange the parameter is as it was.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.restart()

    @property
    def requires_grad(self) -> bool:
        return self._before or bool(self._since)

    def restart(self) -> None:
        """Take the parameter's own `requires_grad`, for example after loading a state."""
        self._before = self.parameter.requires_grad  # at the steps up to the last exchange
        self._since: bool | None = None  # at a step since then; None: there was none

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
