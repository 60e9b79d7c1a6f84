"""The norm of a mean over workers, from averaged linear sketches (AY21, section 3: "using linear sketches").

No worker knows v = mean_i v_i. Each sends S v_i for the same random linear S; the sketches' mean is S v, and
||S v||^2 estimates ||v||^2 (Alon, Matias and Szegedy 1999, with the buckets of Charikar et al. 2002).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.numerics.seeds import Stream, generator

_SLAB = 1 << 20  # coordinates hashed at a time, so that scratch memory does not grow with d


@dataclass(frozen=True)
class NormSketch:
    """`rows` independent count sketches of `columns` counters: rows x columns floats stand for d.

    Structure instead of tables: v is cut in chunks of `columns` coordinates, each chunk is rotated at random
    and given random signs, and the chunks are summed. Two coordinates of one chunk never meet, two of
    different chunks meet with probability 1/columns, and signs are independent; so each row's energy Z has
    E Z = ||v||^2 and Var Z = 2 sum_{i != j} v_i^2 v_j^2 P(i meets j) <= (2 / columns) ||v||^4. The estimate
    is the median of Z over rows. A vector no longer than the sketch is sent as it is, and its norm is exact.
    """

    rows: int = 5
    columns: int = 128

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of NormSketch must be at least 1, got {getattr(self, name)}")

    def failure_probability(self, relative_error: float) -> float:
        """Bound P(| estimate^2 - ||v||^2 | > relative_error ||v||^2).

        Chebyshev bounds one row's failure by p = 2 / (columns relative_error^2); the median of the rows fails
        only if at least half of them do, which a binomial tail bounds.
        """
        from scipy.stats import binom  # slow to import, and only needed to state the guarantee

        p = min(1.0, 2.0 / (self.columns * relative_error**2))
        return float(binom.sf((self.rows + 1) // 2 - 1, self.rows, p))

    def encode(self, v: Tensor, *, seed: int, step: int) -> Tensor:
        """Return S v, float[rows, columns] (or v itself, if no longer), for the S drawn from (seed, step)."""
        if v.numel() <= self.rows * self.columns:
            return v.clone()
        return torch.stack([self._row(v, generator(seed, step, Stream.SKETCH, worker=row)) for row in range(self.rows)])

    def _row(self, v: Tensor, rng: torch.Generator) -> Tensor:
        c = self.columns
        counters = torch.zeros(c, dtype=v.dtype, device=v.device)
        positions = torch.arange(c, device=v.device)
        for slab in torch.split(v, max(1, _SLAB // c) * c):
            chunks = -(-slab.numel() // c)
            padded = torch.zeros(chunks, c, dtype=v.dtype, device=v.device)
            padded.view(-1)[: slab.numel()] = slab
            # Drawn on the CPU, so that the sketch is the same function on every device.
            rotation = torch.randint(c, (chunks, 1), generator=rng).to(v.device)
            signs = torch.randint(2, (chunks, c), generator=rng, dtype=torch.int8).to(v.device).mul_(2).sub_(1)
            padded.mul_(signs)
            counters += padded.gather(1, (positions - rotation).remainder_(c)).sum(0)
        return counters

    def norm(self, sketch: Tensor) -> float:
        """Return the estimate of ||v|| from S v."""
        if sketch.ndim == 1:
            return float(torch.linalg.vector_norm(sketch, dtype=torch.float64))
        energies = sketch.to(torch.float64).square().sum(1).sort().values
        rows = len(energies)
        return float((energies[(rows - 1) // 2] + energies[rows // 2]).div(2).sqrt())
