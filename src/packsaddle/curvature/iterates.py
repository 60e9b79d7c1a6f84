"""Iterates drawn uniformly from a run, and what their certificates say of all of them.

Theorems 3.1 and 3.2 promise that at least half of x_0 ... x_T are epsilon-second-order stationary, not that x_T is. If
at least half are, m independent uniform draws all miss with probability at most 2^-m.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from packsaddle.curvature.certificate import Verdict
from packsaddle.numerics.seeds import Stream, generator


def draw_iterates(m: int, steps: int, seed: int) -> list[int]:
    """Return m independent uniform draws from 0 ... T for T = `steps`, in rising order (some may be equal)."""
    return sorted(torch.randint(steps + 1, (m,), generator=generator(seed, 0, Stream.ITERATES)).tolist())


@dataclass(frozen=True)
class Share:
    """What m certificates say about the share of a run's iterates that are second-order stationary."""

    drawn: int  # m
    stationary: int  # certified
    refuted: int  # saddles and large gradients; the rest are undecided

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Share":
        """Count verdicts."""
        stationary = sum(v is Verdict.SECOND_ORDER_STATIONARY for v in verdicts)
        refuted = sum(v in (Verdict.SADDLE, Verdict.GRADIENT_TOO_LARGE) for v in verdicts)
        return cls(len(verdicts), stationary, refuted)

    @property
    def all_fail(self) -> float:
        """2^-m: if at least half of the iterates are second-order stationary, no draw is with at most this
        probability."""
        return 0.5**self.drawn

    @property
    def surprise(self) -> float:
        """If at least half of the iterates are second-order stationary, so few draws are (undecided ones taken for
        stationary) with at most this probability: small values speak against the theorem's promise."""
        from scipy.special import bdtr  # slow to import, and only this needs it

        return float(bdtr(self.drawn - self.refuted, self.drawn, 0.5))

    def at_least(self, confidence: float = 0.95) -> float:
        """A lower confidence bound on the share (Clopper and Pearson's, one-sided), certificates taken for true: each
        may be wrong with its own failure probability."""
        if self.stationary == 0:
            return 0.0
        from scipy.special import betaincinv  # slow to import, and only this needs it

        return float(betaincinv(self.stationary, self.drawn - self.stationary + 1, 1 - confidence))

    def __str__(self) -> str:
        return (
            f"{self.stationary} of {self.drawn} iterates drawn uniformly are certified second-order stationary, "
            f"{self.refuted} are not, {self.drawn - self.stationary - self.refuted} undecided.\n"
            f"Share of the run: at least {self.at_least():.0%} with confidence 95%. If it is at least half, as "
            f"Theorems 3.1 and 3.2 promise,\nall {self.drawn} draws fail with probability at most {self.all_fail:.2g}, "
            f"and as many as here with at most {self.surprise:.2g}."
        )
