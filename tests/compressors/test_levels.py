"""QSGD's levels coded: against coders in strings of bits, their entropy, and codes of a fixed width."""

import math
from collections import Counter

import pytest
import torch
from conformance import nasty_vectors
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_loops import both, torch_only

from packsaddle import QSGD, AdaptiveTopK, Compressor
from packsaddle.compressors import wire
from packsaddle.compressors.levels import decode_levels, encode_levels


def bits_of(top: int) -> int:
    return (2 * top).bit_length()


def as_bytes(bits: str) -> list[int]:
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def layered(levels: list[int]) -> list[int]:
    """The code of `encode_levels` in layers, as the module says it, with the best Rice parameter by expected length."""
    members, layers, j = [abs(x) for x in levels], [], 0
    width = (len(levels) + 16).bit_length()
    while any(m > j for m in members):
        on = [m > j for m in members]
        coded = [i for i, goes in enumerate(on) if goes != (2 * sum(on) > len(on))]
        p = len(coded) / len(on)
        b = 0 if not coded or p >= 0.5 else min(range(40), key=lambda b: b + 1 / (1 - (1 - p) ** (1 << b)))
        gaps = [i - before - 1 for before, i in zip([-1, *coded], coded, strict=False)]
        unary = as_bytes("".join("0" * (g >> b) + "1" for g in gaps))
        rest = as_bytes("".join(format(g & ((1 << b) - 1), f"0{b}b") for g in gaps) if b else "")
        layers.append((sum(on), unary + rest))
        members = [m for m, goes in zip(members, on, strict=True) if goes]
        j += 1
    head = as_bytes("".join(format(n, f"0{width}b") for k, body in layers for n in (k, len(body))))
    signs = as_bytes("".join(str(int(x < 0)) for x in levels if x))
    return [1, len(layers), *head, *(byte for _, body in layers for byte in body), *signs]


def riced(levels: list[int]) -> list[int]:
    """The Rice codes of `encode_levels`, as the module says them, with the parameter that makes them shortest."""
    folded = [2 * x - 1 if x > 0 else -2 * x for x in levels]

    def coded(b: int) -> list[int]:
        unary = as_bytes("".join("0" * (z >> b) + "1" for z in folded))
        return [2, b, *unary, *as_bytes("".join(format(z & ((1 << b) - 1), f"0{b}b") for z in folded) if b else "")]

    return coded(min(range(8), key=lambda b: sum((z >> b) + 1 + b for z in folded)))


@given(
    st.integers(0, 300),
    st.sampled_from([1, 2, 3, 5, 7, 20, 127]),
    st.floats(0.0, 1.0),
    st.floats(0.0, 0.99),
    st.integers(0, 2**31),
)
def test_against_strings_of_bits(d: int, top: int, zeros: float, decay: float, seed: int) -> None:
    """Levels that are 0 and not in any proportion; what comes back is what went in, in both implementations."""
    rng = torch.Generator().manual_seed(seed)
    magnitudes = (torch.rand(d, generator=rng).log() / math.log(decay + 1e-9)).floor().long().clamp(0, top - 1) + 1
    levels = magnitudes * (torch.rand(d, generator=rng) >= zeros) * (torch.randint(2, (d,), generator=rng) * 2 - 1)
    bits = bits_of(top)
    packed, code = wire.pack(levels + top, bits), (levels + top).to(torch.uint8)
    coded, plain = both(lambda: encode_levels(code, top, bits))
    assert torch.equal(plain, coded)
    if d:
        assert len(coded) <= 1 + len(packed)
        codes = {0: [0, *packed.tolist()], 1: layered(levels.tolist()), 2: riced(levels.tolist())}
        assert coded.tolist() == codes[int(coded[0])]
        assert len(coded) <= 1.05 * min(map(len, codes.values())) + 8
    for found in both(lambda: decode_levels(coded, d, top, bits, coded[:2].tolist())):
        assert torch.equal(found.long(), levels + top)


