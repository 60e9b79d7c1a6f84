"""Error feedback: the memory of what compression has not sent yet (Stich et al. 2018; Algorithm 1, lines 10-12).

The memory stands for eta e^(i), the pending update, rather than e^(i). For a constant step size the two are the
same algorithm for every compressor with C(c v) = c C(v). When eta changes, keeping eta e fixed is exactly the
rescaling of e by eta_old / eta_new that leaves y = x - eta e continuous, and eta = 0 needs no special case.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from packsaddle.average import Term
from packsaddle.flat import FlatParameters
from packsaddle.noise import Noise


class ErrorMemory:
    """This worker's eta e^(i), float[d], in at least single precision; on the dense part only what rounding x lost."""

    def __init__(self, flat: FlatParameters) -> None:
        dtype = torch.promote_types(flat.x.dtype, torch.float32)
        self.vector = torch.zeros(flat.d, dtype=dtype, device=flat.x.device)
        self._flat = flat
        self._views = flat.views(self.vector)

    @property
    def unit(self) -> float:
        """What the vector, and the messages made of it, are to be multiplied by to be updates of x."""
        return 1.0

    def pending(self) -> Tensor:
        """Return eta e, float[d]; not a copy if it need not be one."""
        return self.vector

    def check(self) -> None:
        """Raise RuntimeError if the gradients cannot be taken."""
        for p, name in zip(self._flat.parameters, self._flat.names, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient, which is not supported")

    def correct(
        self, lrs: Sequence[float], decays: Sequence[float], noise: Noise | None, noisy_from: int = 0
    ) -> Tensor:
        """Turn eta e into eta (e + grad F_i(x) + weight_decay x + xi), float[d], and return it (line 10).

        `lrs` and `decays` are by parameter group; xi is left out before coordinate `noisy_from`. Gradients are read
        from the parameters. A parameter without a gradient counts as one whose gradient is zero; one that was frozen
        is left where it is.
        """
        flat = self._flat
        self._add_noise_and_decay(lrs, decays, noise, noisy_from)
        for members, lr in zip(flat.members, lrs, strict=True):
            grads = {i: g for i in members if (g := flat.parameters[i].grad) is not None}
            if grads:
                torch._foreach_add_([self._views[i] for i in grads], list(grads.values()), alpha=lr)
        self._forget_frozen()
        return self.vector

    def _add_noise_and_decay(
        self, scales: Sequence[float], decays: Sequence[float], noise: Noise | None, noisy_from: int
    ) -> None:
        """Add scale (xi + weight_decay x), the scale by parameter group."""
        flat = self._flat
        for run in flat.runs:
            stretch, scale = slice(run.start, run.stop), scales[run.group]
            if noise is not None and run.stop > noisy_from:
                start = max(run.start, noisy_from)
                noise.add_to(self.vector[start : run.stop], scale, start)
            if decays[run.group]:
                # The decay is part of the objective, so its gradient is compressed with the rest.
                self.vector[stretch].add_(flat.x[stretch], alpha=scale * decays[run.group])

    def absorb(self, sent: Iterable[Term], lost: Tensor | None = None) -> None:
        """Subtract what this worker sent, C(.) on the compressed part and everything on the dense one (line 12).

        `lost`, float[d], is what x's own precision could not take; it is to be sent again.
        """
        for term in sent:
            term.add_to(self.vector, -1.0)
        self.vector[self._flat.compressed_d :].zero_()
        if lost is not None:
            self.vector.add_(lost)
        self._forget_frozen()
        self.settle()

    def add(self, update: Tensor) -> None:
        """Add to eta e, on its first coordinates, float[at most d]."""
        self.vector[: len(update)].add_(update, alpha=1 / self.unit)

    def reset(self, lost: Tensor | None = None) -> None:
        """Set the error to zero (line 7), or to what x's own precision could not take."""
        self.vector.zero_()
        if lost is not None:
            self.vector.add_(lost)
        self.settle()

    def settle(self, unit: float | None = None) -> None:
        """Take the vector as it now is for the state between two steps, in another unit if one is given."""

    def _forget_frozen(self) -> None:
        """Frozen parameters have no error: they take neither noise nor what a compressor makes of zeros."""
        for view in self._flat.frozen(self.vector):
            view.zero_()
