"""Parameters that a backward pass does not use (`find_unused_parameters`).

DistributedDataParallel copies the mean gradient of a parameter to p.grad if at least one worker used the parameter. If
no worker used it, the mean is discarded, and p.grad keeps the gradient of an earlier pass, if it has one.

For a parameter that it did not use, and whose p.grad is 0, a worker sends zeros instead of v = e + g, the sum of error
memory and gradient, and keeps its e. The message C(0) of these zeros need not be 0, so they have the residual 0 - C(0).
If the mean is copied to p.grad, the residual is added to the error memory. If the mean is discarded, the residual is
discarded too, and the worker keeps its e.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from packsaddle.feedback.round import ErrorFeedback


class Usage:
    """Flags for the parameters of one exchange.

    `used`, bool[p] for p parameters, is True for each parameter that this worker has used since the last exchange:
    autograd has accumulated a gradient for it. This is the criterion of DistributedDataParallel. `names` are the names
    of these parameters. `sent`, bool[p], is True for each parameter of which this worker sends v: it has used the
    parameter, or p.grad is not 0, since it still has the gradient of an earlier pass.
    """

    def __init__(self, part: ErrorFeedback, gradients: Mapping[str, Tensor], names: Collection[str]) -> None:
        self._part = part
        mine = [(gradients[name], name in names) for name in part.slice.names]
        # Fill each flag on the device. The host would wait for a copy of the flags to a GPU.
        self.used = torch.stack([g.new_full((), used, dtype=torch.bool) for g, used in mine])
        self.sent = torch.stack([g.any() for g, _ in mine]) | self.used

    def restore(self, by_any: Tensor) -> None:
        """Correct the new error memory of the parameters of which this worker sent zeros, or which no worker used (see
        `ErrorMemory.restore_unused`).

        `by_any`, bool[p], is True for each parameter that at least one worker used. Call after `ErrorMemory.absorb`.
        The host does not wait for a GPU.
        """
        self._part.memory.restore_unused(self.sent, by_any)


def clear_unused(views: Sequence[Tensor], used: Tensor | None) -> None:
    """Set tensors in `views` to 0 in place: those whose flag in `used`, bool[p], is False. No-op if `used` is None."""
    for view, is_used in zip(views, used, strict=True) if used is not None else ():
        view.mul_(is_used)
