"""Random linear sketches of a mean over workers: norm sketches estimate its norm, and count sketches its coordinates.

Norm sketch (section 3 of the paper: "using linear sketches"). No worker has the mean v = mean_i v_i. Each worker sends
S v_i for the same random linear map S; the mean of the sketches is S v, and ||S v||^2 estimates ||v||^2 (Alon, Matias
and Szegedy 1999, with the buckets of Charikar et al. 2002).

Count sketch. Its hash is d / c random rotations and signs, drawn from (seed, step), instead of a table of d entries. v
is divided into chunks of c coordinates; chunk b is rotated by rho_b and multiplied by the sign sigma_b, and the chunks
are summed: (S v)_q = sum_b sigma_b v[b, q - rho_b]. The estimate of coordinate (b, p) is
sigma_b (S v)_{p + rho_b} = v[b, p] + sum_{b' != b} sigma_b sigma_b' v[b', p + rho_b - rho_b'].

*Variance.* The signs of different chunks are independent, so the estimate is unbiased and the cross terms vanish. Every
other chunk adds one of its coordinates, each with the same probability since rotations are uniform. Hence the variance
is sum_{b' != b} ||v_b'||^2 / c <= ||v||^2 / c, as for a count sketch with a table of d independent hashes (Charikar et
al. 2002). Summed over coordinates, E||S^T S v - v||^2 = sum_b ||v_b||^2 (d - n_b) / c for chunks of n_b coordinates, at
most ((d - n) / c) ||v||^2 with n the size of the smallest chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.numerics.devices import wide, widened
from packsaddle.numerics.seeds import Stream, generator

_MANY = 256  # number of chunks above which index arithmetic on blocks is faster than slices per chunk
_BLOCK = 1 << 16  # coordinates of a block, whose scratch memory fits a fast cache


@dataclass(frozen=True)
class RowHash:
    """The hash of one row of a count sketch: a linear map S of d coordinates to c = `columns` counters."""

    columns: int  # c, number of counters
    rotations: tuple[int, ...]  # rho_b in [0, c), one per chunk
    signs: tuple[float, ...]  # sigma_b, 1.0 or -1.0, one per chunk

    @classmethod
    def draw(cls, d: int, columns: int, *, seed: int, step: int, row: int = 0) -> "RowHash":
        """Draw the random hash of row number `row` of a count sketch of d coordinates. The hash is a pure function of
        (seed, step, row), and identical on every device."""
        chunks = -(-d // columns)
        rng = generator(seed, step, Stream.SKETCH, worker=row)
        rotations = torch.randint(columns, (chunks,), generator=rng)
        signs = torch.randint(2, (chunks,), generator=rng) * 2 - 1
        return cls(columns, tuple(rotations.tolist()), tuple(signs.to(torch.float64).tolist()))

    def sketch(self, v: Tensor) -> Tensor:
        """Return the sketch S v of v, float[d], where S is this hash as a linear map. The sketch is float[c], with one
        element for each counter. Reads v only once."""
        c = self.columns
        counters = torch.zeros(c, dtype=v.dtype, device=v.device)
        if len(self.rotations) > _MANY:
            for chunk, rows, signs in self._blocks(v):
                source = (torch.arange(c, device=v.device) - rows[:, None]).remainder_(c)
                counters += (chunk * signs[:, None]).gather(1, source).sum(0)
            return counters
        for chunk, rho, sigma in zip(torch.split(v, c), self.rotations, self.signs, strict=True):
            n = min(len(chunk), c - rho)  # coordinates before the rotation wraps around
            counters[rho : rho + n].add_(chunk[:n], alpha=sigma)
            if n < len(chunk):
                counters[: len(chunk) - n].add_(chunk[n:], alpha=sigma)
        return counters

    def add_transposed(self, counters: Tensor, out: Tensor, alpha: float = 1.0) -> None:
        """Add alpha * S^T `counters` to out, float[d], in place, where S is this hash as a linear map. `counters` is
        float[c]. If it is the sketch S v, then S^T S v is the estimate of v."""
        if len(self.rotations) > _MANY:
            positions, estimates = torch.arange(self.columns, device=out.device), []
            for _, rows, signs in self._blocks(out):
                estimates.append(counters[(positions + rows[:, None]).remainder_(self.columns)] * signs[:, None])
            out.add_(torch.cat(estimates).view(-1)[: len(out)], alpha=alpha)
            return
        doubled = torch.cat([counters, counters])  # each rotation of `counters` is a slice of `doubled`
        for chunk, rho, sigma in zip(torch.split(out, self.columns), self.rotations, self.signs, strict=True):
            chunk.add_(doubled[rho : rho + len(chunk)], alpha=alpha * sigma)

    def _blocks(self, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Divide v into blocks of whole chunks, and yield three tensors for each block: the block as a matrix, the
        rotations of its chunks, and the signs of its chunks. A row of the matrix, float[rows, c], is a chunk of c
        coordinates; the vector's last chunk is padded with zeros."""
        c = self.columns
        rotations = torch.tensor(self.rotations, device=v.device)
        signs = torch.tensor(self.signs, dtype=v.dtype, device=v.device)
        rows = max(1, _BLOCK // c)
        for i, block in enumerate(torch.split(v, rows * c)):
            chunk = torch.nn.functional.pad(block, (0, -len(block) % c)).view(-1, c)
            place = slice(i * rows, i * rows + len(chunk))
            yield chunk, rotations[place], signs[place]


def median_estimates(hashes: list[RowHash], tables: Tensor, d: int) -> Iterator[Tensor]:
    """Estimate the d coordinates of a vector v from its count sketch, and yield the estimates in consecutive blocks.
    `tables`, float[rows, c], is the sketch, and `hashes` contains the hash of each row. Each row gives an estimate of a
    coordinate, and the median over rows is used."""
    chunks, c = len(hashes[0].rotations), hashes[0].columns
    # A row's estimate of coordinate (b, p) is sigma_b (S v)_{p + rho_b}. For many short chunks, gather by indices.
    if chunks > _MANY:
        group = max(1, _BLOCK // c)
        rotations = torch.tensor([h.rotations for h in hashes], device=tables.device)
        signs = torch.tensor([h.signs for h in hashes], dtype=tables.dtype, device=tables.device)
        positions = torch.arange(c, device=tables.device)
        for b in range(0, chunks, group):
            places = (positions + rotations[:, b : b + group, None]).remainder_(c).flatten(1)
            estimates = tables.gather(1, places).view(len(hashes), -1, c) * signs[:, b : b + group, None]
            yield _median(list(estimates.flatten(1)))[: d - b * c]
        return
    # For a few long chunks, use slices.
    doubled = torch.cat([tables, tables], dim=1)  # each rotation of a row of `tables` is a slice of `doubled`
    for b in range(chunks):
        for start in range(0, min(c, d - b * c), _BLOCK):
            stop = min(start + _BLOCK, c, d - b * c)
            rows = []
            for row, table in zip(hashes, doubled, strict=True):
                piece = table[row.rotations[b] + start : row.rotations[b] + stop]
                rows.append(piece if row.signs[b] > 0 else -piece)
            yield _median(rows)


def estimates_at(hashes: list[RowHash], tables: Tensor, index: Tensor) -> Tensor:
    """Estimate only the coordinates `index`, int64[n], of a vector from its count sketch. `tables`, float[rows, c], is
    the sketch, and `hashes` contains the hash of each row. Returns the same estimates as `median_estimates` yields for
    these coordinates, float[n]."""
    chunk, place = index // hashes[0].columns, index % hashes[0].columns
    rows = []
    for row, table in zip(hashes, tables, strict=True):
        rotations = torch.tensor(row.rotations, device=index.device)[chunk]
        signs = torch.tensor(row.signs, dtype=table.dtype, device=index.device)[chunk]
        rows.append(table[(place + rotations).remainder_(row.columns)] * signs)
    return _median(rows)


def _median(rows: list[Tensor]) -> Tensor:
    """Return the elementwise median of n vectors. For an even n, it is the mean of the middle two values.

    For an odd n: of any n // 2 + 2 of the n values, neither the smallest nor the largest can be the median of all n. So
    both are discarded and another value is added, repeatedly, until only the median remains. The smallest and the
    largest are found by elementwise minima and maxima, which are faster than a sort.
    """
    n = len(rows)
    if n % 2 == 0:
        ordered = torch.stack(rows).sort(dim=0).values
        return (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    held, waiting = rows[: n // 2 + 2], rows[n // 2 + 2 :]
    while len(held) > 2:
        # Bubble the maximum to the end, and then the minimum to the front.
        for i in range(len(held) - 1):
            held = [*held[:i], *_ordered(held[i], held[i + 1]), *held[i + 2 :]]
        for i in range(len(held) - 3, -1, -1):
            held = [*held[:i], *_ordered(held[i], held[i + 1]), *held[i + 2 :]]
        held, waiting = held[1:-1] + waiting[:1], waiting[1:]
    return held[0]


def _ordered(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(a, b), torch.maximum(a, b)


_SLAB = 1 << 20  # coordinates hashed at a time, to bound scratch memory


@dataclass(frozen=True)
class NormSketch:
    """An estimator of ||v|| from `rows` independent count sketches of `columns` counters (Charikar et al. 2002).

    A sketch has rows * columns numbers instead of d. v is divided into chunks of `columns` coordinates, each chunk is
    rotated at random and given random signs, and the chunks are summed. Two coordinates of one chunk never collide, two
    of different chunks collide with probability 1/columns, and signs are independent. So the energy Z of each row has
    E Z = ||v||^2 and Var Z = 2 sum_{i != j} v_i^2 v_j^2 P(i, j collide) <= (2 / columns) ||v||^4. The estimate of
    ||v||^2 is the median of Z over rows. A vector no longer than the sketch is sent unchanged, and its norm is exact.
    Raises ValueError unless rows and columns are at least 1.

    >>> import torch
    >>> from packsaddle import NormSketch
    >>> sketch = NormSketch(rows=5, columns=128)
    >>> v = torch.ones(10_000)
    >>> 0.8 < sketch.norm(sketch.encode(v, seed=0, step=0)) / v.norm() < 1.2
    tensor(True)
    """

    rows: int = 5
    columns: int = 128

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of NormSketch must be at least 1, got {getattr(self, name)}")

    def encode(self, v: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the sketch S v, float[rows, columns], where S is a random linear map that depends only on
        (seed, step). If v has at most as many elements as its sketch would have, a copy of v is returned instead."""
        if v.numel() <= self.rows * self.columns:
            return v.clone()
        c, positions = self.columns, torch.arange(self.columns, device=v.device)
        counters = torch.zeros(self.rows, c, dtype=v.dtype, device=v.device)
        for row in range(self.rows):
            rng = generator(seed, step, Stream.SKETCH, worker=row)
            for slab in torch.split(v, max(1, _SLAB // c) * c):
                padded = torch.nn.functional.pad(slab, (0, -len(slab) % c)).view(-1, c)
                # Draw on the CPU, so that S is identical on every device.
                rotation = torch.randint(c, (len(padded), 1), generator=rng).to(v.device)
                signs = torch.randint(2, padded.shape, generator=rng, dtype=torch.int8).to(v.device).mul_(2).sub_(1)
                counters[row] += (padded * signs).gather(1, (positions - rotation).remainder_(c)).sum(0)
        return counters

    def norm(self, sketch: Tensor) -> float:
        """Return the estimate of ||v|| from `sketch`, the output of `encode` or a mean of such outputs."""
        if sketch.ndim == 1:
            return float(torch.linalg.vector_norm(sketch, dtype=wide(sketch.device)))
        energies = widened(sketch).square().sum(1).sort().values
        rows = len(energies)
        return float((energies[(rows - 1) // 2] + energies[rows // 2]).div(2).sqrt())
