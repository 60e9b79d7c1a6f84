"""Training with local updates: an inner optimizer on each worker, and exchanges by `LocalUpdates`."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.comm.select_aggregator import choose
from packsaddle.errors import config_errors
from packsaddle.feedback.escape import Escape
from packsaddle.feedback.slices import is_sent_uncompressed
from packsaddle.local.inner import JoinedOptimizer
from packsaddle.local.options import Elastic
from packsaddle.local.updates import LocalUpdates
from packsaddle.options.schema import plain
from packsaddle.runs.config import Config, LocalConfig
from packsaddle.runs.tasks.sharding import Calendar
from packsaddle.runs.training import Closure, Training

_LAST_FRACTION = 0.1  # learning rate at the end of a cosine schedule, as a fraction of the peak
_MUON_MOMENTUM = 0.95  # default momentum of Muon, then with nesterov


class LocalTraining(Training):
    """Training with the local updates configured in [local].

    Other averages over workers, such as of losses, use the default group and a separate ledger, because an exchange may
    run in another thread at the same time.
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
        self._local = local = config.local
        super().__init__(config, calendar, local.every)

        # Make this worker's inner optimizer, then the exchanges.
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._inner = make_inner(config, local, model)
        with config_errors():
            self.front = LocalUpdates(
                self._inner,
                replace(config.compression(), monitor_every=max(1, config.log_every // local.every)),
                every=local.every,
                outer=local.outer,
                overlap=local.overlap,
                workers=elastic,
                noise=self._noise or config.noise.std,
                escape=escape,
                keep_unsent=local.keep_unsent,
                seed=config.seed,
            )
        self.channel = Communicator(resolve(None), Ledger())
        self._mu: dict[str, Any] = {}  # measured contraction before `finish`, whose exchange is uncompressed

    def step(self, closure: Closure, scalars: Tensor | None) -> Tensor:
        # Compute gradients, and clip them if configured.
        self.channel.step = self.front.steps
        loss = closure()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._local.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._local.clip, norm)
        measured = torch.stack([loss, norm])
        self.took = bool(measured.isfinite().all())

        # Set the scheduled learning rate. With elastic workers it depends on the anchor's steps.
        done = self.front.steps if self.front.membership is None else self.front.position
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
        """Exchange all pending updates. If that is rejected, exchange again: only valid updates remain then."""
        self._mu = self.contraction()
        if not self.front.flush():
            self.front.flush()

    def at_anchor(self) -> AbstractContextManager[None]:
        return self.front.at_anchor()

    def parts(self) -> dict[str, Any]:
        """See `Training`. Learning rate schedules are functions of the step, without a state."""
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
        """See `Training`. The exchange is described as if all fragments were exchanged together."""
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
        there = self.front.membership
        return {
            "parameters": d,
            "compressed_parameters": n,
            "mu": (choice.aggregator.mu(n, self.channel.group.size) * n + d - n) / d,
            "exchange": choice.name,
            "exchange_reason": choice.reason,
            "local": plain(self._local),
            **({} if there is None else {"elastic": {"workers": there.workers, "lost": there.lost}}),
        }

    @property
    def rounds(self) -> int:
        return self.front.rounds


def make_inner(config: Config, local: LocalConfig, model: nn.Module) -> Optimizer:
    """Return the inner optimizer configured in [local], which steps on each worker between exchanges."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rate: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if local.optimizer == "sgd":
        return torch.optim.SGD(named, **rate, momentum=config.momentum, nesterov=config.nesterov)
    adamw: dict[str, Any] = {**rate, "betas": tuple(local.betas)}
    if local.optimizer == "adamw":
        return torch.optim.AdamW(named, **adamw)

    # Muon for the matrices of hidden layers, AdamW for the rest, at the same learning rate (match_rms_adamw).
    hidden = hidden_matrices(model)
    matrices = [(name, p) for name, p in named if name in hidden]
    others = [(name, p) for name, p in named if name not in hidden]
    made: list[Optimizer] = []
    if matrices:
        nesterov = config.nesterov or not config.momentum
        muon: dict[str, Any] = {**rate, "momentum": config.momentum or _MUON_MOMENTUM, "nesterov": nesterov}
        made.append(torch.optim.Muon(matrices, **muon, adjust_lr_fn="match_rms_adamw"))
    if others:
        made.append(torch.optim.AdamW(others, **adamw))
    return JoinedOptimizer(made)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of all linear layers except the last one, the output layer."""
    linear = [f"{name}.weight".lstrip(".") for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return set(linear[:-1])
