"""What a run has counted since its start and since its last line of metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Tally:
    """One worker's; what is not a tensor is the same on all, but for seconds.

    `sums` are of the steps since the last line, `final` is of those of the last epoch.
    """

    step: int = 0  # how many are done
    since: int = 0  # at the last line of metrics
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))  # loss, gradient norm
    final: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))  # losses
    line: dict[str, Any] = field(default_factory=dict)  # the last one; the last step always writes one
    elapsed: float = 0.0  # seconds, at the last checkpoint
    left_out: int = 0  # steps since the last line of metrics that were not taken, and have no loss
    left_out_last: int = 0  # of the last epoch
    tested: float = 0.0  # of them spent on tests along the run
    saved: float = 0.0  # and on checkpoints
    noise: dict[str, Any] | None = None  # the last look at it (see `noisecheck`)

    def add(self, measured: Tensor, *, taken: bool, last: bool) -> None:
        """Count a step's loss and gradient norm, float64[2], if it was taken; `last` if it is of the last epoch."""
        if not taken:
            self.left_out += 1
            self.left_out_last += last
            return
        self.sums += measured
        if last:
            self.final += measured[0]

    def means(self) -> Tensor:
        """Return the means since the last line, float64[2]."""
        return self.sums / max(1, self.step - self.since - self.left_out)

    def begin_line(self) -> None:
        """Count anew for the next one."""
        self.sums, self.since, self.left_out = torch.zeros_like(self.sums), self.step, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what is not a tensor."""
        return {k: v for k, v in vars(self).items() if not isinstance(v, Tensor)}

    def load_state_dict(self, state: Mapping[str, Any], sums: Tensor, final: Tensor) -> None:
        """Restore `state_dict`, and the tensors."""
        vars(self).update(state)
        self.sums, self.final = sums.clone(), final.clone()
