"""Parameters that a backward pass does not use (`find_unused_parameters`).

DistributedDataParallel copies the mean gradient of a parameter to its p.grad if any worker used the parameter, and
discards it if no worker did. So a worker sends zeros instead of v = e + g, the sum of error memory and gradient, for a
parameter that it did not use, and keeps e. The compressed zeros C(0) need not be 0. If the mean is applied, the
residual 0 - C(0) is added to the error memory. If the mean is discarded, the residual is discarded too.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from packsaddle.feedback.round import ErrorFeedback


class Usage:
    """The parameters that this worker used in a backward pass, i.e. whose gradient is not 0, among those that are
    exchanged together. For these parameters, `here`, bool[p], is True.

    A parameter whose gradient is 0 on all workers counts as unused. Its mean gradient is then set to 0, so no update is
    lost if DistributedDataParallel applies it nevertheless.
    """

    def __init__(self, part: ErrorFeedback, gradients: Mapping[str, Tensor]) -> None:
        self._part = part
        self.here = torch.stack([gradients[name].any() for name in part.slice.names])

    def restore(self, by_any: Tensor) -> None:
        """Correct the new error memory of the parameters that this worker did not use, and for which it sent zeros (see
        `ErrorMemory.restore_unused`). The host does not wait for a GPU. Call after `absorb`. `by_any`, bool[p], is True
        for the parameters that at least one worker used."""
        self._part.memory.restore_unused(self.here, by_any)


def clear_unused(views: Sequence[Tensor], used: Tensor | None) -> None:
    """Set to 0 the tensors whose flag in `used`, bool[p], is False. No-op if `used` is None."""
    for view, is_used in zip(views, used, strict=True) if used is not None else ():
        view.mul_(is_used)