def entropy(levels: Tensor) -> float:
    """Bits of a level, if each were drawn from how often they occur."""
    counts = Counter(levels.tolist())
    return -sum(c / len(levels) * math.log2(c / len(levels)) for c in counts.values())


D = 200_000
VECTORS = {
    "gaussian": torch.randn(D, generator=torch.Generator().manual_seed(0)),
    "heavy": torch.randn(D, generator=torch.Generator().manual_seed(1)).sinh() ** 3,
    "sparse": torch.where(torch.arange(D) % 97 == 3, torch.randn(D, generator=torch.Generator().manual_seed(2)), 0.0),
    "flat": torch.randn(D, generator=torch.Generator().manual_seed(3)).sign(),
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("c", [QSGD(), QSGD(1), QSGD(3), QSGD(7, 64), QSGD(15), QSGD(31)], ids=repr)
def test_bytes_are_near_the_entropy(c: QSGD, name: str) -> None:
    """Within 3% and 0.02 bits a coordinate; where a fixed width is less, that and a byte."""
    v = VECTORS[name]
    levels = wire.unpack(QSGD(c.levels, c.bucket, coded=False).encode(v, seed=1, step=2).parts["levels"], c.bits, D)
    coded = c.encode(v, seed=1, step=2).parts["levels"]
    assert 8 * len(coded) / D <= min(1.03 * entropy(levels) + 0.02, c.bits + 8 / D)
    assert 8 * len(coded) / D >= 0.99 * entropy(levels)  # buckets differ, so that a little less is possible


@pytest.mark.parametrize("c", [QSGD(), QSGD(1, 16), QSGD(2, 7), QSGD(127), QSGD(127, 3), QSGD(9, 5000)], ids=repr)
@pytest.mark.parametrize("v", nasty_vectors().values(), ids=nasty_vectors().keys())
def test_coding_changes_no_number(c: QSGD, v: Tensor) -> None:
    """What is decoded is bit for bit what codes of a fixed width say, compiled and not."""
    fixed = QSGD(c.levels, c.bucket, coded=False)
    expected, found, plain = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(v)
    fixed.add_decoded(fixed.encode(v, seed=3, step=4), expected, 0.5)
    message = c.encode(v, seed=3, step=4)
    c.add_decoded(message, found, 0.5)
    assert torch.equal(found, expected)
    with torch_only():
        c.add_decoded(message, plain, 0.5)
    assert torch.allclose(plain, expected, rtol=8 * torch.finfo(v.dtype).eps, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_its_bucket(bad: float) -> None:
    """All levels are 0 there, and the norm says so: in a vector of zeros, which has no layers, and in another."""
    for v in (torch.zeros(2000), torch.randn(2000, generator=torch.Generator().manual_seed(0))):
        v[700] = bad
        found = QSGD()(v)
        assert not found[512:1024].isfinite().any()
        assert found[:512].isfinite().all()
        assert found[1024:].isfinite().all()


def test_a_vector_of_zeros_has_no_layers() -> None:
    """Of levels that are all 0 nothing is coded, and a message of zeros has no levels at all."""
    out = torch.ones(2000)
    coded = encode_levels(torch.full((2000,), 7, dtype=torch.uint8), 7, 4)
    assert coded.tolist() == [1, 0]
    assert decode_levels(coded, 2000, 7, 4, coded[:2].tolist()).tolist() == [7] * 2000
    message = QSGD().encode(torch.zeros(2000), seed=0, step=0)
    assert message.parts["levels"].tolist() == []
    QSGD().add_decoded(message, out)
    assert torch.equal(out, torch.ones(2000))


def test_when_sizes_are_fixed() -> None:
    assert [QSGD().fixed_size, QSGD(coded=False).fixed_size] == [False, True]
    assert QSGD(levels=128).fixed_size  # 9 bits are not coded
    v = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert QSGD(levels=128).encode(v, seed=0, step=0).nbytes == QSGD(levels=128).message_bytes(1000) == 1125 + 8


@pytest.mark.parametrize(
    ("c", "d"), [*((QSGD(), d) for d in (1000, 100_003, (1 << 21) + 5)), (AdaptiveTopK(0.3), 1 << 21)]
)
def test_bytes_are_predicted_at_any_length(c: Compressor, d: int) -> None:
    v = torch.randn(d, generator=torch.Generator().manual_seed(9))
    assert c.encode(v, seed=0, step=0).nbytes == pytest.approx(c.message_bytes(d), rel=0.03)


@pytest.mark.parametrize(("top", "code"), [(7, 1), (31, 1), (63, 2), (127, 2)])
def test_many_levels_are_in_rice_codes(top: int, code: int) -> None:
    """Of a Gaussian, within 5% of their entropy."""
    v = VECTORS["gaussian"]
    coded = QSGD(top).encode(v, seed=1, step=2).parts["levels"]
    packed = QSGD(top, coded=False).encode(v, seed=1, step=2).parts["levels"]
    assert int(coded[0]) == code
    assert 8 * len(coded) / D <= 1.05 * entropy(wire.unpack(packed, bits_of(top), D))


@pytest.mark.parametrize("d", [384_000, 383_700, 512 * 40 + 1])
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("top", [7, 127])
def test_buckets_of_zeros_are_not_sent(top: int, bad: float, d: int) -> None:
    """A gradient of an embedding, with few rows that are not 0: what is added is what the fixed width says."""
    v = torch.zeros(1000, 384)
    v[::50] = torch.randn(20, 384, generator=torch.Generator().manual_seed(0))
    v = v.view(-1)[:d].clone()
    v[1157] = bad
    v[-1] = 0.5
    expected, found, plain = torch.ones(3, d)
    message, fixed = QSGD(top).encode(v, seed=1, step=2), QSGD(top, coded=False)
    fixed.add_decoded(fixed.encode(v, seed=1, step=2), expected, 0.5)
    QSGD(top).add_decoded(message, found, 0.5)
    with torch_only():
        assert torch.equal(QSGD(top).encode(v, seed=1, step=2).parts["levels"], message.parts["levels"])
        QSGD(top).add_decoded(message, plain, 0.5)
    assert len(message.parts["levels"]) < 24 * 512 * (6 if top == 127 else 2) / 8
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.allclose(plain, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert bool(expected.isnan().any()) == (not math.isfinite(bad))


def test_what_is_left_of_what_was_sent_is_not_sent_for_ever() -> None:
    """Of a row that was sent a thirtieth remains; after six steps that is negligible, and stays in the memory."""
    v, other = torch.zeros(2, 512 * 64)
    v[512 * 7 : 512 * 8] = torch.randn(512, generator=torch.Generator().manual_seed(0))
    other[:512] = 1.0
    sent = []
    for step in range(12):
        message = QSGD(127).encode(v + other, seed=0, step=step)
        sent.append(int(message.parts["scales"].count_nonzero()))
        corrected = v + other
        QSGD(127).add_decoded(message, corrected, -1.0)
        v[512 * 7 : 512 * 8] = corrected[512 * 7 : 512 * 8]
    assert sent[:5] == [2] * 5
    assert sent[8:] == [1] * 4
    assert 0 < v.abs().max() < 2.0**-27


@pytest.mark.parametrize("where", range(0, 9000, 700))
def test_a_long_quotient_at_any_place(where: int) -> None:
    """A largest level among small ones: its unary code is 60 bits long, and runs over the edges of groups."""
    levels = (5 * torch.randn(9001, generator=torch.Generator().manual_seed(where))).round().long()
    levels[where : where + 3] = torch.tensor([127, -127, 127])
    codes = (levels + 127).to(torch.uint8)
    coded = encode_levels(codes, 127, 8)
    assert int(coded[0]) == 2
    assert coded.tolist() == riced(levels.tolist())
    assert torch.equal(decode_levels(coded, len(levels), 127, 8, coded[:2].tolist()), codes)
