"""Training by local updates: an optimizer on each worker, and LocalUpdates between them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.comm.select_aggregator import Choice, choose
from packsaddle.errors import ConfigError
from packsaddle.feedback.drift import Drift
from packsaddle.feedback.escape import Escape, Reset
from packsaddle.feedback.slices import goes_dense
from packsaddle.local.options import Elastic
from packsaddle.local.updates import LocalUpdates
from packsaddle.options.schema import plain
from packsaddle.runs.config import Config
from packsaddle.runs.inner_optimizers import make_inner, share_of_peak
from packsaddle.runs.tasks.sharding import Calendar
from packsaddle.runs.training import Closure, Training, noise_schedule, noisy, ramp_of


class LocalTraining(Training):
    """Local updates of a configuration's [local].

    Other averages of workers go through the main group and have a ledger of their own, because an exchange may run in
    another thread at the same time.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        calendar: Calendar,
        escape: Escape | None,
        elastic: Elastic | None = None,
    ) -> None:
        assert config.local is not None
        self._config, self._local, self._calendar = config, config.local, calendar
        self._noise = noise_schedule(config.noise, calendar, self._local.every)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._inner = make_inner(config, self._local, model.named_parameters())
        by_round = replace(config.compression(), monitor_every=max(1, config.log_every // self._local.every))
        try:
            self.updates = LocalUpdates(
                self._inner,
                by_round,
                every=self._local.every,
                outer=self._local.outer,
                overlap=self._local.overlap,
                workers=elastic,
                noise=self._noise or config.noise.std,
                escape=escape,
                keep_unsent=self._local.keep_unsent,
                seed=config.seed,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.channel = Communicator(resolve(None), Ledger())
        self._mu: dict[str, Any] = {}  # what was measured last, at the end of the run

    def step(self, closure: Closure, scalars: Tensor | None) -> Tensor:
        """See `Training`; the norm is that before clipping."""
        self.channel.step = self.updates.steps
        loss = closure()
        norm = self._clipped()
        measured = torch.stack([loss, norm])
        self.took = bool(measured.isfinite().all())
        for group in self._inner.param_groups:
            group["lr"] = self.rate(self._done())
        self._inner.step()
        self.scalars = None
        if scalars is not None and self.updates.exchanging:
            self.scalars = self.channel.mean(scalars.clone(), "metrics")
        return measured

    def _done(self) -> int:
        """Steps so far, by the calendar: with workers that come and go, those that the anchor has of all of them."""
        return self.updates.steps if self.updates.membership is None else self.updates.position

    def _clipped(self) -> Tensor:
        """Clip the gradients, if they are to be; return what their norm was, float[]."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._local.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._local.clip, norm)
        return norm

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0: rising in proportion, then constant or on half a cosine."""
        calendar = self._calendar
        done, end = calendar.position(step), calendar.position(calendar.steps)
        rising = self._local.warm_up * calendar.per_epoch
        if done + 1 < rising:
            return self._config.lr * (done + 1) / rising
        if self._local.schedule == "constant":
            return self._config.lr
        return self._config.lr * share_of_peak(done, rising, end)

    def replan(self, calendar: Calendar) -> None:
        """See `Training`."""
        self._calendar = calendar
        if self._noise is not None:
            self._noise.ramp = ramp_of(self._config.noise, calendar, self._local.every)

    def finish(self) -> None:
        """Exchange all that is pending, and again what others have moved if one worker's x was of no use."""
        self._mu = self.contraction()  # all of it is sent now, which would be measured too
        if not self.updates.flush():
            self.updates.flush()

    def at_anchor(self) -> AbstractContextManager[None]:
        """See `Training`."""
        return self.updates.at_anchor()

    def parts(self) -> dict[str, Any]:
        """See `Training`; schedules are functions of the step, and have no state."""
        return {"optimizer": self._inner, "local": self.updates, "ledger": self.channel.ledger}

    def state_dict(self) -> dict[str, Any]:
        """See `Training`."""
        return {"optimizer": self._inner.state_dict(), "local": self.updates.state_dict()}

    def forgive(self) -> None:
        """See `Training`."""
        self.updates.forgive()

    def moved(self) -> Mapping[str, Bytes]:
        """See `Training`."""
        self.updates.wait()
        found = dict(self.updates.ledger.by_purpose)
        for purpose, moved in self.channel.ledger.by_purpose.items():
            found[purpose] = found.get(purpose, Bytes()) + moved
        return found

    def walk(self) -> tuple[float, float]:
        """See `Training`; a round moves x by xi."""
        return 1.0, noisy(self._config.noise, self._noise, self._calendar.steps // self._local.every)

    def contraction(self) -> dict[str, Any]:
        """See `Training`."""
        return self._mu or {"mu": self.updates.contraction, "mu_by_tensor": {}}

    def summary(self) -> dict[str, Any]:
        """See `Training`; the exchange is that of all fragments together."""
        compressed = [p for p in self._parameters if not goes_dense(p, self._config.dense_below)]
        d, n = (sum(p.numel() for p in some) for some in (self._parameters, compressed))
        choice = self._choice([p.shape for p in compressed], d, n)
        mu = (choice.aggregator.mu(n, self.channel.group.size) * n + d - n) / d
        return {
            "parameters": d,
            "compressed_parameters": n,
            "mu": mu,
            "exchange": choice.name,
            "exchange_reason": choice.reason,
            "local": plain(self._local),
            **self._elastic_summary(),
        }

    def _elastic_summary(self) -> dict[str, Any]:
        there = self.updates.membership
        return {} if there is None else {"elastic": {"workers": there.workers, "lost": there.lost}}

    def _choice(self, shapes: list[torch.Size], d: int, n: int) -> Choice:
        """Return the exchange of the compressed part, n coordinates of d in tensors of these shapes."""
        config, back = self._config, self._config.back
        dense = config.compressor.lossless
        return choose(
            config.compressor.for_tensors(shapes) if n else config.compressor,
            "direct" if dense else config.exchange,
            d=n,
            dense=d - n + 1,
            workers=self.channel.group.size,
            itemsize=self._parameters[0].element_size(),
            back=back.for_tensors(shapes) if back is not None and n and not dense else None,
        )

    @property
    def rounds(self) -> int:
        """See `Training`; of fragments."""
        return self.updates.rounds

    @property
    def skipped(self) -> int:
        """See `Training`."""
        return self.updates.skipped

    @property
    def resets(self) -> list[Reset]:
        """See `Training`."""
        return self.updates.resets

    @property
    def drifts(self) -> list[Drift]:
        """See `Training`."""
        return self.updates.drifts
