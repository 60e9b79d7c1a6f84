"""The gradients of a slice (parameters exchanged together): the input of an exchange, and where its mean is written.

Some parameters may be unused in a backward pass (`find_unused_parameters`). DistributedDataParallel copies the mean
gradient of a parameter to p.grad if at least one worker used the parameter. If no worker used it, the mean is
discarded, and p.grad keeps the gradient of an earlier pass, if it has one.

For a parameter that it did not use, and whose p.grad is 0, a worker sends zeros instead of v = e + g, the sum of error
memory and gradient, and keeps its e. The message C(0) of these zeros need not be 0, so they have the residual 0 - C(0).
If the mean is copied to p.grad, the residual is added to the error memory. If the mean is discarded, the residual is
discarded too, and the worker keeps its e.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged
from packsaddle.feedback.memory import Update
from packsaddle.feedback.noise import GaussianNoise
from packsaddle.feedback.round import Applied
from packsaddle.feedback.slices import Shaped, Slice
from packsaddle.numerics.finite import is_finite


@dataclass(frozen=True)
class BucketUpdate(Update):
    """The update of the error memory e of a slice (parameters exchanged together): the gradients g plus the noise xi.

    The vector to send is v = decay * e + g / scale + xi, where `scale` is the factor by which a GradScaler has
    multiplied g.
    """

    of: Slice
    gradients: Mapping[str, Tensor]
    noise: GaussianNoise | None
    scale: float
    decay: float = 1.0

    def add(self, base: Shaped, out: Shaped) -> None:
        """Set `out` to decay * base + g / scale + xi, where `base` is the error memory, g are the gradients and xi is
        the noise.

        `base` and `out` are float[n], and must not overlap.
        """
        for place, e, v in zip(self.of.places, base.views, out.views, strict=True):
            g = self.gradients[place.name]
            if self.scale == 1.0:
                torch.add(g, e, alpha=self.decay, out=v)
            else:
                torch.mul(e, self.decay, out=v).add_(g, alpha=1 / self.scale)
        if self.noise is not None:
            self.of.add_noise(out.flat, self.noise)


@dataclass(frozen=True)
class BucketTarget:
    """Writes the mean update of an exchange to the gradients of a slice (parameters exchanged together). The user's
    optimizer then applies these gradients to the parameters (line 11 of Algorithm 1).

    `used`, bool[p], is False for each parameter whose gradient is not set to its mean, since no worker used the
    parameter in this pass (see `Usage`). If it is None, all gradients are set.
    """

    of: Slice
    gradients: Mapping[str, Tensor]
    scale: float
    used: Tensor | None = None
    defers = True

    def apply(self, g: Averaged, magnitude: Tensor | float) -> Applied:
        """Set the gradients to the mean update g multiplied by `scale`, the factor of the GradScaler, which will divide
        them by it.

        `magnitude` is the approximate maximum of the absolute values of g. The rounding error is None if no gradient
        has 16 bits.
        """
        total = self.of.zeros()
        g.write_to(total.flat)
        outs = [self.gradients[place.name] for place in self.of.places]
        for view, out, used in zip(total.views, outs, self.used, strict=True) if self.used is not None else ():
            view.copy_(torch.where(used, view, out / self.scale))
        exact = all(out.element_size() >= total.flat.element_size() for out in outs)
        for view, out in zip(total.views, outs, strict=True):
            torch.mul(view, self.scale, out=out)
            if not exact:
                view.sub_(out, alpha=1 / self.scale)
        # The result fits if the scaled mean does not overflow the gradients' type, or float32 for 16-bit gradients. The
        # difference between a 16-bit gradient and the mean is in the rounding error, which must be finite.
        dtypes = {torch.promote_types(out.dtype, torch.float32) for out in outs}
        fits = torch.as_tensor(magnitude) * self.scale <= min((torch.finfo(t).max for t in dtypes), default=0.0)
        return Applied(fits) if exact else Applied(fits & is_finite(total.flat), total.flat)


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
