"""The interface between a trainer and its optimizer: CompressedSGD here, local updates in `local_training`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.ledger import Bytes
from packsaddle.errors import ConfigError
from packsaddle.feedback.drift import Drift
from packsaddle.feedback.escape import Escape, Reset
from packsaddle.feedback.noise import Ramp, Rescheduled
from packsaddle.runs.config import Config, NoiseConfig
from packsaddle.runs.tasks.sharding import Calendar
from packsaddle.sgd.gradient import Storm
from packsaddle.sgd.optimizer import CompressedSGD

Closure = Callable[[], Tensor]  # clears the gradients, computes them, and returns the loss


class Training(ABC):
    """One worker's optimizer with its exchanges, as a trainer sees it.

    `channel` is for what else workers average, entered in the same totals of bytes.
    """

    channel: Communicator
    scalars: Tensor | None = None  # means over workers of what they gave to the last step; None if it had no exchange
    took: bool = True  # whether the last step counts in means of losses

    @abstractmethod
    def step(self, closure: Closure, scalars: Tensor | None) -> Tensor:
        """Do a step, averaging `scalars` over workers if it has an exchange; collective then.

        Returns this worker's loss and the norm of its gradient, float[2]. Raises NonFiniteError.
        """

    @abstractmethod
    def replan(self, calendar: Calendar) -> None:
        """Take another calendar for schedules, as the number of workers has changed."""

    @abstractmethod
    def finish(self) -> None:
        """Have one x on all workers at the end of a run; collective. Raises NonFiniteError."""

    @abstractmethod
    def at_anchor(self) -> AbstractContextManager[None]:
        """Have the parameters where all workers agree to be, for a while."""

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """Return what a checkpoint has in addition to the model, by name."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state, to be kept at the end of a run."""

    @abstractmethod
    def forgive(self) -> None:
        """Count steps that were left out in a row anew."""

    @abstractmethod
    def moved(self) -> Mapping[str, Bytes]:
        """Return this worker's bytes by purpose; collective."""

    @abstractmethod
    def walk(self) -> tuple[float, float]:
        """Return by how much noise of r = 1 moves a coordinate at once, and how often it does, with (r_t / r)^2."""

    @abstractmethod
    def contraction(self) -> dict[str, Any]:
        """Return `mu` and `mu_by_tensor`, as last measured."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return what is the same from a run's start to its end, as plain types."""

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Exchanges that were taken."""

    @property
    @abstractmethod
    def skipped(self) -> int:
        """Exchanges that were not."""

    @property
    @abstractmethod
    def resets(self) -> list[Reset]:
        """Firings of the escape check."""

    @property
    @abstractmethod
    def drifts(self) -> list[Drift]:
        """The comparisons at which workers differed."""

    def waits(self) -> list[float] | None:
        """Return the mean number of steps that a coordinate waits to be sent, by parameter, if that is known."""
        return None


class CompressedTraining(Training):
    """CompressedSGD: an exchange in every step, and one x."""

    def __init__(self, config: Config, model: nn.Module, calendar: Calendar, escape: Escape | None) -> None:
        self._config, self._calendar = config, calendar
        self._noise = noise_schedule(config.noise, calendar, 1)
        try:
            self._optimizer = CompressedSGD(
                model.named_parameters(),
                config.lr,
                config.compression(),
                noise=self._noise or config.noise.std,
                escape=escape,
                weight_decay=config.weight_decay,
                momentum=config.momentum if config.storm is None else Storm(config.storm),
                nesterov=config.nesterov,
                seed=config.seed,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.channel = self._optimizer.channel
        self._parameters = list(model.parameters())

    def step(self, closure: Closure, scalars: Tensor | None) -> Tensor:
        """See `Training`."""
        skipped = self._optimizer.skipped
        loss = self._optimizer.step(closure, scalars=scalars)
        self.scalars, self.took = self._optimizer.scalars, self._optimizer.skipped == skipped
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return torch.stack([loss, torch.nn.utils.get_total_norm(gradients)])

    def replan(self, calendar: Calendar) -> None:
        """See `Training`."""
        self._calendar = calendar
        if self._noise is not None:
            self._noise.ramp = ramp_of(self._config.noise, calendar, 1)

    def finish(self) -> None:
        """There is one x throughout."""

    def at_anchor(self) -> AbstractContextManager[None]:
        """They always are there."""
        return nullcontext()

    def parts(self) -> dict[str, Any]:
        """See `Training`."""
        return {"optimizer": self._optimizer}

    def state_dict(self) -> dict[str, Any]:
        """See `Training`."""
        return self._optimizer.state_dict()

    def forgive(self) -> None:
        """See `Training`."""
        self._optimizer.reset_skip_streak()

    def moved(self) -> Mapping[str, Bytes]:
        """See `Training`."""
        return self._optimizer.ledger.by_purpose

    def walk(self) -> tuple[float, float]:
        """See `Training`; a step moves x by eta xi."""
        return self._config.lr, noisy(self._config.noise, self._noise, self._calendar.steps)

    def contraction(self) -> dict[str, Any]:
        """See `Training`."""
        monitor = self._optimizer.monitor
        return {"mu": monitor.whole, "mu_by_tensor": monitor.by_tensor}

    def summary(self) -> dict[str, Any]:
        """See `Training`."""
        opt = self._optimizer
        return {
            "parameters": opt.numel,
            "compressed_parameters": opt.compressed_numel,
            "mu": opt.mu,
            "exchange": opt.choice.name,
            "exchange_reason": opt.choice.reason,
        }

    @property
    def rounds(self) -> int:
        """See `Training`."""
        return self._optimizer.steps

    @property
    def skipped(self) -> int:
        """See `Training`."""
        return self._optimizer.skipped

    @property
    def resets(self) -> list[Reset]:
        """See `Training`."""
        return self._optimizer.resets

    @property
    def drifts(self) -> list[Drift]:
        """See `Training`."""
        return self._optimizer.drifts

    def waits(self) -> list[float] | None:
        """See `Training`."""
        return self._optimizer.waits()


def noise_schedule(config: NoiseConfig, calendar: Calendar, every: int) -> Rescheduled | None:
    """Return the schedule of the noise by exchange, if it has one; exchanges are `every` steps apart."""
    return None if config.lower_from is None else Rescheduled(ramp_of(config, calendar, every))


def ramp_of(config: NoiseConfig, calendar: Calendar, every: int) -> Ramp:
    """Translate a noise schedule from epochs to exchanges."""
    assert config.lower_from is not None
    stop = calendar.steps if config.lower_until is None else calendar.step_at(config.lower_until)
    start = min(calendar.step_at(config.lower_from), stop)
    return Ramp(config.std, start // every, stop // every)


def noisy(config: NoiseConfig, schedule: Rescheduled | None, exchanges: int) -> float:
    """Return the sum of (r_t / r)^2 over exchanges: their number, less where r falls."""
    return schedule.ramp.squares(exchanges) / config.std**2 if schedule and config.std else float(exchanges)


def plain_guards(training: Training) -> dict[str, Any]:
    """Return what guards and escape check have found, as plain types."""
    return {
        "resets": [asdict(reset) for reset in training.resets],
        "skipped": training.skipped,
        "drifts": [asdict(drift) for drift in training.drifts],
    }
