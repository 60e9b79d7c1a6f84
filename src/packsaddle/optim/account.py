"""The account that a worker among others that come and go keeps of its own part: attempts, inner steps, weights, norms.

What all workers know alike is in `roster`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from packsaddle.errors import ConfigError


@dataclass
class Account:
    """One worker's own counts; norms are of its error memory."""

    attempts: int = 0  # at rounds
    included: int = 0  # the last of them that is in the anchor
    since: int = 0  # inner steps since then
    ahead: int = 0  # inner steps since the last round
    counted: float = 0.0  # of the total that its weight is the growth of: what earlier rounds have
    last_weight: float = 1.0  # in the last round that it was in
    norm: float = 0.0  # after the last round
    sent: float = 0.0  # of what it sent in its last round
    found_lost: float = 0.0  # of what it has found to be lost, and not told the others yet

    def step(self) -> None:
        """Count an inner step."""
        self.since += 1
        self.ahead += 1

    def weight(self, rule: Literal["steps"] | Callable[[], float] | None) -> float:
        """Return w_i in a round now, by `Elastic.weight`; 0 for a worker that has not moved.

        Raises ConfigError for the growth of a total that is not finite or falls.
        """
        if not self.since:
            return 0.0
        if rule is None:
            return 1.0
        found = float(self.since) if rule == "steps" else float(rule()) - self.counted
        if not (math.isfinite(found) and found >= 0):
            raise ConfigError(f"weight must return a total that is finite and does not fall, got {found:+g} more")
        return found

    def start_count(self, weight: float) -> None:
        """Count inner steps anew, once a round has what was done so far by this weight."""
        self.since, self.counted, self.last_weight = 0, self.counted + weight, weight or self.last_weight

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain types."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Account":
        """Return what `state_dict` was made of; a state may have other entries."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})
