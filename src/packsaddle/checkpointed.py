"""The state of a `CompressedSGD`: what a checkpoint holds, and how a run goes on from it."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.channel import Channel
from packsaddle.choose import Choice
from packsaddle.direction import Gradient
from packsaddle.drift import Drift, DriftGuard
from packsaddle.escape import EscapeCheck, Reset
from packsaddle.feedback import ErrorMemory
from packsaddle.flat import FlatParameters
from packsaddle.guard import Guard
from packsaddle.ledger import Ledger
from packsaddle.localsteps import LocalSteps
from packsaddle.memories import kind_of
from packsaddle.monitor import ContractionMonitor
from packsaddle.perturb import Perturber
from packsaddle.state import check_fits, fill


class Checkpointed(Optimizer):
    """An optimizer of these parts, which its constructor makes; each part knows its own state."""

    seed: int
    choice: Choice
    channel: Channel
    ledger: Ledger
    monitor: ContractionMonitor
    resets: list[Reset]
    guard: Guard
    _drift: DriftGuard
    _flat: FlatParameters
    _memory: ErrorMemory
    _direction: Gradient
    _local: LocalSteps
    _noise: Perturber
    _escape: EscapeCheck | None
    _step: int

    def _flat_state(self) -> dict[str, Tensor]:
        """The flat vectors of a checkpoint: this worker's memory, and x_t' if there is an escape check."""
        anchor = {"anchor": self._escape.anchor} if self._escape else {}
        vector = self._memory.vector
        kept = self._memory.vectors() | self._direction.vectors() | self._local.vectors()
        return {"pending": vector, **anchor, **kept, **self.choice.protocol.vectors(vector)}

    def _shared(self) -> dict[str, Tensor]:
        """Those of them that are the same on every worker."""
        return {name: v for name, v in self._flat_state().items() if name in ("anchor", "mean_estimate")}

    def _publish_state(self) -> None:
        """Show the flat vectors as per-parameter state, so that torch's checkpoint tools find them."""
        for name, flat in self._flat_state().items():
            for p, view in zip(self._flat.parameters, self._flat.views(flat), strict=True):
                self.state[p][name] = view

    def _publish_tried(self) -> None:
        """Show the vectors that a step has put in the place of others."""
        for name, views in {"pending": self._memory.views, **self._direction.views()}.items():
            for p, view in zip(self._flat.parameters, views, strict=True):
                self.state[p][name] = view

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state: per parameter "pending" (eta e^(i), or e^(i) with memory="gradient") and "anchor"
        (x_t'); t, t', seed, rank and number of workers in each group; what the exchange holds back; outstanding noise;
        the ledger's totals; resets. Tensors and plain types only. Each worker has its own."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update(self._identity(), step=self._step, unit=self._memory.unit)
            group["started"] = self._direction.started
            group["anchor_step"] = self._escape.anchor_step if self._escape else 0
        state["exchange"] = self.choice.protocol.state_dict()
        state["noise"] = self._noise.state_dict()
        state["guard"] = self.guard.skips.state_dict()
        state["ledger"] = self.ledger.state_dict()
        state["monitor"] = self.monitor.state_dict()
        state["resets"] = [asdict(reset) for reset in self.resets]
        state["drifts"] = [asdict(drift) for drift in self._drift.found]
        return state

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError, naming the first difference, if `load_state_dict` would not take this."""
        if not isinstance(state_dict.get("param_groups"), list):
            raise ValueError("the state has no param_groups; was it saved by CompressedSGD?")
        check_fits(state_dict, self._flat, self._flat_state(), self._identity())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved on this worker; raises ValueError, changing nothing, if it does not fit."""
        self.check_state_dict(state_dict)
        first = state_dict["param_groups"][0]
        step, anchor_step, unit = first["step"], first["anchor_step"], first["unit"]
        self._direction.started = first.get("started", True)
        # torch would cast state to the parameters' dtype, so only the groups go through it.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        fill(state_dict, self._flat, self._flat_state())
        self._memory.settle(unit)
        self._publish_state()
        self._step = step
        if self._escape:
            self._escape.anchor_step = anchor_step
        for group in self.param_groups:
            for name in ("step", "anchor_step", "unit", "started", *self._identity()):
                group.pop(name, None)
        self.choice.protocol.load_state_dict(state_dict.get("exchange", {}), self._flat.x.device)
        self._noise.load_state_dict(state_dict.get("noise", {}), self._memory, step)
        self.guard.skips.load_state_dict(state_dict.get("guard", {}))
        self.ledger.load_state_dict(state_dict.get("ledger", []))
        self.monitor.load_state_dict(state_dict.get("monitor", {}))
        self.resets = [Reset(**reset) for reset in state_dict.get("resets", [])]
        self._drift.found = [Drift(**drift) for drift in state_dict.get("drifts", [])]

    def _identity(self) -> dict[str, int | str]:
        """What must be the same where a state is loaded as where it was saved: an error memory is one worker's, and
        an owner's error belongs to its chunk (the other exchanges hold nothing back)."""
        owners = self.choice.name if "residual" in self._flat_state() else "none"
        return {
            "seed": self.seed,
            "rank": self.channel.group.rank,
            "workers": self.channel.group.size,
            "owners": owners,
            "memory": kind_of(self._memory),
            "direction": type(self._direction).__name__,
            "local_steps": self._local.every,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copying and pickling: parameters, flat vector and group belong together. Use `state_dict`."""
        raise TypeError("CompressedSGD cannot be copied or pickled; use state_dict() and load_state_dict()")
