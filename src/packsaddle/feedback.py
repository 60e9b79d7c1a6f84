"""Error feedback: the memory of what compression has not sent yet (Stich et al. 2018; Algorithm 1, lines 10-12).

The memory holds eta e^(i), the pending update, rather than e^(i). For a constant step size the two are the
same algorithm for every compressor with C(c v) = c C(v). When eta changes, keeping eta e fixed is exactly the
rescaling of e by eta_old / eta_new that leaves y = x - eta e continuous, and eta = 0 needs no special case.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from packsaddle.average import Term
from packsaddle.flat import FlatParameters


class ErrorMemory:
    """This worker's eta e^(i), float[d], in at least single precision; on the dense part only what rounding x lost."""

    def __init__(self, flat: FlatParameters) -> None:
        dtype = torch.promote_types(flat.x.dtype, torch.float32)
        self.pending = torch.zeros(flat.d, dtype=dtype, device=flat.x.device)
        self._flat = flat
        self._views = flat.views(self.pending)

    def correct(self, lrs: Sequence[float], decays: Sequence[float], noise: Tensor | None) -> Tensor:
        """Turn eta e into eta (e + grad F_i(x) + weight_decay x + xi), float[d], and return it (line 10).

        `lrs` and `decays` are by parameter group; gradients are read from the parameters. A parameter without
        a gradient counts as one whose gradient is zero; one that was frozen is left where it is.
        """
        flat = self._flat
        for p, name in zip(flat.parameters, flat.names, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient, which is not supported")
        for run in flat.runs:
            stretch, lr = slice(run.start, run.stop), lrs[run.group]
            if noise is not None:
                self.pending[stretch].add_(noise[stretch], alpha=lr)
            if decays[run.group]:
                # The decay is part of the objective, so its gradient is compressed with the rest.
                self.pending[stretch].add_(flat.x[stretch], alpha=lr * decays[run.group])
        for members, lr in zip(flat.members, lrs, strict=True):
            grads = {i: g for i in members if (g := flat.parameters[i].grad) is not None}
            if grads:
                torch._foreach_add_([self._views[i] for i in grads], list(grads.values()), alpha=lr)
        self._forget_frozen()
        return self.pending

    def absorb(self, sent: Iterable[Term], lost: Tensor | None = None) -> None:
        """Subtract what this worker sent, C(.) on the compressed part and everything on the dense one (line 12).

        `lost`, float[d], is what x's own precision could not take; it is to be sent again.
        """
        for term in sent:
            term.add_to(self.pending, -1.0)
        self.pending[self._flat.compressed_d :].zero_()
        if lost is not None:
            self.pending.add_(lost)
        self._forget_frozen()

    def reset(self, lost: Tensor | None = None) -> None:
        """Set the error to zero (line 7), or to what x's own precision could not take."""
        self.pending.zero_()
        if lost is not None:
            self.pending.add_(lost)

    def _forget_frozen(self) -> None:
        """Frozen parameters have no error: they take neither noise nor what a compressor makes of zeros."""
        for view in self._flat.frozen(self.pending):
            view.zero_()
