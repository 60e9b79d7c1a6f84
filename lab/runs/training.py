"""The interface of a trainer to its optimizer, with implementations for CompressedSGD and for local updates."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lab.runs.config import Config, LocalConfig
from lab.tasks.sharding import Calendar
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.comm.select_aggregator import choose
from packsaddle.errors import config_errors
from packsaddle.feedback.escape import Escape
from packsaddle.feedback.noise import Ramp
from packsaddle.feedback.slices import is_sent_uncompressed
from packsaddle.integrations.joined import JoinedOptimizer
from packsaddle.local.options import Elastic
from packsaddle.local.updates import LocalUpdates
from packsaddle.options.schema import plain
from packsaddle.plan.model import muon_and_adamw
from packsaddle.sgd.optimizer import CompressedSGD

_LAST_FRACTION = 0.1  # learning rate at the end of a cosine schedule, as a fraction of the peak
Closure = Callable[[], Tensor]  # clears the gradients, computes new ones, and returns the loss


@dataclass(repr=False)
class Rescheduled:
    """A noise schedule whose `ramp` (std by exchange) can be replaced.

    It is replaced when the number of workers, and thus the number of steps per epoch, has changed.
    """

    ramp: Ramp

    def __call__(self, exchange: int) -> float:
        return self.ramp(exchange)

    def __repr__(self) -> str:
        return repr(self.ramp)  # workers compare this text, to validate that their schedules are equal


class Training(ABC):
    """Interface of one worker's optimizer and its exchanges, used by `Trainer`.

    `front` is the object that exchanges updates, every `every` steps. `channel` averages all remaining values, such as
    losses. Both count bytes in the same totals. `reach` is the distance by which noise of std 1 moves a coordinate in
    one exchange.
    """

    front: CompressedSGD | LocalUpdates
    channel: Communicator
    reach = 1.0
    scalars: Tensor | None = None  # means over workers of the last step's scalars; None if it had no exchange
    took: bool = True  # True: the last step counts in mean losses; False: it was skipped or non-finite

    def __init__(self, config: Config, calendar: Calendar, every: int) -> None:
        self._config, self._calendar, self._every = config, calendar, every
        self._noise = None if config.noise.lower_from is None else Rescheduled(self._ramp())

    def _ramp(self) -> Ramp:
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
        """Return `reach`, and the sum of (r_t / r)^2 over all exchanges t.

        r_t is the scheduled standard deviation of the noise, and r the initial one.
        """
        exchanges, std = self._calendar.steps // self._every, self._config.noise.std
        return self.reach, self._noise.ramp.squares(exchanges) / std**2 if self._noise and std else float(exchanges)

    @abstractmethod
    def step(self, closure: Closure, scalars: Tensor | None) -> Tensor:
        """Do one step, and return this worker's loss and the norm of its gradient before clipping, float[2].

        A step with an exchange is collective, and sets `self.scalars` to the mean of `scalars` over workers. Raises
        NonFiniteError after too many skipped steps.
        """

    def finish(self) -> None:  # noqa: B027 -- no-op if x is identical on all workers
        """Make the parameters identical on all workers at the end of a run; collective.

        Raises NonFiniteError after too many rejected rounds.
        """

    def at_anchor(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parts(self) -> dict[str, Any]:
        """Return the stateful objects to checkpoint in addition to the model, by name."""
        return {"optimizer": self.front}

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state at the end of a run, for its file in the run folder."""
        return self.front.state_dict()

    def moved(self) -> Mapping[str, Bytes]:
        """Return the bytes that this worker sent and received, by purpose; collective."""
        return self.front.ledger.by_purpose

    @abstractmethod
    def contraction(self) -> dict[str, Any]:
        """Return the compressor's last measured contraction: `mu` of the whole vector and `mu_by_tensor`."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return the constant entries of the run's summary, such as numbers of parameters, as plain types."""

    @property
    def rounds(self) -> int:
        """The number of applied exchanges. With local updates, an exchange is of one fragment of the parameters."""
        return self.front.steps

    def waits(self) -> list[float] | None:
        """Return the mean number of steps between two sends of a coordinate, one per parameter; None if unknown."""
        return None


class CompressedTraining(Training):
    """Training with CompressedSGD: every step has an exchange, and parameters are identical on all workers."""

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
                momentum=config.effective_momentum()[0],
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

    def waits(self) -> list[float] | None:
        return self.front.waits()


