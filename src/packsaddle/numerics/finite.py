"""Checks that vectors are finite, and small enough that nothing computed from them overflows."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from packsaddle.numerics.devices import wide, widened
from packsaddle.numerics.kernels import kernel

_PART = 1 << 18  # coordinates processed at a time, 1 MiB of float32
_ROOM = 64.0  # `is_in_range` limits ||v||_1 to the largest number of the dtype divided by this


def is_finite(vector: Tensor) -> Tensor:
    """Return a bool[] that is True if no coordinate is Inf or NaN. Does not synchronize with a GPU. On a CPU, the
    coordinates are checked one by one only if their sum is non-finite, since a sum takes a tenth of the time."""
    if vector.device.type != "cpu":
        # Without float64 a sum of finite numbers may overflow, so check each number.
        exact = wide(vector.device) is torch.float64
        return vector.sum(dtype=torch.float64).isfinite() if exact else torch.isfinite(vector).all()
    finite = vector.sum().isfinite()
    return finite if finite else torch.isfinite(vector).all()


def is_in_range(vector: Tensor) -> Tensor:
    """Return a bool[] that is True if ||v||_1 <= M / 64, where v is `vector` and M is the largest number of its dtype.

    Then v is finite, and so are the intermediate results of all compressors: the counters of sketches and the low-rank
    factors (at most 7 ||v||_1, since the normal numbers are below 7), norms, C(v) (at most 36 ||v||_1), and v - C(v).
    For 16-bit vectors M is the largest number of float32, the dtype of error memories. On a CPU the Euclidean norm is
    computed first, since it is as fast as a sum. If sqrt(d) ||v||_2 is at most M / 64, ||v||_1 cannot be larger, and is
    not computed. Does not synchronize with a GPU.
    """
    dtype = torch.promote_types(vector.dtype, torch.float32)
    limit = torch.finfo(dtype).max / _ROOM
    if vector.device.type == "cpu":
        norm = torch.linalg.vector_norm(vector, dtype=dtype)
        if norm <= limit / max(1, vector.numel()) ** 0.5:
            return torch.tensor(True)
    is_small: Tensor = torch.linalg.vector_norm(vector, 1, dtype=wide(vector.device)) <= limit
    return is_small


def magnitude(vector: Tensor) -> Tensor:
    """Return an upper bound on the largest magnitude in `vector`, float64[] (float32[] on MPS). The bound is finite if
    the vector is finite. Does not synchronize with a GPU."""
    if not vector.numel():
        return torch.zeros((), dtype=wide(vector.device), device=vector.device)
    if vector.device.type == "cpu":  # the Euclidean norm is much faster there than the maximum norm, but can overflow
        norm: Tensor = torch.linalg.vector_norm(vector, dtype=torch.promote_types(vector.dtype, torch.float32))
        if norm.isfinite():
            return norm.double()
    largest: Tensor = torch.linalg.vector_norm(vector, float("inf"))
    return widened(largest)


def overflow_margin(dtype: torch.dtype) -> float:
    """Return a magnitude that is too small to cause overflow: any number of at most this magnitude can be added to any
    finite number of `dtype`, and the sum is finite. Added to the largest finite number, such a number is discarded by
    rounding. The result is 1/256 of half a unit in the last place of that largest number."""
    limits = torch.finfo(dtype)
    return limits.max * limits.eps / 1024


def add_and_measure(base: Tensor, more: Tensor, alpha: float, out: Tensor) -> Tensor:
    """Set out to base + alpha * more, in place, and return an upper bound on the norm of out, float[].

    The bound is the sum of the norms of consecutive parts of out. Parts are computed one by one, so that each fits a
    cache. The tensors must have the same shape and no gaps in memory.
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


Sum = tuple[Tensor, Tensor, float]  # (out, more, alpha): the addition out += alpha * more of tensors of the same shape


def add_if_finite(sums: Iterable[Sum]) -> float | None:
    """Add alpha * more to out, in place, for each (out, more, alpha) in `sums`. Returns the sum of the squared norms of
    all results, up to rounding.

    Returns None if the sum of the squares of the results is non-finite. Additions that were completed before are then
    undone by subtraction, so all tensors are unchanged up to rounding.
    """
    lines = [(*_lines(out, more), alpha) for out, more, alpha in sums]
    add = kernel("add_finite", *(line for out, more, _ in lines for line in (out, more))) or _add_finite
    added, squares = add(lines)
    if math.isfinite(squares):
        return squares
    for i, start, stop in added:
        out, more, alpha = lines[i]
        out[start:stop].sub_(more[start:stop], alpha=alpha)
    return None


def _lines(out: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1-D views of `out` and `more` in which elements have the same order. If there are no such views, return
    the tensors with an additional first dimension of 1."""
    if out.is_contiguous() and more.is_contiguous():
        return out.view(-1), more.view(-1)
    # If strides are equal, as for two channels_last tensors, use the order in memory. The tensors must have no gaps.
    if out.stride() == more.stride():
        return out.as_strided((out.numel(),), (1,)), more.as_strided((out.numel(),), (1,))
    return out.unsqueeze(0), more.unsqueeze(0)


def _add_finite(sums: Sequence[Sum]) -> tuple[list[tuple[int, int, int]], float]:
    """PyTorch version of the compiled loop `kernels.numba_loops.add_finite`."""
    added: list[tuple[int, int, int]] = []
    total = 0.0
    for i, (out, more, alpha) in enumerate(sums):
        for start in range(0, len(out), _PART):
            o, m = out[start : start + _PART], more[start : start + _PART]
            result = torch.add(o, m, alpha=alpha)
            squares = float(torch.linalg.vector_norm(result)) ** 2
            if not squares <= torch.finfo(out.dtype).max:  # `<=` is False if `squares` is NaN
                return added, math.inf
            o.copy_(result)
            added.append((i, start, start + len(o)))
            total += squares
    return added, total


def fill_where(vector: Tensor, condition: Tensor, value: float) -> None:
    if vector.device.type != "cpu" or condition:
        vector.masked_fill_(condition, value)


def first_out_of_range(
    named: Iterable[tuple[str, Tensor | None]], agree: Callable[[Tensor], Tensor] = lambda bad: bad
) -> str | None:
    """Return the name of the first tensor for which `is_in_range` is False, or None if all tensors are in range.
    `named` yields pairs of a name and a tensor, or of a name and None, which are skipped. `agree` combines a bool[n],
    which has an element for each of the n tensors, with OR over the processes of a worker."""
    found = {name: ~is_in_range(tensor) for name, tensor in named if tensor is not None}
    bad = agree(torch.stack(list(found.values()))).tolist() if found else []
    return next((name for name, is_bad in zip(found, bad, strict=True) if is_bad), None)
