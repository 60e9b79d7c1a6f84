"""Mutated messages: some hundreds of hypothesis, and messages that are kept because they are hard to detect."""

import math
import random
from contextlib import nullcontext

import pytest
import torch
from corruption import SETTINGS, VECTORS, D
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import KINDS, OF_A_PART, as_bytes, mutate, outcome, tensors
from torch import Tensor
from torch_loops import torch_only

from packsaddle import QSGD, Compressor, LowRank, Rounded, Sign, SketchTopK, TopK
from packsaddle.compressors import wire

OUTCOMES = {"refused", "finite", "not finite"}
WITHOUT_K = [c for c in SETTINGS if getattr(c, "k", None) is None]


@settings(max_examples=300)
@given(
    st.sampled_from(WITHOUT_K),
    st.sampled_from(WITHOUT_K),
    st.integers(1, 700),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
def test_any_message_decodes_to_a_vector_or_is_refused(
    compressor: Compressor, other: Compressor, d: int, kinds: list[str], seed: int
) -> None:
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    v = torch.randn(d, generator=torch_rng) * (torch.rand(d, generator=torch_rng) < rng.choice((0.05, 0.5, 1.0)))
    made = [as_bytes(compressor.encode(w, seed=1, step=2)) for w in (v, -2 * v, torch.ones(d))]
    others = {
        "another vector": made,
        "another d": [as_bytes(compressor.encode(torch.randn(d + 13, generator=torch_rng), seed=1, step=2))],
        "another compressor": [as_bytes(other.encode(v, seed=1, step=2))],
    }
    assert outcome(compressor, tensors(made[0]), d) == "finite"
    parts = made[0]
    for kind in kinds:
        if parts.keys() == made[0].keys():
            parts = mutate(parts, kind, others, rng)
    assert outcome(compressor, tensors(parts), d) in OUTCOMES


@pytest.mark.parametrize("loops", [nullcontext, torch_only], ids=["compiled", "torch"])
@pytest.mark.parametrize("compressor", SETTINGS, ids=repr)
def test_every_kind_of_mutation(compressor: Compressor, loops: type[nullcontext[None]]) -> None:
    """Each several times for each setting, which few random examples would leave out."""
    rng = random.Random(0)
    with loops():
        for v in VECTORS.values():
            made = as_bytes(compressor.encode(v, seed=1, step=2))
            assert outcome(compressor, tensors(made), D) == "finite"
            mutants = [mutate(made, kind, {}, rng) for kind in (*OF_A_PART, "random") * 2]
            assert {outcome(compressor, tensors(parts), D) for parts in mutants} <= OUTCOMES


def octets(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


def short(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int16)


ONE, NAN, ZEROS = torch.ones(1), torch.tensor([math.nan]), torch.zeros(8)
QUOTIENTS = wire.pack(torch.tensor([3, 2]), (1000 + 16).bit_length()).tolist()  # 3 members, 2 bytes of gaps
INT2 = {"values": octets(0b00011011, 3), "scales": short(0, 0), "unit": ZEROS[:1], "indices": octets(0, 240)}
NANS = {"sketch": NAN.repeat(12).bfloat16(), "values": ZEROS[:4]}
# What a message of d coordinates may look like whose lengths fit, and what becomes of it.
KEPT: dict[str, tuple[Compressor, int, dict[str, Tensor], str]] = {
    "a first quotient that leads far beyond the vector": (
        QSGD(bucket=1000),
        1000,
        {"levels": octets(1, 1, *QUOTIENTS, 0, 0, 0), "scales": ZEROS[:1]},
        "refused",
    ),
    "levels of a vector of zeros": (QSGD(), 1024, {"levels": octets(1, 0), "scales": ZEROS[:2]}, "refused"),
    "norms that are NaN, and no level": (QSGD(), 1024, {"levels": octets(), "scales": NAN.repeat(2)}, "refused"),
    "the largest code of four bits, which is no level": (
        QSGD(coded=False),
        8,
        {"levels": octets(255, 119, 119, 119), "scales": ONE},
        "refused",
    ),
    "an infinite norm": (
        QSGD(coded=False),
        8,
        {"levels": octets(119, 119, 119, 135), "scales": ONE * math.inf},
        "not finite",
    ),
    "signs beyond the last coordinate": (Sign(), 9, {"signs": octets(255, 255), "scales": ONE}, "refused"),
    "a sketch of NaNs": (SketchTopK(k=1, rows=3, columns=4), 300, NANS, "finite"),
    "a count of values that is not their number": (TopK(0.5, values="int2"), 8, INT2, "refused"),
    "scales above the unit": (
        Rounded("int4"),
        4,
        {"values": octets(136, 136, 4), "scales": short(-1), "unit": ONE},
        "refused",
    ),
    "a basis with large entries": (LowRank(), 36, {"left": ONE.repeat(6) * math.inf, "right": ZEROS[:6]}, "refused"),
}


@pytest.mark.parametrize("name", KEPT)
def test_messages_that_are_kept(name: str) -> None:
    compressor, d, parts, expected = KEPT[name]
    assert outcome(compressor, parts, d) == expected
