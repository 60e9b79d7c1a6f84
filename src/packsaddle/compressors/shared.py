"""SharedTopK: one support of blocks for all workers, found by all-reduce from projections of the blocks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from packsaddle.compressors.base import Message, check_count, check_flag
from packsaddle.compressors.parts import Expected, floats
from packsaddle.compressors.selection import largest
from packsaddle.compressors.sparse import Cells, KOfD
from packsaddle.numerics.seeds import Keys, Stream, add_gaussians, keys, mix

_SLAB = 1 << 17  # random numbers at a time, so that scratch memory stays in a near cache


@dataclass(frozen=True)
class SharedTopK(KOfD):
    """The compressor that keeps the blocks of largest estimated energy, the same on all workers (after ARC-TopK, 2025).

    No index travels. k is `ratio` * d, rounded and at least 1, or given. The vector is cut in B blocks of `block_size`
    b coordinates. Over workers (`comm.aggregators.ProjectedAllReduce`)
    `projections` r random numbers G_j v_j of each block, G_j float[r, b] of independent N(0, 1), equal on all workers,
    are all-reduced; every worker keeps the same K blocks of largest ||G_j v_j||^2, v the mean; a second all-reduce
    carries their exact values (ARC-TopK, arXiv 2510.26709, does so with the rows of each matrix). Given the support C
    is linear, so the mean of C(v_i) is C(mean v_i): Algorithm 1 on the mean, which is what Theorem 3.1 speaks of, at
    any W and at a cost that does not depend on W. Called on one vector it does the same by itself.

    *mu = K / B >= k/d, in expectation, for every v.* Let e_1, ..., e_B be the blocks' energies. A Gaussian matrix has
    the same law in all directions, so ||G_j v_j||^2 = e_j X_j with X_j independent and of one law (chi squared of r
    degrees), whatever v_j is and however short the last block. Let e_i >= e_j, and fix all X but X_i and X_j. If j is
    kept and i is not, e_j X_j >= e_i X_i, so X_j >= X_i. Exchange the two: i now has e_i X_j, no less than j had, and j
    has e_j X_i, no more than i had, so i is kept and j is not. Exchanging preserves probability, hence
    P(i is kept) >= P(j is kept). These probabilities are ordered as the energies are and add up to K, so by Chebyshev's
    sum inequality E[energy kept] = sum_j e_j P(j is kept) >= (1 / B) sum_j e_j sum_j P(j is kept) = (K / B) ||v||^2.
    Rounding one vector's projections (`half`) changes nothing, being monotone in e_j. In an all-reduce the bound holds
    up to what rounding between hops does: it adds a relative variance of about (W + 1) 2^-14 to an estimate that has
    2 / r, where workers do not cancel. Random signs instead of Gaussians would be cheaper, but the law of X_j would
    depend on the direction of v_j, and the bound fails: of two blocks of energies 1.5 (spread) and 1 (one spike), with
    K = r = 1, 0.483 of the energy is kept in the mean.

    *Bytes.* B r numbers of 2 bytes (`half`: bfloat16) and K b values. By default r is 2, and b the one nearest to
    2 r d / k for which whole blocks make k coordinates; then the projections have a quarter of the bytes of float32
    values. Where k is below sqrt(2 r d) one block of k is kept, and they have more. A k below sqrt(r d / 2) would make
    them cost more than is saved: one block of sqrt(r d / 2) is sent instead, twice as many numbers in all, the fewest
    there can be. On gradients r = 2 keeps the most energy at equal bytes of r = 1, 2 and 4, and this b more than 64,
    256 and 1024 (experiments/shared-supports). Where B r + K b is d or more nothing is projected and all blocks are
    kept, exactly.

    Raises ValueError unless exactly one of ratio and k is given, ratio is a float in (0, 1] and the others are in
    range.

    >>> import torch
    >>> from packsaddle import SharedTopK
    >>> v = torch.zeros(1000)
    >>> v[500:520] = 1.0
    >>> kept = SharedTopK(0.1)(v)
    >>> kept[500:520].count_nonzero()
    tensor(20)
    >>> SharedTopK(0.1).aggregation
    'projected all-reduce'
    """

    fixed_size: ClassVar[bool] = True
    block_size: int | None = None  # b, consecutive coordinates kept together; by default about 2 r d / k
    projections: int = 2  # r, numbers a block is judged by
    half: bool = True  # projections travel in bfloat16, else in the vector's format

    @property
    def aggregation(self) -> str:
        return "projected all-reduce"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "projections"):
            if getattr(self, name) is not None:
                check_count(f"{name} of SharedTopK", getattr(self, name))
        check_flag("half of SharedTopK", self.half)

    def block(self, d: int) -> int:
        """Return b for vectors of d coordinates."""
        if not d:
            return 1
        k = self.count(d)
        if self.block_size is not None:
            return min(k, self.block_size)
        nearest = self.projections * (2 if self.half else 4) * d / k
        kept = max(1, round(k / max(1, nearest)))
        if kept == 1:
            k = min(d, max(k, math.isqrt(round(nearest * k / 4))))
        return -(-d // max(1, d * kept // k))  # the most blocks of which `kept` are k/d

    def grid(self, d: int) -> tuple[int, int, int]:
        """Return the number of blocks of d coordinates, of kept blocks, and of projections of each (0: all kept)."""
        if not d:
            return 0, 0, 0
        b, r = self.block(d), self.projections
        blocks = -(-d // b)
        kept = -(-self.count(d) * blocks // d)
        return (blocks, kept, r) if blocks * r + kept * b < d else (blocks, blocks, 0)

    def mu(self, d: int) -> float:
        """Return the share of the blocks that is kept, K / B, at least k/d."""
        blocks, kept, _ = self.grid(d)
        return kept / blocks if d else 1.0

    def project(self, v: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the projections of v's blocks, bfloat16 or float[blocks * rows], a function of v, seed and step."""
        rows = self.grid(len(v))[2]
        sent = torch.bfloat16 if self.half else v.dtype
        if not rows:
            return v.new_empty(0, dtype=sent)
        return project_blocks(v, self.block(len(v)), rows, keys(seed, step, Stream.PROJECTION)).to(sent)

    def choose(self, projected: Tensor, d: int, *, seed: int, step: int) -> Cells:
        """Return the blocks of d coordinates of largest energy in `projected`, [blocks * rows].

        Ties go to the first from a random block on, a function of seed and step.
        """
        blocks, kept, rows = self.grid(d)
        if not rows:
            return Cells(torch.arange(blocks, device=projected.device), self.block(d))
        energies = projected.view(blocks, rows).double().square().sum(1)
        first = mix(seed, step, int(Stream.PROJECTION)) % blocks
        index = (largest(energies.roll(-first), kept) + first).remainder_(blocks)
        return Cells(index.sort().values, self.block(d))

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        projected = self.project(v, seed=seed, step=step)
        cells = self.choose(projected, len(v), seed=seed, step=step)
        return Message({"sketch": projected, "values": cells.gather(v)}, cells)

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        blocks, kept, rows = self.grid(d)
        sketch = floats(blocks * rows, torch.bfloat16 if self.half else None)
        return {"sketch": sketch, "values": floats(kept * self.block(d))}

    def receive(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Message:
        self.check_parts(parts, d)
        return Message(parts, self.choose(parts["sketch"], d, seed=seed, step=step))

    def support_of(self, message: Message, d: int) -> Tensor:
        cells: Cells = message.context
        return cells.coordinates(d)

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        message.context.add_to(out, message.parts["values"].to(out.dtype), alpha)

    def payloads(self, d: int, itemsize: int) -> tuple[int, int]:
        """Return the bytes of the projections and of the values of d coordinates of `itemsize` bytes."""
        blocks, kept, rows = self.grid(d)
        return blocks * rows * (2 if self.half else itemsize), kept * self.block(d) * itemsize

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        return sum(self.payloads(d, itemsize))


def project_blocks(v: Tensor, size: int, rows: int, key: Keys) -> Tensor:
    """Return G_j v_j for each block v_j of `size` coordinates, float[blocks * rows], with G_j of N(0, 1) numbers.

    The numbers are a function of the key and of block, row and place, so all workers project alike and no matrix is
    stored. The last block may be cut short. Numbers are of single precision at least, whatever v has.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    together = max(1, _SLAB // (size * rows))  # blocks
    numbers = torch.empty(together * rows * size, dtype=dtype, device=v.device)
    projected = []
    for i, part in enumerate(torch.split(v, together * size)):
        blocks = -(-len(part) // size)
        padded = torch.nn.functional.pad(part.to(dtype), (0, blocks * size - len(part)))
        g = numbers[: blocks * rows * size].zero_()
        add_gaussians(g, 1.0, key, start=i * together * rows * size)
        projected.append(torch.linalg.vecdot(g.view(blocks, rows, size), padded.view(blocks, 1, size)).view(-1))
    return torch.cat(projected) if projected else torch.zeros(0, dtype=dtype, device=v.device)
