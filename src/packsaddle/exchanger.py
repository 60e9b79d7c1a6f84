"""What a hook is to do, and one section of the gradient doing it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from packsaddle.average import Averaged, Protocol
from packsaddle.channel import Channel
from packsaddle.choose import choose
from packsaddle.compress import Compressor, Identity
from packsaddle.sections import Section
from packsaddle.seeds import mix

Schedule = Callable[[int], Compressor]


@dataclass(frozen=True)
class Rules:
    """How gradients are to be exchanged; see `register_ddp_hook`."""

    compressor: Compressor | Schedule
    exchange: str
    back: Compressor | None
    scope: Literal["bucket", "model"]
    error_feedback: bool
    start_step: int
    seed: int

    def __post_init__(self) -> None:
        if self.start_step < 0:
            raise ValueError(f"start_step must be 0 or more steps, got {self.start_step}")
        if self.scope not in ("bucket", "model"):
            raise ValueError(f'scope must be "bucket" or "model", got {self.scope!r}')
        given = self.at(self.start_step) if callable(self.compressor) else self.compressor
        if not isinstance(given, Compressor):
            raise ValueError(
                f"compressor must be a packsaddle Compressor such as RandomK(0.01), or a function of the step that "
                f"returns one, got {given!r}"
            )

    def at(self, step: int) -> Compressor:
        """Return the compressor of a step."""
        if step < self.start_step:
            return Identity()
        return self.compressor if isinstance(self.compressor, Compressor) else self.compressor(step)


class Exchanger:
    """A section and the protocol that averages it, which follows the compressor. `d` is the model's compressed size."""

    def __init__(self, section: Section, rules: Rules, d: int) -> None:
        self.section, self._rules, self._d = section, rules, d
        self.protocol: Protocol | None = None
        self._compressor: Compressor | None = None
        self.saved: dict[str, Any] = {}  # what a protocol of the same kind held when it was saved
        self._held: Any = None  # by the protocol, before the step that is being tried
        # The whole vector has the seed as it is, and so the run that CompressedSGD gives.
        self._seed = rules.seed if section.compressed_n == d else mix(rules.seed, section.places[0].start)

    def prepare(self, compressor: Compressor, workers: int) -> None:
        """Have the protocol of this compressor. What another one holds back goes to the error memory."""
        if self.protocol is not None and compressor == self._compressor:
            return
        self.fold(workers)
        n, shapes, is_dense = self.section.compressed_n, self.section.shapes, isinstance(compressor, Identity)
        back = None if is_dense else self._rules.back
        self.protocol = choose(
            compressor.restrict(n, self._d).for_tensors(shapes) if n else compressor,
            "direct" if is_dense else self._rules.exchange,
            d=n,
            dense=self.section.n - n + 1,
            workers=workers,
            itemsize=self.section.error.element_size(),
            back=back if back is None or not n else back.restrict(n, self._d).for_tensors(shapes),
        ).protocol
        self._compressor = compressor
        if not is_dense:
            self._restore()

    def state_dict(self) -> dict[str, Any]:
        """Return what the protocol holds, tensors and plain types."""
        if self.protocol is None or isinstance(self._compressor, Identity):
            return self.saved
        like = self.section.error[: self.section.compressed_n]
        return {"vectors": dict(self.protocol.vectors(like)), "state": self.protocol.state_dict()}

    def _restore(self) -> None:
        """Give a new protocol what was saved."""
        if not self.saved:
            return
        assert self.protocol is not None
        like = self.section.error[: self.section.compressed_n]
        for name, vector in self.protocol.vectors(like).items():
            vector.copy_(self.saved["vectors"][name])
        self.protocol.load_state_dict(self.saved["state"], like.device)
        self.saved = {}

    def average(
        self, channel: Channel, vector: Tensor, bad: Tensor, step: int, factors: Mapping[str, float]
    ) -> tuple[Averaged, Tensor]:
        """Exchange the corrected vector, float[n]; return the outcome, and what share of the workers is `bad`.

        `factors` are what errors are to be multiplied by first, by parameter (see `Rates`).
        """
        assert self.protocol is not None
        self._held = self.protocol.snapshot()
        n = self.section.compressed_n
        if factors:
            for error in self.protocol.vectors(vector[:n]).values():
                for place, view in self.section.views(error):
                    view.mul_(factors.get(place.name, 1.0))
        dense = torch.cat([vector[n:], bad.reshape(1).to(vector)])
        g = self.protocol.average(channel, vector[:n], dense, seed=self._seed, step=step)
        return replace(g, dense=g.dense[:-1]), g.dense[-1].clone()

    def fold(self, workers: int) -> None:
        """Move what the protocol holds back into the error memory, so that nothing is lost when it goes."""
        if self.protocol is not None:
            head = self.section.error[: self.section.compressed_n]
            head.copy_(self.protocol.add_residual(head, workers))
            self.protocol = None

    def settle(self, *, taken: bool) -> None:
        """Make the step that was tried the state, or forget it."""
        if not taken and self.protocol is not None:
            self.protocol.restore(self._held)
        self._held = None
        self.section.settle(taken=taken)
