"""Parameters that a backward pass does not use (`find_unused_parameters`).

DistributedDataParallel copies the mean gradient of a parameter to p.grad if at least one worker used the parameter. If
no worker used it, the mean is discarded.

For a parameter that it did not use, a worker sends zeros instead of v = e + g, the sum of error memory and gradient,
and keeps its e. The message C(0) of these zeros need not be 0, so they have the residual 0 - C(0). If the mean is
copied to p.grad, the residual is added to the error memory. If the mean is discarded, the residual is discarded too.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from packsaddle.feedback.round import ErrorFeedback


class Usage:
    """Flags for the parameters of one exchange.

    `here`, bool[p] for p parameters, is True for each parameter that this worker used in the backward pass. A parameter
    counts as used if its gradient is not 0. If the gradient of a parameter is 0 on all workers, its mean gradient is
    set to 0. So no update is lost if DistributedDataParallel regards the parameter as used, and copies this mean to the
    parameter's `grad`.
    """

    def __init__(self, part: ErrorFeedback, gradients: Mapping[str, Tensor]) -> None:
        self._part = part
        self.here = torch.stack([gradients[name].any() for name in part.slice.names])

    def restore(self, by_any: Tensor) -> None:
        """Correct the new error memory of the parameters that this worker did not use, and for which it sent zeros (see
        `ErrorMemory.restore_unused`).

        `by_any`, bool[p], is True for each parameter that at least one worker used. Call after `ErrorMemory.absorb`.
        The host does not wait for a GPU.
        """
        self._part.memory.restore_unused(self.here, by_any)


def clear_unused(views: Sequence[Tensor], used: Tensor | None) -> None:
    """Set tensors in `views` to 0 in place: those whose flag in `used`, bool[p], is False. No-op if `used` is None."""
    for view, is_used in zip(views, used, strict=True) if used is not None else ():
        view.mul_(is_used)
