"""A run's look at its artificial noise: how far that carries x, and how it compares with the noise of mini-batches.

Mini-batch noise changes as the loss leaves its start: on a plateau it was eleven times that of the first step. So the
run looks at its start, after an epoch (or a tenth of its steps if that is sooner), after twice, four times, ... as
many, and at its end.
"""

import math
from dataclasses import asdict
from typing import Any

from packsaddle.comm.group import Solo
from packsaddle.curvature.gradient_noise import GradientNoise, gradient_noise
from packsaddle.curvature.hessian import NotFiniteError
from packsaddle.experiments.certification import task_loss
from packsaddle.experiments.config import Config
from packsaddle.experiments.tasks.images import Dataset
from packsaddle.experiments.tasks.models import Task
from packsaddle.experiments.tasks.sharding import Batches
from packsaddle.theory.noise_walk import FAR, Walk, rms

_BATCHES = 8


class NoiseCheck:
    """Compares some coming batches of this process, whose gradients differ as those of every worker do.

    The gradients of networks with batch normalisation are left out: in evaluation mode, before statistics have
    gathered, they are not those that the network trains by.
    """

    def __init__(self, config: Config, task: Task, data: Dataset, workers: int) -> None:
        """Take note of the size of x_0, which `task` is at."""
        self._config, self._task, self._data, self._workers = config, task, data, workers
        self._size = rms(task)
        self._measures = not any(hasattr(module, "running_mean") for module in task.modules())

    def due(self, step: int, steps: int, per_epoch: int) -> bool:
        """Whether to look before step `step`, or, where it is `steps`, at the end."""
        first = max(1, min(per_epoch, steps // 10))
        times, rest = divmod(step, first)
        return step == steps or (rest == 0 and times & (times - 1) == 0)

    def look(self, step: int, batches: Batches, noisy_steps: float) -> dict[str, Any]:
        """Return what is found before a step of a run of so many steps with noise, as plain types."""
        r = self._config.noise.std
        walk = Walk(self._config.lr, noisy_steps, self._size)
        said = {"step": step, "r": r, "walk": walk.times(r), "suggested": walk.suggested()}
        found = self._measure(step, batches) if self._measures else None
        if found is not None:
            times = found.times(r, momentum=self._config.momentum)
            said |= {"times": times, "std": found.std, "std_error": found.std_error, **asdict(found)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in said.items()}

    def _measure(self, step: int, batches: Batches) -> GradientNoise | None:
        device, dtype = (first := next(self._task.parameters())).device, first.dtype
        read = [self._data.batch(batches[step + ahead], device, dtype) for ahead in range(_BATCHES)]
        try:
            return gradient_noise(self._task, task_loss, read, workers=self._workers, process_group=Solo())
        except NotFiniteError:
            return None  # the gradient tells


def warning(look: dict[str, Any]) -> str | None:
    """Return what is to be said of a run's noise, if it carries x too far."""
    walk, times, suggested = look["walk"], look.get("times"), look["suggested"]
    if walk is None or suggested is None or not walk > FAR:
        return None
    own = "" if times is None else f"is {times:,.0f} times the gradient's own noise at step {look['step']:,} and "
    return (
        f"noise {look['r']:.2g} {own}carries x {walk:,.3g} times ||x_0|| away in the run, eta r sqrt(T) a coordinate; "
        f"beyond {FAR:g} times it is more likely to keep the loss up than to free it; suggested r = {suggested:.1g}"
    )
