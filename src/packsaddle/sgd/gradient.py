"""The direction u, float[d], of a worker's step: its gradient, or its momentum.

`GradientUpdate` is the update of one step, i.e. the learning rate times u. It is added to the error memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.feedback.memory import Update
from packsaddle.feedback.noise import GaussianNoise
from packsaddle.feedback.slices import FlatParameters, Shaped
from packsaddle.numerics.devices import wide
from packsaddle.numerics.finite import add_and_measure, add_if_finite


@dataclass(frozen=True)
class Extras:
    """Terms of a step that are added to the gradients: weight decay and noise.

    `decays` has the weight decay of each parameter group. `noise` is the noise xi of the step, or None, and is added
    only to the coordinates from `noisy_from` on. `scale` is the factor by which a GradScaler has multiplied the
    gradients. These terms are not multiplied by it.
    """

    decays: Sequence[float]
    noise: GaussianNoise | None = None
    noisy_from: int = 0
    scale: float = 1.0


class Gradient:
    """The direction of a step of plain SGD, u = gradient + weight_decay * x + xi, where x are the parameters and xi is
    the noise.

    The subclass `Momentum` computes another direction.
    """

    kind = "gradient"  # name of this kind of direction in saved states

    def __init__(self, flat: FlatParameters) -> None:
        self._flat = flat
        # Upper bound on the norm of base + scale * gradient, as computed last, over the parameters with gradients. It
        # does not include weight decay and noise. None: unknown.
        self.norm: Tensor | None = None

    def add(self, base: Shaped, out: Shaped, scales: Sequence[float], extras: Extras) -> None:
        """Set `out` to base + scale * u, where u is this direction. `out` and `base` are float[d], and may be the same
        vector.

        `scales` has the scale of each parameter group. `extras` has the weight decay and the noise in u.
        """
        self._add_gradients(base, out, [scale / extras.scale for scale in scales])
        self._perturb(out.flat, scales, extras)

    def _perturb(self, out: Tensor, scales: Sequence[float], extras: Extras) -> None:
        """Add scale * (xi + weight_decay * x) to `out`, float[d], in place, where xi is the noise and x are the
        parameters.

        `scales` has the scale of each parameter group.
        """
        self._add_decay(out, scales, extras.decays)
        self._add_noise(out, scales, extras)

    def add_if_finite(self, out: Shaped, scales: Sequence[float], extras: Extras) -> bool:
        """Add scale * u to `out`, float[d], in place, where u is this direction, and return True.

        If the sum of `out` and the scaled gradients is not finite, `out` gets its old values again, up to rounding, and
        the result is False. `scales` has the scale of each parameter group.
        """
        squares = add_if_finite(self._sums(out, scales, extras))
        if squares is None:
            return False
        self.norm = out.flat.new_tensor(squares, dtype=wide(out.flat.device)).sqrt()
        self._perturb(out.flat, scales, extras)
        return True

    def subtract(self, out: Shaped, scales: Sequence[float], extras: Extras) -> None:
        """Subtract scale * u from `out`, float[d], in place, where u is this direction. This undoes `add_if_finite`, up
        to rounding.

        Gradients and parameters must not have changed since then. `scales` has the scale of each parameter group.
        """
        self._perturb(out.flat, [-scale for scale in scales], extras)
        for view, grad, alpha in self._sums(out, scales, extras):
            view.sub_(grad, alpha=alpha)

    def _sums(self, out: Shaped, scales: Sequence[float], extras: Extras) -> Iterator[tuple[Tensor, Tensor, float]]:
        for members, scale in zip(self._flat.members, scales, strict=True):
            for i in members:
                if (grad := self._flat.parameters[i].grad) is not None:
                    yield out.views[i], grad, scale / extras.scale

    def close(self, *, apply: bool) -> None:
        """End a step, as applied (`apply` is True) or as skipped.

        After an applied step, the new values of the vectors kept between steps, such as the momentum, are committed.
        After a skipped step, these vectors are rolled back. No-op here, since plain SGD keeps no vectors.
        """

    def _add_gradients(self, base: Shaped, out: Shaped, alphas: Sequence[float]) -> None:
        """Set `out` to base + alpha * gradient, and `norm` to a bound on its norm, or to None if it is not measured.

        `alphas` has the factor alpha of each parameter group.
        """
        if out.flat.device.type == "cpu":
            self.norm = self._add_and_measure(base, out, alphas)
            return
        # On a GPU a foreach call of torch is faster than a call for each parameter.
        self.norm = None
        out.flat.copy_(base.flat)
        for members, alpha in zip(self._flat.members, alphas, strict=True):
            grads = {i: g for i in members if (g := self._flat.parameters[i].grad) is not None}
            if grads:
                torch._foreach_add_([out.views[i] for i in grads], list(grads.values()), alpha=alpha)

    def _add_and_measure(self, base: Shaped, out: Shaped, alphas: Sequence[float]) -> Tensor:
        """Set `out` to base + alpha * gradient in one pass over memory.

        Returns an upper bound on the norm of `out`, restricted to the parameters with gradients: the sum of the norms
        of the parts that belong to single parameters.
        """
        total = out.flat.new_zeros(())
        for members, alpha in zip(self._flat.members, alphas, strict=True):
            for i in members:
                grad = self._flat.parameters[i].grad
                if grad is None:
                    out.views[i].copy_(base.views[i])
                else:
                    total += add_and_measure(base.views[i], grad, alpha, out.views[i])
        return total

    def _add_noise(self, out: Tensor, scales: Sequence[float], extras: Extras) -> None:
        for run in self._flat.ranges:
            if extras.noise is not None and run.stop > extras.noisy_from:
                start = max(run.start, extras.noisy_from)
                extras.noise.add_to(out[start : run.stop], scales[run.group], start)

    def _add_decay(self, out: Tensor, scales: Sequence[float], decays: Sequence[float]) -> None:
        """Add scale * weight_decay * x to `out`, float[d], in place, where x are the parameters.

        Weight decay is part of the objective, so it is added before compression. `scales` and `decays` have one number
        for each parameter group.
        """
        for run in self._flat.ranges:
            if decays[run.group]:
                stretch = slice(run.start, run.stop)
                out[stretch].add_(self._flat.x[stretch], alpha=scales[run.group] * decays[run.group])

    def vectors(self) -> dict[str, Shaped]:
        """Return the vectors that are kept between steps, by name.

        Call again after each step, since a step may swap the buffers of these vectors.
        """
        return {}

    def reset(self) -> None:
        """Set the vectors that are kept between steps, such as the momentum, to zero. Call after the escape check has
        rolled the parameters back."""


class Momentum(Gradient):
    """Momentum of each worker, applied before compression: m <- beta m + g, where g = gradient + weight_decay x + xi.

    m is the momentum, beta its coefficient, x are the parameters and xi is the noise. The direction of a step is u = m,
    or with `nesterov` u = g + beta m.

    With error feedback and any compressor, let y = x - eta e, where eta is the learning rate and e the workers' mean
    error memory. Then y moves as the parameters of SGD with momentum on the mean gradient do (dist-EF-SGDM; Zheng,
    Huang and Kwok 2019).
    """

    kind = "momentum"

    def __init__(self, flat: FlatParameters, beta: float, *, nesterov: bool, spare: bool) -> None:
        super().__init__(flat)
        self._beta, self._nesterov = beta, nesterov
        # The momentum after the last step, and its next value, which the current step computes. Without `spare` they
        # are the same buffer, so no step can be rolled back.
        self._now = flat.zeros()
        self._next = flat.zeros() if spare else self._now

    def add(self, base: Shaped, out: Shaped, scales: Sequence[float], extras: Extras) -> None:
        torch.mul(self._now.flat, self._beta, out=self._next.flat)
        super().add(self._next, self._next, [1.0] * len(scales), extras)
        for view in self._flat.frozen(self._next.flat):
            view.zero_()
        factor = 1.0
        if self._nesterov:
            super().add(base, out, scales, extras)
            base, factor = out, self._beta
        self.norm = None  # the norm was measured before the momentum was added
        for run in self._flat.ranges:
            part, alpha = slice(run.start, run.stop), factor * scales[run.group]
            torch.add(base.flat[part], self._next.flat[part], alpha=alpha, out=out.flat[part])

    def close(self, *, apply: bool) -> None:
        if apply:
            self._now, self._next = self._next, self._now

    def reset(self) -> None:
        self._now.flat.zero_()

    def vectors(self) -> dict[str, Shaped]:
        return {"momentum": self._now}


@dataclass(frozen=True)
class GradientUpdate(Update):
    """The update of one step, scale * u, float[d], where u is the direction of the step: its gradient or its momentum.

    It is not stored, but computed when it is added to the error memory. Each parameter group has its own scale.
    """

    direction: Gradient
    scales: Sequence[float]
    extras: Extras
    is_known_invalid: bool = False  # True if a GradScaler found an Inf or NaN in the gradients
    x_is_large: bool = False  # True if weight decay may overflow, so that finite gradients do not imply a finite u

    @property
    def norm(self) -> Tensor | None:  # type: ignore[override]
        return None if self.x_is_large else self.direction.norm

    def add(self, base: Shaped, out: Shaped) -> None:
        self.direction.add(base, out, self.scales, self.extras)

    def add_if_finite(self, out: Shaped) -> bool:
        bounded = not (self.is_known_invalid or self.x_is_large)
        return bounded and self.direction.add_if_finite(out, self.scales, self.extras)

    def subtract(self, out: Shaped) -> None:
        self.direction.subtract(out, self.scales, self.extras)
