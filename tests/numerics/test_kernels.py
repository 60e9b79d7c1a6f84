"""Compiled loops against the same in torch: equal bits where arithmetic allows it, on vectors meant to break them."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance import nasty_vectors
from families import COMPRESSORS
from hypothesis import given
from hypothesis import strategies as st
from long_vectors import long_vectors
from torch import Tensor
from torch_loops import both, torch_only, two_threads

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    RandomK,
    Rounded,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
)
from packsaddle.compressors import wire
from packsaddle.compressors.selection import as_integers, holding, largest, largest_of_blocks
from packsaddle.compressors.sparse import Cells
from packsaddle.numerics.finite import add_if_finite
from packsaddle.numerics.kernels import SlowKernelsWarning, arithmetic, compiler, kernel
from packsaddle.numerics.seeds import sample_without_replacement

pytest.importorskip("numba")
D = 300_007  # long enough for samples and blocks, and a multiple of nothing


LONG = long_vectors(D)


def by_long_vector_and(name: str, values: Sequence[Any]) -> pytest.MarkDecorator:
    """Every other pair of a long vector and a value, as the black fields of a chessboard."""
    pairs = [(kind, value) for i, kind in enumerate(LONG) for j, value in enumerate(values) if (i + j) % 2 == 0]
    ids = [f"{value}-{kind}" for kind, value in pairs]
    return pytest.mark.parametrize(("v", name), [(LONG[kind], value) for kind, value in pairs], ids=ids)


by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


def message(compressor: Compressor, v: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    sent = compressor.encode(v, seed=3, step=4)
    received = compressor.receive(sent.parts, len(v), seed=3, step=4)
    out = torch.zeros_like(v)  # so that a product that is rounded before it is added is rounded once all the same
    compressor.add_decoded(received, out, -0.75)
    return dict(sent.parts), out


@by_dtype
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_every_compressor_on_nasty_vectors(compressor: Compressor, dtype: torch.dtype) -> None:
    for name, v in nasty_vectors().items():
        v = v.to(dtype)
        (parts, out), (plain_parts, plain_out) = both(lambda v=v: message(compressor, v))  # type: ignore[misc]
        size = float(v.nan_to_num(0, 0, 0).abs().sum()) if len(v) else 0.0
        for part in parts:  # the last digits of normal numbers differ
            if isinstance(compressor, SharedTopK) and part == "sketch":
                assert torch.allclose(parts[part], plain_parts[part], rtol=0, atol=1e-6 * size, equal_nan=True), name
            else:
                assert close(parts[part], plain_parts[part]), (name, part)
        assert close(out, plain_out), name


def close(a: Tensor, b: Tensor) -> bool:
    """Equal, or for floating point within a few roundings (sums of scales are taken in another order)."""
    if not a.is_floating_point():
        return a.dtype == b.dtype and torch.equal(a, b)
    return torch.allclose(a, b, rtol=8 * torch.finfo(a.dtype).eps, atol=0, equal_nan=True)


SELECTING = [
    RandomK(0.01),
    RandomK(0.013, block_size=7),
    TopK(0.001),
    TopK(0.1),
    TopK(1 / 64, chunk=4096, values="int2"),
    TopK(0.5, values="int2"),
    Rounded(),
    Rounded("int4"),
    AdaptiveTopK(0.3),
    AdaptiveTopK(1.0),
    Sign(),
    Sign(per_tensor=True),
]


@by_long_vector_and("compressor", SELECTING)
def test_long_vectors_bit_for_bit(compressor: Compressor, v: Tensor) -> None:
    check_bit_for_bit(compressor, v)


def check_bit_for_bit(compressor: Compressor, v: Tensor) -> None:
    bound = compressor.for_tensors([torch.Size([n]) for n in (len(v) // 3, 0, len(v) - len(v) // 3)])
    (parts, out), (plain_parts, plain_out) = both(lambda: message(bound, v))
    for name in parts:
        assert close(parts[name], plain_parts[name]) if name == "scales" else same(parts[name], plain_parts[name])
    assert close(out, plain_out) if isinstance(compressor, Sign) else same(out, plain_out)


@by_long_vector_and("compressor", [QSGD(coded=False), QSGD(levels=127, bucket=100, coded=False)])
def test_rounding_of_long_vectors(compressor: QSGD, v: Tensor) -> None:
    check_rounding(compressor, v)


def check_rounding(compressor: QSGD, v: Tensor) -> None:
    """Codes are torch's but where a sum of squares, rounded otherwise, moves a coordinate across its threshold."""
    (parts, out), (plain_parts, plain_out) = both(lambda: message(compressor, v))
    assert close(parts["scales"], plain_parts["scales"])
    codes, plain = (wire.unpack(p["levels"], compressor.bits, len(v)) for p in (parts, plain_parts))
    assert int((codes - plain).abs().max()) <= 1
    assert float((codes != plain).double().mean()) < 1e-4
    assert close(out[codes == plain], plain_out[codes == plain])


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("compressor", SELECTING[::2], ids=repr)
def test_threads_and_double_precision(compressor: Compressor) -> None:
    for name in ("sparse", "layers"):
        with two_threads():
            check_bit_for_bit(compressor, twice(name))


