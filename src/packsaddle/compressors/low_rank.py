"""LowRank, the compressor of PowerSGD (Vogels et al. 2019), which sends low-rank factors of each tensor. It is here so
that the other compressors can be compared with PowerSGD."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from packsaddle.compressors.base import Compressor, Message, Summary
from packsaddle.compressors.parts import Expected, check_magnitudes, floats
from packsaddle.errors import check_integers
from packsaddle.numerics.seeds import Stream, generator

_LARGEST_OF_BASIS = 1 + 2.0**-6  # largest magnitude in an orthonormal basis after rounding to 16 bits


@dataclass(frozen=True)
class LowRank(Compressor):
    """The compressor of PowerSGD: low-rank factors of each tensor (Vogels et al. 2019, Algorithm 1).

    A tensor, viewed as a matrix M, float[n, m], is replaced by P P^T M, where P, float[n, matrix_rank], is an
    orthonormal basis of the columns of M Q for some Q, float[m, matrix_rank]. Between workers
    (`comm.aggregators.LowRankAllReduce`) M Q and P^T M are all-reduced. There Q is (P^T M)^T from the previous step,
    plus a small Gaussian matrix, which makes the steps a warm-started power iteration. In `encode`, which has no
    previous step, Q is Gaussian. If `for_tensors` was not called, the shapes of the tensors are unknown, and the vector
    is viewed as a nearly square matrix. A tensor is sent uncompressed if its factors would have at least as many
    numbers as the tensor.

    ||M - P P^T M|| is at most ||M||, and for random Q on average at most sqrt(1 - matrix_rank / min(n, m)) ||M||.
    Raises ValueError unless matrix_rank is a positive integer.

    >>> import torch
    >>> from packsaddle import LowRank
    >>> M = torch.outer(torch.arange(1.0, 9.0), torch.ones(8))
    >>> c = LowRank(1).for_tensors([M.shape])
    >>> torch.allclose(c(M.flatten()), M.flatten(), atol=1e-5)
    True
    >>> c.message_bytes(64)
    64
    """

    aggregation: ClassVar[str] = "low-rank all-reduce"
    summary: ClassVar[Summary] = Summary(
        "matrix_rank / min(n, m), in the mean", "matrix_rank (n + m) values for each matrix"
    )
    matrix_rank: int = 1  # rank of the factors of each tensor
    # Matrix shapes of the tensors in v, from `for_tensors`; empty: v is one nearly square matrix.
    shapes: tuple[tuple[int, int], ...] = field(default=(), metadata={"internal": True})

    def __post_init__(self) -> None:
        check_integers(1, **{"matrix_rank of LowRank": self.matrix_rank})

    def for_tensors(self, shapes: Sequence[torch.Size]) -> "LowRank":
        return replace(self, shapes=tuple((s[0], math.prod(s[1:])) if len(s) > 1 else (s.numel(), 1) for s in shapes))

    def restrict(self, start: int, stop: int, d: int) -> "LowRank":
        return self if stop - start == d else replace(self, shapes=())

    def matrices(self, v: Tensor) -> list[Tensor]:
        """Return views of the tensors that are concatenated in v, float[d]. Each view is a matrix, float[n, m]."""
        shapes = self._shapes(len(v))
        return [t.view(shape) for t, shape in zip(torch.split(v, [n * m for n, m in shapes]), shapes, strict=True)]

    def rank(self, shape: tuple[int, int]) -> int:
        """Return the rank used for a matrix of this shape, or 0 if the matrix is sent uncompressed."""
        n, m = shape
        return self.matrix_rank if self.matrix_rank * (n + m) < n * m else 0

    def mu(self, d: int) -> float:
        """Return a lower bound on the contraction mu, in expectation over the random matrix Q. The bound is the
        smallest ratio matrix_rank / min(n, m) over all compressed matrices of n rows and m columns in a vector of d
        coordinates."""
        shares = [self.rank(s) / min(s) for s in self._shapes(d) if self.rank(s)]
        return min([1.0, *shares])

    def gaussian(self, v: Tensor, *, seed: int, step: int) -> list[Tensor]:
        """Draw a Gaussian matrix Q for each matrix M in v, float[d]. If M is float[n, m], Q is float[m, rank], and the
        columns of M Q span the low-rank approximation of M. Q is a function of (seed, step)."""
        rng = generator(seed, step, Stream.SKETCH, device=v.device)
        qs = []
        for shape in self._shapes(len(v)):
            q = torch.empty(shape[1], self.rank(shape), dtype=v.dtype, device=v.device)
            qs.append(q.normal_(generator=rng))
        return qs

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        matrices, qs = self.matrices(v), self.gaussian(v, seed=seed, step=step)
        ps = [orthonormal(scaled(m) @ q) for m, q in zip(matrices, qs, strict=True)]
        return self.message(matrices, ps)

    def message(self, matrices: list[Tensor], ps: list[Tensor]) -> Message:
        """Return the message for `matrices`, with the factors P and P^T M of each matrix M. `ps` contains the factor P
        of each matrix, an orthonormal basis, float[n, rank]. For a matrix whose `rank` is 0, the message contains M
        itself instead of the two factors."""
        rows = [p.T @ m if p.numel() else m for p, m in zip(ps, matrices, strict=True)]
        return Message({"left": _join(ps), "right": _join(rows)})

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        left, right = self.factor_sizes(d)
        return {"left": floats(left), "right": floats(right)}

    def context_of(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> None:
        check_magnitudes("left", parts["left"], _LARGEST_OF_BASIS)

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        left, right = message.parts["left"].to(out.dtype), message.parts["right"].to(out.dtype)
        for matrix, (n, m) in zip(self.matrices(out), self._shapes(len(out)), strict=True):
            r = self.rank((n, m))
            p, left = left[: n * r].view(n, r), left[n * r :]
            size = r * m if r else n * m
            q, right = right[:size], right[size:]
            matrix.add_(p @ q.view(r, m) if r else q.view(n, m), alpha=alpha)

    def factor_sizes(self, d: int) -> tuple[int, int]:
        """Return the number of elements of each of the two parts, "left" and "right", of a message for d coordinates.
        "left" contains the factor P of each matrix M, an orthonormal basis. "right" contains the factor P^T M, or M
        itself if M is sent uncompressed."""
        shapes = self._shapes(d)
        left = sum(n * self.rank((n, m)) for n, m in shapes)
        return left, sum(self.rank((n, m)) * m if self.rank((n, m)) else n * m for n, m in shapes)

    def _shapes(self, d: int) -> list[tuple[int, int]]:
        if self.shapes and sum(n * m for n, m in self.shapes) == d:
            return list(self.shapes)
        n = math.isqrt(d)
        square = [(n, d // n)] if n else []
        return square + ([(d - n * (d // n), 1)] if n and d % n else [])  # the remaining coordinates, as a column


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.zeros(0)


def scaled(matrix: Tensor) -> Tensor:
    """Return `matrix` divided by its largest magnitude, which avoids overflow and underflow in products."""
    largest = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    return matrix / torch.where(largest > 0, largest, torch.ones_like(largest))


def orthonormal(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis, float[n, r], of the column space of `matrix`, float[n, r], by Householder QR. If the
    columns are linearly dependent, the basis spans more than the column space."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)  # QR does not support half precision
    return torch.linalg.qr(matrix.to(dtype)).Q.to(matrix.dtype) if matrix.numel() else matrix
