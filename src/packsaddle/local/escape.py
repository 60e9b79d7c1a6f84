"""The saddle escape check of local updates: Algorithm 1, lines 4-8, at the averaged parameters after each round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.feedback.escape import Escape, EscapeCheck, Reset
from packsaddle.feedback.state import ANY, Value, Vector, attribute
from packsaddle.local.fragment import Fragment


@dataclass
class _Vector:
    """The anchor as `EscapeCheck` needs it: a flat vector x, float[d], whose first coordinates are compressed."""

    x: Tensor
    compressed_d: int


class AnchorEscape:
    """Runs a user's `Escape` check on the anchor, the parameters last agreed on by all workers, after each round.

    The check's interval and `every` count rounds. The user's objective is evaluated with the parameters at the anchor.
    Raises ValueError for more than one fragment, or a `delay`.
    """

    def __init__(
        self, rule: Escape, fragments: Sequence[Fragment], channel: Communicator, seed: int, *, delay: int
    ) -> None:
        if len(fragments) > 1 or delay:
            raise ValueError("escape needs fragments=1, delay=0 and no tensor parallelism: it compares whole anchors")
        (self._whole,) = fragments
        self._anchor, self._objective = self._whole.anchor, rule.objective
        x = _Vector(self._anchor.flat, self._whole.compressed_d)
        self._check = EscapeCheck(replace(rule, objective=self._at_anchor), x, channel, seed)
        self.begin = self._check.begin  # starts the first check interval at the current anchor

    def _at_anchor(self) -> float | Tensor:
        self._anchor.set_parameters(self._anchor.views)
        return self._objective()

    def run(self) -> Reset | None:
        """Run the check after a round, then set the parameters to their start point; return its firing, or None."""
        try:
            reset, lost = self._check.run(self._whole.rounds, self._whole.feedback.pending())
            if reset is not None:
                self._whole.feedback.reset(lost)
            return reset
        finally:
            self._anchor.move_to_start()

    def fields(self) -> list[Vector | Value]:
        """Return the saved-state fields: the start point x_t' of the check interval, by parameter, and its step t'."""
        anchor = {place.name: view for place, view in self._whole.named(self._check.anchor)}
        shapes = {name: view.shape for name, view in anchor.items()}
        step = attribute(("escape", "step"), self._check, "anchor_step", int)
        return [Vector(("escape", "anchor", ANY), shapes, lambda: anchor), step]
