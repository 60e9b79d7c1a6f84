"""Mutated messages: some hundreds of hypothesis, and messages that are kept because they are hard to detect."""

import random
from contextlib import nullcontext

import pytest
import torch
from corruption import SETTINGS, VECTORS, D
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import KINDS, OF_A_PART, Part, as_bytes, mutate, outcome, tensors
from torch_loops import torch_only

from packsaddle import QSGD, Compressor, LowRank, RandomK, Sign, SketchTopK, TopK
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


def bits(*numbers: int) -> bytes:
    return bytes(numbers)


F32 = torch.float32
QUOTIENTS = wire.pack(torch.tensor([3, 2]), (1000 + 16).bit_length()).numpy().tobytes()  # 3 members, 2 bytes of gaps
# What a message of d coordinates may look like whose lengths fit, and what becomes of it.
KEPT: dict[str, tuple[Compressor, int, dict[str, Part], str]] = {
    "a first quotient that leads far beyond the vector": (
        QSGD(bucket=1000),
        1000,
        {"levels": Part(torch.uint8, bits(1, 1) + QUOTIENTS + bytes(2) + bytes(1)), "scales": Part(F32, bytes(4))},
        "refused",
    ),
    "levels of a vector of zeros": (
        QSGD(),
        1024,
        {"levels": Part(torch.uint8, bits(1, 0)), "scales": Part(F32, bytes(8))},
        "refused",
    ),
    "norms that are NaN, and no level for them": (
        QSGD(),
        1024,
        {"levels": Part(torch.uint8, b""), "scales": Part(F32, bits(0, 0, 192, 127) * 2)},
        "refused",
    ),
    "the largest code of four bits, which is no level": (
        QSGD(coded=False),
        8,
        {"levels": Part(torch.uint8, bits(255, 119, 119, 119)), "scales": Part(F32, bits(0, 0, 128, 63))},
        "refused",
    ),
    "an infinite norm": (
        QSGD(coded=False),
        8,
        {"levels": Part(torch.uint8, bits(119, 119, 119, 135)), "scales": Part(F32, bits(0, 0, 128, 127))},
        "not finite",
    ),
    "signs beyond the last coordinate": (
        Sign(),
        9,
        {"signs": Part(torch.uint8, bits(255, 255)), "scales": Part(F32, bits(0, 0, 128, 63))},
        "finite",
    ),
    "a sketch of NaNs": (
        SketchTopK(k=1, rows=3, columns=4),
        300,
        {"sketch": Part(torch.bfloat16, bits(192, 127) * 12), "values": Part(F32, bytes(16))},
        "finite",
    ),
    "a count of values that is not their number": (
        TopK(0.5, values="int2"),
        8,
        {
            "values": Part(torch.uint8, bits(0b00011011, 3)),
            "scales": Part(torch.int16, bytes(4)),
            "unit": Part(F32, bytes(4)),
            "indices": Part(torch.uint8, bits(0, 240)),
        },
        "refused",
    ),
    "scales above the unit": (
        RandomK(0.5, block_size=1, values="int4"),
        8,
        {
            "values": Part(torch.uint8, bits(136, 136, 4)),
            "scales": Part(torch.int16, bits(255, 255)),
            "unit": Part(F32, bits(0, 0, 128, 63)),
        },
        "refused",
    ),
    "a basis with large entries": (
        LowRank(),
        36,
        {"left": Part(F32, bits(0, 0, 128, 127) * 6), "right": Part(F32, bytes(24))},
        "refused",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_messages_that_are_kept(name: str) -> None:
    compressor, d, parts, expected = KEPT[name]
    assert outcome(compressor, tensors(parts), d) == expected
