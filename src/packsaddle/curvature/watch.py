"""Certificates at equal intervals of steps during training."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from packsaddle.curvature.certificate import Certificate
from packsaddle.curvature.certify import certify
from packsaddle.curvature.hessian import LossFn


class CertifyEvery:
    """A counter of training steps that certifies the model's parameters every `every` steps; collective.

    Args:
        model, loss_fn, batches: as for `certify`; batches are this worker's, equal in every iteration.
        every: steps between two certificates.
        at: a function that returns a context in which all workers have equal parameters, such as
            `LocalUpdates.at_anchor`; by default the current parameters are certified.
        on_certificate: called with each certificate, on every worker.
        options: further options of `certify`. Set `epsilon` and `hessian_lipschitz` to compare points.

    `certificates` is a list of (step, certificate). Raises ValueError for `every` below 1, and the errors of `certify`.
    A certificate costs two backward passes over the batches for each of its Hessian-vector products.

    >>> import torch
    >>> from packsaddle.curvature import CertifyEvery
    >>> model = torch.nn.Linear(4, 4)
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> loss_fn = lambda model, batch: (model(batch) - batch).square().mean()
    >>> watch = CertifyEvery(model, loss_fn, x.split(16), every=50, epsilon=10.0, hessian_lipschitz=1.0)
    >>> for step in range(100):
    ...     certificate = watch.step()  # after the optimizer's; None between two certificates
    >>> [(step, str(c.verdict)) for step, c in watch.certificates]
    [(50, 'second-order stationary'), (100, 'second-order stationary')]
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        every: int,
        at: Callable[[], AbstractContextManager[None]] = nullcontext,
        on_certificate: Callable[[Certificate], None] = lambda certificate: None,
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.every = every
        self.steps = 0  # steps counted so far
        self.certificates: list[tuple[int, Certificate]] = []
        self._certify: Callable[[], Certificate] = partial(certify, model, loss_fn, batches, **options)
        self._at, self._on_certificate = at, on_certificate

    def step(self) -> Certificate | None:
        """Count a training step. Return the certificate of the current parameters if one is due, else None."""
        self.steps += 1
        if self.steps % self.every:
            return None
        with self._at():
            certificate = self._certify()
        self.certificates.append((self.steps, certificate))
        self._on_certificate(certificate)
        return certificate

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter, for a checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the step counter from `state`, a `state_dict`."""
        self.steps = int(state["steps"])
