"""The random walk of the parameters x under artificial noise of standard deviation r, and a suggestion for r.

In step t, the noise xi_t moves x by eta xi_t, where eta is the learning rate. Without gradients, T steps move each of
the d coordinates by eta r sqrt(T), and x by the length eta r sqrt(d T), in root mean square. The ratio of this length
to the norm ||x_0|| of the initial parameters predicts the effect of the noise. Three autoencoders left their plateaus
at ratios from 2.4 to 5.4. One of them was trained with several r: a ratio of 0.3 had almost no effect, and a ratio of
10 prevented learning (experiments/noise-rule). The ratio of r to the mini-batch noise does not predict the effect: this
ratio differed by a factor of 30 between two runs with the same effect.
"""

import math
from dataclasses import dataclass

from torch import nn

from packsaddle.errors import check_positive
from packsaddle.numerics.devices import widened

GOOD = 3.0  # suggested length of the walk, as a multiple of the initial parameters' norm ||x_0||
FAR = 8.0  # largest length of the walk without a warning, as a multiple of the initial parameters' norm ||x_0||


@dataclass(frozen=True)
class Walk:
    """The random walk of a run's parameters under artificial noise, with the quantities that determine its length."""

    lr: float  # learning rate eta
    steps: float  # number of steps T, or sum_t (r_t / r)^2 if the noise std r_t varies
    rms: float  # root mean square of the initial parameters x_0: ||x_0|| / sqrt(d)

    def times(self, r: float) -> float:
        """Return the length of the walk for the noise std r, divided by the norm of the initial parameters, ||x_0||.
        The result is eta r sqrt(T) / rms, or infinity if x_0 is 0."""
        length = self.lr * r * math.sqrt(self.steps)
        return length / self.rms if self.rms else (math.inf if length else 0.0)

    def suggested(self, times: float = GOOD) -> float | None:
        """Return the noise std r for which the length of the walk is `times` multiplied by the norm ||x_0|| of the
        initial parameters. Returns None if lr, steps or x_0 is zero."""
        unit = self.times(1.0)
        return times / unit if 0 < unit < math.inf else None


def suggest_noise(model: nn.Module, *, lr: float, steps: float, times: float = GOOD) -> float:
    """Suggest the noise std r for `CompressedSGD(noise=r)`, for a model before training.

    r = times ||x_0|| / (lr sqrt(d steps)), for d trainable coordinates with initial values x_0. If r decreases
    (`Ramp`), `steps` is sum_t (r_t / r)^2, where r_t is the noise std at step t. This sum is about the number of steps
    before the decrease, plus a third of the steps during the decrease. With momentum m, the walk is 1 / (1 - m) times
    as long, since momentum accumulates the noise too. Then pass lr / (1 - m) as `lr`.

    Without gradients, noise of this std would move the parameters by `times` ||x_0|| in root mean square. Raises
    ValueError if lr, steps or times are not positive and finite, or if all parameters are zero.

    >>> import torch
    >>> import packsaddle
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(64, 64)
    >>> round(packsaddle.suggest_noise(model, lr=0.1, steps=10_000), 3)
    0.022
    """
    check_positive(lr=lr, steps=steps, times=times)
    found = Walk(lr, steps, rms(model)).suggested(times)
    if found is None:
        raise ValueError("model must have trainable parameters that are not all zero, for a size to compare noise with")
    return found


def rms(model: nn.Module) -> float:
    parameters = [p.detach() for p in model.parameters() if p.requires_grad]
    squares = sum(float(widened(p).square().sum()) for p in parameters)
    return math.sqrt(squares / max(1, sum(p.numel() for p in parameters)))
