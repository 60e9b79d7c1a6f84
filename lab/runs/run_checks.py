"""Checks along a run: certificates, stability of the step size, and the size of the artificial noise.

The step size is checked before training and after 1, 2, 4, ... epochs (see `lab.runs.step_stability`). The artificial
noise is compared with that of mini-batches, which changes during training: at the start, at the end, and after n, 2n,
4n, ... steps, where n is an epoch, or a tenth of the run if that is less.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lab.runs.config import Config
from lab.runs.run_folder import RunFolder
from lab.runs.step_stability import CoordinateStep, largest_overshoot
from lab.tasks.images import Dataset
from lab.tasks.models import Task, task_loss
from lab.tasks.sharding import Batches, Calendar, Examples
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import Solo, resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.simulation import FusedGroup
from packsaddle.curvature.certificate import Verdict, draw_iterates
from packsaddle.curvature.certify import certify
from packsaddle.curvature.gradient_noise import gradient_noise
from packsaddle.curvature.hessian import Curvature, NotFiniteError
from packsaddle.numerics.seeds import Stream, generator
from packsaddle.theory.noise_walk import FAR, Walk, rms

_BATCHES = 8


class NoiseCheck:
    """Compares the artificial noise with mini-batch noise, which is measured on this process's next batches.

    Networks with batch normalization are excluded, since at the start of training their gradients in evaluation mode
    differ from those in training mode.
    """

    def __init__(self, config: Config, task: Task, data: Dataset, workers: int) -> None:
        self._config, self._task, self._data, self._workers = config, task, data, workers
        self._size = rms(task)
        # Local updates are excluded too: their noise is in the units of x, not of a gradient.
        normalised = any(hasattr(module, "running_mean") for module in task.modules())
        self._measures = config.local is None and not normalised

    def due(self, step: int, steps: int, per_epoch: int) -> bool:
        first = max(1, min(per_epoch, steps // 10))
        times, rest = divmod(step, first)
        return step == steps or (rest == 0 and times & (times - 1) == 0)

    def measurements(self, step: int, batches: Batches, moves: tuple[float, float]) -> dict[str, Any]:
        """Return the artificial and the mini-batch noise measured before step `step`, as plain types.

        `moves` is the result of `Training.walk`.
        """
        r = self._config.noise.std
        walk = Walk(*moves, self._size)
        values = {"step": step, "r": r, "walk": walk.times(r), "suggested": walk.suggested()}
        first = next(self._task.parameters())
        if self._measures:
            read = [self._data.batch(batches[step + ahead], first.device, first.dtype) for ahead in range(_BATCHES)]
            with suppress(NotFiniteError):  # the step itself reports non-finite gradients
                found = gradient_noise(self._task, task_loss, read, workers=self._workers, process_group=Solo())
                times = found.times(r)
                values |= {"times": times, "std": found.std, "std_error": found.std_error, **asdict(found)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def noise_warning(found: dict[str, Any], *, by_round: bool = False) -> str | None:
    """Return a warning if a run's noise would move the parameters too far, otherwise None.

    `found` has the measurements of `NoiseCheck`. `by_round` is True if noise is added per round of local updates.
    """
    walk, times, suggested = found["walk"], found.get("times"), found["suggested"]
    if walk is None or suggested is None or not walk > FAR:
        return None
    length = "r sqrt(rounds)" if by_round else "eta r sqrt(T)"
    own = "" if times is None else f"is {times:,.0f} times the gradient's own noise at step {found['step']:,} and "
    return (
        f"noise {found['r']:.2g} {own}moves x by {walk:,.3g} ||x_0|| over the run, {length} per coordinate; "
        f"above {FAR:g} ||x_0|| it tends to keep the loss high; suggested r = {suggested:.1g}"
    )


class Inspector:
    """Certification during a run, and saving of iterates to certify later. Every method is collective."""

    def __init__(
        self, config: Config, task: Task, data: Dataset, shards: Sequence[Tensor], steps: int, per_epoch: int
    ) -> None:
        """Choose the examples to certify on.

        `shards` are the shards of the workers in this process; there are several in a fused simulation.
        """
        assert config.certify is not None
        self._rule, self._lr, self._seed = config.certify, config.sgd_lr(), config.seed
        self._task, self._steps, self._per_epoch, self._population = task, steps, per_epoch, len(data)
        like = next(task.parameters())
        # Choose examples at random, since a shard may be sorted by class.
        chosen = []
        for worker, mine in enumerate(shards, start=resolve(None).rank):
            rng = generator(self._seed, 0, Stream.CERTIFY, worker=worker)
            chosen.append(mine[torch.randperm(len(mine), generator=rng)[: self._rule.examples]])
        self.examples = Examples(data, torch.cat(chosen), like.device, like.dtype)

        # Certify every `every` epochs, at the epochs `at`, and at the end if one of the two is set.
        due = {round(epoch * per_epoch) for epoch in self._rule.at}
        if self._rule.every is not None:
            stride = max(1, round(self._rule.every * per_epoch))
            due |= {steps, *range(stride, steps, stride)}
        self._due = {min(max(1, step), steps) for step in due} | ({steps} if due else set())
        self._iterates = set(draw_iterates(self._rule.iterates, steps, self._seed))

    def due(self, step: int) -> bool:
        return step in self._iterates or step in self._due

    def inspect(self, step: int, folder: RunFolder) -> None:
        """Save the current parameters if this iterate was drawn, and certify them if due. Call before step `step`."""
        if step in self._iterates and resolve(None).rank == 0:
            folder.save_tensors(iterate_name(step), self._task.network.state_dict())
        if step in self._due:
            rule, device = self._rule, self.examples.device
            try:
                found = certify(
                    self._task,
                    task_loss,
                    self.examples,
                    epsilon=rule.last_epsilon if rule.last_epsilon and step == self._steps else rule.epsilon,
                    hessian_lipschitz=rule.hessian_lipschitz,
                    search=replace(rule, generator=generator(self._seed, step, Stream.CERTIFY, device=device)),
                    sample_of=self._population,
                    process_group=Solo() if isinstance(resolve(None), FusedGroup) else None,
                ).to_dict(self._lr)
            except NotFiniteError:  # ignored, since a run that diverged continues to its end and reports the divergence
                found = {"verdict": str(Verdict.GRADIENT_TOO_LARGE), "loss": None}
            if resolve(None).rank == 0:
                folder.append("certificates.jsonl", {"step": step, "epoch": step / self._per_epoch, **found})


def iterate_name(step: int) -> str:
    return f"iterates/step-{step:08d}.pt"


def drawn_names(config: Config, steps: int) -> list[str]:
    m = 0 if config.certify is None else config.certify.iterates
    return [iterate_name(step) for step in draw_iterates(m, steps, config.seed)]


# The check uses 1/128 of the examples, but at least 32 and at most 256. Ten Hessian-vector products on them take about
# a quarter of an epoch.
_LEAST, _MOST, _SHARE = 32, 256, 128
# The check applies if some coordinates have at least this mean number of steps between two sends. If coordinates are
# sent more often, few gradients accumulate between two sends, so the step size needs no check.
_LONG = 5.0


class StepSizeCheck:
    """A check of the step size's stability for coordinates that are rarely sent, on this process's examples."""

    def __init__(
        self, config: Config, task: Task, waits: Sequence[float] | None, data: Dataset, shards: Sequence[Tensor]
    ) -> None:
        """Choose the examples. `waits` is the result of `Training.waits`; `shards` are those of the workers in this
        process."""
        self._config, self._task = config, task
        self._steps = [
            CoordinateStep(name, config.lr / (1 - config.effective_momentum()[0]), wait)
            for (name, p), wait in zip(task.named_parameters(), waits or (), strict=False)
            if p.requires_grad
        ]
        self._concerned = any(step.wait >= _LONG for step in self._steps)
        first = next(task.parameters())

        # Choose evenly spaced examples, since a shard may be sorted by class.
        n = max(1, min(max(_LEAST, sum(map(len, shards)) // _SHARE), _MOST) // len(shards))
        chosen = torch.cat([shard[:: max(1, len(shard) // n)][:n] for shard in shards])
        self._examples = Examples(data, chosen, first.device, first.dtype)

    def due(self, step: int, calendar: Calendar) -> bool:
        epochs, rest = divmod(step, calendar.per_epoch)
        return self._concerned and rest == 0 and epochs & (epochs - 1) == 0

    def warning(self, step: int) -> str | None:
        channel = Communicator(Solo(), Ledger())
        dice = generator(self._config.seed, step, Stream.CERTIFY)
        try:
            worst = largest_overshoot(Curvature(self._task, task_loss, self._examples, channel), self._steps, dice)
        except NotFiniteError:
            return None  # the step itself reports non-finite gradients
        return worst.advice() if worst.is_unstable else None
