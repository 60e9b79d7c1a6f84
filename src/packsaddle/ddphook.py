"""What `register_ddp_hook` returns: the bytes, the steps, the error memory, and how to save it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from packsaddle.bucketexchange import BucketExchange
from packsaddle.channel import ring_all_reduce
from packsaddle.escape import Reset
from packsaddle.ledger import Bytes
from packsaddle.state import check_identity, check_shape


class DDPHook(BucketExchange):
    """A communication hook that has been registered."""

    @property
    def uncompressed(self) -> Bytes:
        """What this worker would have moved in as many exchanges without the hook: a ring all-reduce of gradients."""
        exchanges = self.steps + self.skipped
        d = sum(place.size * place.parameter.element_size() for place in self._places)
        return ring_all_reduce(exchanges * d, self.channel.group.size)

    @torch.no_grad()
    def memory(self) -> dict[str, Tensor]:
        """Return this worker's e^(i), in units of a gradient, by parameter, with its share of what the exchange holds.

        The mean over workers is all that has not been applied yet. In a backward pass it is that of the step before.
        """
        self._settle()
        found = {place.name: torch.zeros_like(place.parameter, dtype=torch.float32) for place in self._places}
        with self._lock:
            found |= {name: view.clone() for name, view in self._loose.items()}
            for exchanger in self._exchangers.values():
                error = exchanger.error(self.channel.group.size)
                found |= {place.name: view for place, view in exchanger.section.views(error)}
        return found

    @torch.no_grad()
    def forget(self, lost: Mapping[str, Tensor]) -> None:
        """Set e to zero (line 7), or to what is given by parameter, in units of a gradient."""
        self._settle()
        self._loose = {name: error.clone() for name, error in lost.items()}
        for exchanger in self._exchangers.values():
            exchanger.drop()
            for place, view in exchanger.section.views(exchanger.section.error):
                if place.name in self._loose:
                    view.copy_(self._loose.pop(place.name))

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state: e^(i) by parameter, the step, what the exchange holds, the ledger's totals.

        Tensors and plain types only; each worker has its own. With scope="bucket" what a two-way exchange holds back is
        in the error memory of its owner, since buckets may differ when it is loaded: nothing is lost, but a run goes on
        bit for bit only with scope="model".
        """
        pending, held = self.memory(), dict[str, Any]()
        if self._rules.scope == "model":
            for exchanger in self._exchangers.values():
                section = exchanger.section
                pending |= {place.name: view.clone() for place, view in section.views(section.error)}
                held = exchanger.held()
        return {
            "identity": self._identity(),
            "steps": self._steps,
            "skips": self._skips.state_dict(),
            "rates": dict(self._rates.units),
            "pending": pending,
            "held": held,
            "allocation": self._allocation.state_dict(),
            "ledger": self.ledger.state_dict(),
            "resets": [asdict(reset) for reset in self.resets],
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first difference, if `load_state_dict` would not take this."""
        if "identity" not in state:
            raise ValueError("the state has no identity; was it saved by a hook?")
        check_identity(state["identity"], self._identity())
        pending = state["pending"]
        for place in self._places:
            check_shape(f"the error of {place.name}", pending.get(place.name), place.parameter.shape)
        if len(pending) > len(self._places):
            raise ValueError(f"the state is of {len(pending)} parameters, and there are {len(self._places)}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` saved on this worker; raises ValueError, changing nothing, if it does not fit."""
        self.check_state_dict(state)
        pending = state["pending"]
        self._settle()
        self._exchangers = {}
        self._loose = {name: error.to(self.device, copy=True) for name, error in pending.items()}
        self._steps, self._rates.units = state["steps"], dict(state["rates"])
        self._skips.load_state_dict(state["skips"])
        if self._rules.scope == "model":
            exchanger = self._exchanger(frozenset(place.name for place in self._places))
            exchanger.restore(state["held"], self._steps, self.channel.group.size)
        self._allocation.load_state_dict(state["allocation"], self.device)
        self.ledger.load_state_dict(state["ledger"])
        self.resets = [Reset(**reset) for reset in state["resets"]]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])

    def _identity(self) -> dict[str, Any]:
        """What must be the same where a state is loaded as where it was saved."""
        group = self.channel.group
        return {
            "seed": self._rules.seed,
            "rank": group.rank,
            "workers": group.size,
            "scope": self._rules.scope,
            "exchange": self._rules.exchange,
            "parts": ", ".join(self.parts) or "none",
        }
