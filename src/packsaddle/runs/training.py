"""The interface between a trainer and its optimizer: CompressedSGD here, local updates in `local_training`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.ledger import Bytes
from packsaddle.errors import config_errors
from packsaddle.feedback.escape import Escape
from packsaddle.feedback.noise import Ramp
from packsaddle.runs.config import Config
from packsaddle.runs.tasks.sharding import Calendar
from packsaddle.sgd.gradient import Storm
from packsaddle.sgd.optimizer import CompressedSGD

if TYPE_CHECKING:
    from packsaddle.local.updates import LocalUpdates

Closure = Callable[[], Tensor]  # clears the gradients, computes them, and returns the loss


@dataclass(repr=False)
class Rescheduled:
    """A noise schedule with a replaceable ramp: steps per epoch change with the number of workers."""

    ramp: Ramp

    def __call__(self, exchange: int) -> float:
        return self.ramp(exchange)

    def __repr__(self) -> str:
        return repr(self.ramp)  # compared between workers


class Training(ABC):
    """Interface of one worker's optimizer and its exchanges, used by `Trainer`.

    `front` exchanges updates, `every` steps apart. `channel` averages all other values, such as losses; both count
    bytes in the same totals. `reach`: distance by which noise of std 1 moves a coordinate in one exchange.
    """

    front: "CompressedSGD | LocalUpdates"
    channel: Communicator
    reach = 1.0
    scalars: Tensor | None = None  # means over workers of the last step's scalars; None if it had no exchange
    took: bool = True  # the last step counts in mean losses; False: skipped or non-finite

    def __init__(self, config: Config, calendar: Calendar, every: int) -> None:
        self._config, self._calendar, self._every = config, calendar, every
        self._noise = None if config.noise.lower_from is None else Rescheduled(self._ramp())

    def _ramp(self) -> Ramp:
        """Return the configured noise schedule, converted from epochs to exchanges."""
        noise, calendar = self._config.noise, self._calendar
        assert noise.lower_from is not None
        stop = calendar.steps if noise.lower_until is None else calendar.step_at(noise.lower_until)
        start = min(calendar.step_at(noise.lower_from), stop)
        return Ramp(noise.std, start // self._every, stop // self._every)

    def replan(self, calendar: Calendar) -> None:
        """Update the schedules for a new calendar. Call when the number of workers has changed."""
        self._calendar = calendar
        if self._noise is not None:
            self._noise.ramp = self._ramp()

    def walk(self) -> tuple[float, float]:
        """Return `reach`, and the sum of (r_t / r)^2 over all exchanges t, r_t the scheduled std, r the initial one."""
        exchanges, std = self._calendar.steps // self._every, self._config.noise.std
        return self.reach, self._noise.ramp.squares(exchanges) / std**2 if self._noise and std else float(exchanges)

    def guards(self) -> dict[str, Any]:
        """Return the escape check's resets, the number of skipped steps, and parameter drifts found, as plain types."""
        return {
            "resets": [asdict(reset) for reset in self.front.resets],
            "skipped": self.front.skipped,
            "drifts": [asdict(drift) for drift in self.front.drifts],
        }

    @abstractmethod
    def step(self, closure: Closure, scalars: Tensor | None) -> Tensor:
        """Do one step. If it has an exchange, it is collective and averages `scalars` over workers into `self.scalars`.

        Returns this worker's loss and the norm of its gradient before clipping, float[2]. Raises NonFiniteError.
        """

    def finish(self) -> None:  # noqa: B027 -- no-op if x is identical on all workers
        """Make the parameters identical on all workers at the end of a run; collective. Raises NonFiniteError."""

    def at_anchor(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters are the anchor, on which all workers last agreed."""
        return nullcontext()

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """Return the stateful objects to checkpoint in addition to the model, by name."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state at the end of a run, for its file in the run folder."""

    @abstractmethod
    def moved(self) -> Mapping[str, Bytes]:
        """Return the bytes that this worker sent and received, by purpose; collective."""

    @abstractmethod
    def contraction(self) -> dict[str, Any]:
        """Return the compressor's last measured contraction: `mu` of the whole vector and `mu_by_tensor`."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return the constant entries of the run's summary, such as numbers of parameters, as plain types."""

    @property
    @abstractmethod
    def rounds(self) -> int:
        """The number of applied exchanges; with local updates, each is of one fragment of the parameters."""

    def waits(self) -> list[float] | None:
        """Return the mean number of steps between two sends of a coordinate, one per parameter; None if unknown."""
        return None


class CompressedTraining(Training):
    """Training with CompressedSGD: an exchange in every step; parameters are identical on all workers."""

    front: CompressedSGD

    def __init__(self, config: Config, model: nn.Module, calendar: Calendar, escape: Escape | None) -> None:
        super().__init__(config, calendar, 1)
        with config_errors():
            self.front = CompressedSGD(
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
        self.channel, self.reach = self.front.channel, config.lr
        self._parameters = list(model.parameters())

    def step(self, closure: Closure, scalars: Tensor | None) -> Tensor:
        skipped = self.front.skipped
        loss = self.front.step(closure, scalars=scalars)
        self.scalars, self.took = self.front.scalars, self.front.skipped == skipped
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return torch.stack([loss, torch.nn.utils.get_total_norm(gradients)])

    def parts(self) -> dict[str, Any]:
        return {"optimizer": self.front}

    def state_dict(self) -> dict[str, Any]:
        return self.front.state_dict()

    def moved(self) -> Mapping[str, Bytes]:
        return self.front.ledger.by_purpose

    def contraction(self) -> dict[str, Any]:
        return {"mu": self.front.monitor.whole, "mu_by_tensor": self.front.monitor.by_tensor}

    def summary(self) -> dict[str, Any]:
        return {
            "parameters": self.front.numel,
            "compressed_parameters": self.front.compressed_numel,
            "mu": self.front.mu,
            "exchange": self.front.choice.name,
            "exchange_reason": self.front.choice.reason,
        }

    @property
    def rounds(self) -> int:
        return self.front.steps

    def waits(self) -> list[float] | None:
        return self.front.waits()
