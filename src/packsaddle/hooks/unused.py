"""Parameters that a backward pass does not use (`find_unused_parameters`).

DistributedDataParallel copies the mean gradient of a parameter to p.grad if at least one worker used the parameter. If
no worker used it, the mean is discarded, and p.grad keeps the gradient of an earlier pass, if it has one.

For a parameter that it did not use, and whose p.grad is 0, a worker sends zeros instead of v = e + g, the sum of error
memory and gradient, and keeps its e. The message C(0) of these zeros need not be 0, so they have the residual 0 - C(0).
If the mean is copied to p.grad, the residual is added to the error memory. If the mean is discarded, the residual is
discarded too, and the worker keeps its e.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Usage(NamedTuple):
    """Flags for the parameters of one exchange, bool[p] for p parameters."""

    # True for each parameter that this worker has used since the last exchange: autograd has accumulated a gradient for
    # it. This is the criterion of DistributedDataParallel.
    used: Tensor
    # True for each parameter of which this worker sends v: it has used the parameter, or p.grad is not 0, since it
    # still has the gradient of an earlier pass.
    sent: Tensor

    @classmethod
    def of(cls, gradients: Sequence[tuple[str, Tensor]], names: Collection[str]) -> "Usage":
        """Return the flags for pairs of a parameter's name and its gradient. `names` are the names of the parameters
        that this worker has used."""
        # Fill each flag on the device. The host would wait for a copy of the flags to a GPU.
        used = torch.stack([g.new_full((), name in names, dtype=torch.bool) for name, g in gradients])
        return cls(used, torch.stack([g.any() for _, g in gradients]) | used)