class LocalTraining(Training):
    """Training with the local updates that are configured in the table [local].

    Averages that are not of updates, such as of losses, use the default group and a separate ledger, because an
    exchange of updates may run in another thread at the same time.
    """

    front: LocalUpdates

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        calendar: Calendar,
        escape: Escape | None,
        elastic: Elastic | None = None,
    ) -> None:
        assert config.local is not None
        self._local, self._is_elastic = config.local, elastic is not None
        local = config.local
        super().__init__(config, calendar, local.every)

        # Make this worker's inner optimizer, then the exchanges.
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._inner = make_inner(config, local, model)
        with config_errors():
            self.front = LocalUpdates(
                self._inner,
                replace(config.compression(), monitor_every=max(1, config.log_every // local.every)),
                **local.arguments(),
                workers=elastic,
                noise=self._noise or config.noise.std,
                escape=escape,
                seed=config.seed,
            )
        self.channel = Communicator(resolve(None), Ledger())
        # Contraction measured before `finish`, since the exchange in `finish` has a different compressor.
        self._mu: dict[str, Any] = {}

    def step(self, closure: Closure, scalars: Tensor | None) -> Tensor:
        # Compute gradients, and clip them if configured.
        self.channel.step = self.front.steps
        loss = closure()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._local.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._local.clip, norm)
        measured = torch.stack([loss, norm])
        self.took = bool(measured.isfinite().all())

        # Set the scheduled learning rate. With elastic workers it depends on the number of steps of all workers that
        # the anchor includes.
        done = self.front.position if self._is_elastic else self.front.steps
        for group in self._inner.param_groups:
            group["lr"] = self.rate(done)
        self._inner.step()
        self.scalars = None
        if scalars is not None and self.front.exchanging:
            self.scalars = self.channel.mean(scalars.clone(), "metrics")
        return measured

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then constant or a cosine down to 10% of the peak."""
        calendar, peak = self._calendar, self._config.lr
        done, end = calendar.position(step), calendar.position(calendar.steps)
        rising = self._local.warm_up * calendar.per_epoch
        if done + 1 < rising:
            return peak * (done + 1) / rising
        if self._local.schedule == "constant":
            return peak
        passed = min(1.0, max(0.0, (done - rising) / max(1.0, end - rising)))
        return peak * (_LAST_FRACTION + (1 - _LAST_FRACTION) * (1 + math.cos(math.pi * passed)) / 2)

    def finish(self) -> None:
        """Exchange the pending updates. If the exchange is rejected, exchange the updates that are still valid."""
        self._mu = self.contraction()
        if not self.front.flush():
            self.front.flush()

    def at_anchor(self) -> AbstractContextManager[None]:
        return self.front.at_anchor()

    def parts(self) -> dict[str, Any]:
        """Return the objects to checkpoint, see `Training`. Learning rate schedules are not among them: they have no
        state, since they are functions of the step."""
        return {"optimizer": self._inner, "local": self.front, "ledger": self.channel.ledger}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._inner.state_dict(), "local": self.front.state_dict()}

    def moved(self) -> Mapping[str, Bytes]:
        self.front.wait()
        found = dict(self.front.ledger.by_purpose)
        for purpose, moved in self.channel.ledger.by_purpose.items():
            found[purpose] = found.get(purpose, Bytes()) + moved
        return found

    def contraction(self) -> dict[str, Any]:
        return self._mu or {"mu": self.front.contraction, "mu_by_tensor": {}}

    def summary(self) -> dict[str, Any]:
        """Return the constant entries of the summary, see `Training`.

        The exchange is described as if all fragments were exchanged together.
        """
        # n of the d coordinates are compressed.
        config = self._config
        compressed = [p for p in self._parameters if not is_sent_uncompressed(p, config.dense_below)]
        d, n = (sum(p.numel() for p in some) for some in (self._parameters, compressed))
        shapes, lossless = [p.shape for p in compressed], config.compressor.lossless
        choice = choose(
            config.compressor.for_tensors(shapes) if n else config.compressor,
            self.front.options.compression.exchange_of(config.compressor),
            d=n,
            dense=d - n + 1,
            workers=self.channel.group.size,
            itemsize=self._parameters[0].element_size(),
            back=config.back.for_tensors(shapes) if config.back is not None and n and not lossless else None,
        )
        return {
            "parameters": d,
            "compressed_parameters": n,
            "mu": (choice.aggregator.mu(n, self.channel.group.size) * n + d - n) / d,
            "exchange": choice.name,
            "exchange_reason": choice.reason,
            "local": plain(self._local),
            **({"elastic": {"workers": self.front.workers}} if self._is_elastic else {}),
        }

    @property
    def rounds(self) -> int:
        return self.front.rounds


def make_inner(config: Config, local: LocalConfig, model: nn.Module) -> Optimizer:
    """Return the inner optimizer configured in [local], which steps on each worker between exchanges."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rate: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    momentum: dict[str, Any] = dict(zip(("momentum", "nesterov"), config.effective_momentum(), strict=True))
    if local.optimizer == "sgd":
        return torch.optim.SGD(named, **rate, **momentum)
    adamw: dict[str, Any] = {**rate, "betas": tuple(local.betas)}
    if local.optimizer == "adamw":
        return torch.optim.AdamW(named, **adamw)

    # match_rms_adamw scales Muon's updates so that the learning rate of AdamW suits both.
    return JoinedOptimizer(muon_and_adamw(model, {**rate, **momentum, "adjust_lr_fn": "match_rms_adamw"}, adamw))
