"""Gradients that can be used at all: finite, and small enough that nothing overflows which is computed from them."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from packsaddle.numerics.kernels import kernel

_PART = 1 << 18  # coordinates: 1 MiB of float32
_ROOM = 64.0


def is_finite(vector: Tensor) -> Tensor:
    """Return whether no coordinate is Inf or NaN, bool[]; a GPU is not waited for.

    A sum, which one of them would spoil, is read ten times as fast as coordinates are tested (4 ms against 39 ms for 25
    million on a CPU), which are tested only if it has overflowed.
    """
    if vector.device.type != "cpu":
        return vector.sum(dtype=torch.float64).isfinite()
    finite = vector.sum().isfinite()
    return finite if finite else torch.isfinite(vector).all()


def is_usable(vector: Tensor) -> Tensor:
    """Return whether ||v||_1 <= M / 64, M the largest number there is, bool[]; a GPU is not waited for.

    Then the vector is finite, and so is whatever a compressor makes of it: counters of sketches and factors (at most
    ||v||_1 times the largest of some Gaussians, below 7), norms, what is decoded from them (at most 36 ||v||_1), and
    v - C(v). 16-bit vectors count as float32, in which memories are kept.

    On a CPU the Euclidean norm, read as fast as a sum (4 ms for 25 million), answers for all but vectors whose squares
    overflow: ||v||_1 <= sqrt(d) ||v||_2.
    """
    dtype = torch.promote_types(vector.dtype, torch.float32)
    limit = torch.finfo(dtype).max / _ROOM
    if vector.device.type == "cpu":
        norm = torch.linalg.vector_norm(vector, dtype=dtype)
        if norm <= limit / max(1, vector.numel()) ** 0.5:
            return torch.tensor(True)
    usable: Tensor = torch.linalg.vector_norm(vector, 1, dtype=torch.float64) <= limit
    return usable


def magnitude(vector: Tensor) -> Tensor:
    """Return a bound on the magnitude of the coordinates, float64[], finite if they are; a GPU is not waited for."""
    if not vector.numel():
        return torch.zeros((), dtype=torch.float64, device=vector.device)
    if vector.device.type == "cpu":  # where it is much faster than the largest magnitude, but overflows sooner
        norm: Tensor = torch.linalg.vector_norm(vector, dtype=torch.promote_types(vector.dtype, torch.float32))
        if norm.isfinite():
            return norm.double()
    largest: Tensor = torch.linalg.vector_norm(vector, float("inf"))
    return largest.double()


def unnoticed(dtype: torch.dtype) -> float:
    """Return a magnitude that no finite number overflows by when it is added, with room for `magnitude`'s being rough.

    Half a unit in the last place of the largest number is lost in rounding.
    """
    limits = torch.finfo(dtype)
    return limits.max * limits.eps / 1024


def add_and_measure(base: Tensor, more: Tensor, alpha: float, out: Tensor) -> Tensor:
    """Set out to base + alpha more, tensors of one shape, base without gaps in memory, and return at least its norm.

    By parts that fit a cache, so that what the norm reads has not left it yet; it is the sum of theirs.
    """
    n = out.numel()
    if n <= _PART or not base.stride() == more.stride() == out.stride():
        norm: Tensor = torch.linalg.vector_norm(torch.add(base, more, alpha=alpha, out=out))
        return norm
    total = out.new_zeros(())
    lines = [t.as_strided((n,), (1,)) for t in (base, more, out)]
    for start in range(0, n, _PART):
        b, m, o = (line[start : start + _PART] for line in lines)
        total += torch.linalg.vector_norm(torch.add(b, m, alpha=alpha, out=o))
    return total


Sum = tuple[Tensor, Tensor, float]  # out, more, alpha: alpha more is to be added to out, tensors of one shape, in place


def add_if_finite(sums: Iterable[Sum]) -> float | None:
    """Do all sums, and return at least the squared norm of all that they give.

    None if a square of an out or of an alpha more is not finite: then all are as before, up to rounding. Each part is
    read and written once; what was added before is subtracted again.
    """
    lines = [(*_lines(out, more), alpha) for out, more, alpha in sums]
    add = kernel("add_finite", *(line for out, more, _ in lines for line in (out, more))) or _add_finite
    added, squares = add(lines)
    if math.isfinite(squares):
        return 2 * squares  # |a + b|^2 <= 2 |a|^2 + 2 |b|^2
    for i, start, stop in added:
        out, more, alpha = lines[i]
        out[start:stop].sub_(more[start:stop], alpha=alpha)
    return None


def _lines(out: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors as vectors of the same order, or with a first dimension of 1 where there is no such view."""
    if out.is_contiguous() and more.is_contiguous():
        return out.view(-1), more.view(-1)
    if out.stride() == more.stride():  # channels last; without gaps in memory
        return out.as_strided((out.numel(),), (1,)), more.as_strided((out.numel(),), (1,))
    return out.unsqueeze(0), more.unsqueeze(0)


def _add_finite(sums: Sequence[Sum]) -> tuple[list[tuple[int, int, int]], float]:
    """`kernels.numba_loops.add_finite` in torch."""
    added: list[tuple[int, int, int]] = []
    total = 0.0
    for i, (out, more, alpha) in enumerate(sums):
        for start in range(0, len(out), _PART):
            o, m = out[start : start + _PART], more[start : start + _PART]
            norms = [float(torch.linalg.vector_norm(part, dtype=out.dtype)) for part in (o, m)]
            squares = norms[0] ** 2 + (alpha * norms[1]) ** 2
            if not squares <= torch.finfo(out.dtype).max:  # NaN is not either
                return added, math.inf
            o.add_(m, alpha=alpha)
            added.append((i, start, start + len(o)))
            total += squares
    return added, total


def spoil(vector: Tensor, bad: Tensor, value: float) -> None:
    """Fill a vector with a value if `bad`, bool[]; a GPU is not waited for."""
    if vector.device.type != "cpu" or bad:
        vector.masked_fill_(bad, value)


def first_bad(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Return the name of the first tensor that cannot be used."""
    return next((name for name, tensor in named if tensor is not None and not bool(is_usable(tensor))), None)