def twice(name: str) -> Tensor:
    """A long vector in double precision, which two threads share."""
    return LONG[name].repeat(2).double()


def test_threads_and_double_precision_of_levels() -> None:
    with two_threads():
        check_rounding(QSGD(coded=False), twice("normal"))


@by_long_vector_and("k", [1, 700, D // 10, D // 3, D])
def test_largest_against_a_sort(v: Tensor, k: int) -> None:
    """A stable sort of the magnitudes, NaN first: the first of equals are taken, in increasing order."""
    expected = as_integers(v).sort(descending=True, stable=True).indices[:k].sort().values
    for found in both(lambda: largest(v, k)):
        assert torch.equal(found, expected)


@by_long_vector_and("first", [0, D // 2, D - 1])
def test_largest_of_blocks_against_a_sort(v: Tensor, first: int) -> None:
    turned = as_integers(v).roll(-first).sort(descending=True, stable=True).indices[:5000]
    expected = ((turned + first) % D).sort().values
    found = largest_of_blocks(lambda: torch.split(v, 30_000), lambda i: v[i], D, 5000, first)
    assert torch.equal(found, expected)


@by_long_vector_and("share", [1e-4, 0.3, 0.5, 0.99, 1.0])
def test_the_fewest_that_hold_a_share(v: Tensor, share: float) -> None:
    """Against a sort and sums in double precision; by one more or fewer where a sum is a rounding from the share."""
    if not torch.isfinite(v).all():
        assert holding(v, share).tolist() == largest(v, 1).tolist()
        return
    order = as_integers(v).sort(descending=True, stable=True).indices
    energy = (v[order].double() / float(v.abs().max())).square().cumsum(0) if v.any() else torch.zeros(D)
    k = int((energy < share * energy[-1]).sum()) + 1 if v.any() else 0
    for found in both(lambda: holding(v, share)):
        if share == 1:
            assert torch.equal(found, v.nonzero().squeeze(1))
            return
        if v.any():
            assert abs(len(found) - k) <= 1 + int((energy - share * energy[-1]).abs().lt(1e-12 * energy[-1]).sum())
        assert torch.equal(found, order[: len(found)].sort().values)
        kept = float(v[found].double().div(v.abs().max().clamp_min(1e-45).double()).square().sum())
        assert kept >= share * float(energy[-1]) * (1 - 1e-12)


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_cells_against_loops(d: int, size: int, seed: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(seed)
    size = min(size, d)
    n = -(-d // size)
    index = torch.randperm(n, generator=rng)[: int(torch.randint(1, n + 1, (), generator=rng))]
    v, cells = torch.randn(d, generator=rng, dtype=dtype), Cells(index, size)
    expected = torch.zeros(len(index) * size, dtype=dtype)
    after, values = v.clone(), torch.randn(len(index) * size, generator=rng, dtype=dtype)
    for i, cell in enumerate(index.tolist()):
        for j in range(size):
            if cell * size + j < d:
                expected[i * size + j] = v[cell * size + j]
                after[cell * size + j] += -1.0 * values[i * size + j]
    for found in both(lambda: cells.gather(v)):
        assert torch.equal(found, expected)

    def added() -> Tensor:
        out = v.clone()
        cells.add_to(out, values, -1.0)
        return out

    for found in both(added):
        assert torch.equal(found, after)
    assert sorted(cells.coordinates(d).tolist()) == sorted(
        i * size + j for i in index.tolist() for j in range(size) if i * size + j < d
    )


@pytest.mark.parametrize(("n", "k"), [(5000, 5), (4097, 4096), (1 << 20, 1000), ((1 << 20) + 1, 1000), (10**12, 50)])
def test_samples_are_the_same_integers(n: int, k: int) -> None:
    compiled_one, plain = both(lambda: sample_without_replacement(n, k, seed=3, step=9))
    assert torch.equal(compiled_one, plain)


def test_strided_and_half_vectors_take_the_plain_way() -> None:
    v, coded = torch.randn(100), ("levels", "layer", "rice")
    for name in ("reaching", "add_levels", "count_codes", *(f"pack_{of}" for of in coded), "unpack_rice"):
        assert kernel(name, v) is not None, name
    assert kernel("reaching", v[::2]) is None
    assert kernel("reaching", v.to(torch.bfloat16)) is None
    assert kernel("reaching", v, torch.randn(3, device="meta")) is None
    assert (compiler("cpu"), compiler("meta")) == ("numba", "torch")
    assert (arithmetic("cpu"), arithmetic("meta")) == ("numba on cpu", "torch on meta")
    with torch_only():
        assert kernel("reaching", v) is None
        assert compiler("cpu") == "torch"


def test_vectors_that_require_a_gradient_are_compressed_too() -> None:
    v = torch.randn(5000)
    for compressor in (RandomK(0.5), TopK(0.1), Sign(), QSGD()):
        assert torch.equal(compressor(v.clone().requires_grad_(True)), compressor(v))


def test_without_numba_it_is_said_once_and_works() -> None:
    """In a process of its own, where importing numba fails."""
    code = """
import sys, warnings
sys.modules["numba"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else found(name, *rest)
import torch, packsaddle
v = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(2):
        packsaddle.TopK(0.01)(v, step=step)
    packsaddle.TopK(0.01)(v[:100])
print([w.category.__name__ for w in caught], str(caught[0].message))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['SlowKernelsWarning'] numba is not installed")
    assert "pip install 'packsaddle[fast]'" in done.stdout
    assert issubclass(SlowKernelsWarning, UserWarning)


@by_long_vector_and("dtype", [torch.float32, torch.float64])
def test_sums_that_are_finite(v: Tensor, dtype: torch.dtype) -> None:
    """Bit for bit torch's sum, with a bound on its squared norm; where something is not finite all is as it was."""
    base, more = torch.linspace(-1, 1, D, dtype=dtype), v.to(dtype)
    whole = torch.add(base, more, alpha=0.3)
    finite = bool(torch.isfinite(more).all() and torch.isfinite(more.square().sum()))

    def added() -> tuple[Tensor, float | None]:
        out = base.clone()
        return out, add_if_finite([(out[:7], more[:7], 0.3), (out[7:], more[7:], 0.3)])

    for out, squares in both(added):
        assert (squares is not None) == finite
        if squares is not None:
            assert torch.equal(out, whole)
            assert float(whole.double().square().sum()) * (1 - 1e-4) <= squares
            assert squares <= 1.01 * 2 * (float(base.norm()) ** 2 + float((0.3 * more.double()).norm()) ** 2)
        else:
            assert torch.isfinite(out).all()
            torch.testing.assert_close(out, base, rtol=1e-5, atol=1e-5)


def test_sketched_supports_are_the_same() -> None:
    v = LONG["heavy tails"]
    for compressor in (SketchTopK(0.01), SketchTopK(0.001, rows=5), SketchTopK(k=3, columns=50)):
        (parts, _), (plain, _) = both(lambda compressor=compressor: message(compressor, v))  # type: ignore[misc]
        assert same(parts["values"], plain["values"])
