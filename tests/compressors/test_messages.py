"""Messages that were cut or corrupted: one error that names compressor and part, or a vector; never other memory."""

import contextlib
import math
import pickle
import re

import pytest
import torch
from conformance import nasty_vectors
from corruption import SETTINGS, VECTORS, D, outcome, replaced
from torch import Tensor
from torch_loops import torch_only

from packsaddle import QSGD, AdaptiveTopK, Compressor, Identity, Sign, TopK
from packsaddle.compressors import wire
from packsaddle.errors import MessageError
from packsaddle.numerics.kernels import kernel

by_setting = pytest.mark.parametrize("compressor", SETTINGS, ids=repr)
by_loops = pytest.mark.parametrize("loops", [contextlib.nullcontext, torch_only], ids=["compiled", "torch"])


@by_loops
@by_setting
def test_a_part_of_a_wrong_length_is_refused(compressor: Compressor, loops: type[contextlib.nullcontext[None]]) -> None:
    """Cut, emptied, doubled, one element less and one more; a missing part, and one more. Other dtypes may fit."""
    with loops():
        parts = dict(compressor.encode(VECTORS["gaussian"], seed=1, step=2).parts)
        for name, part in parts.items():
            if not len(part) or compressor == AdaptiveTopK(1.0):  # without values it is the message of zeros
                continue
            halves = (
                part[: len(part) // 2],
                part[:0],
                torch.cat([part, part]),
                part[:-1],
                torch.cat([part, part[-1:]]),
            )
            for content in halves:
                assert outcome(compressor, replaced(parts, name, content), D) == "refused", (name, len(content))
            for content in (part.view(1, -1), part.to(torch.int64), part.to(torch.float64)):
                assert outcome(compressor, replaced(parts, name, content), D) in ("refused", "valid")
            assert outcome(compressor, {n: p for n, p in parts.items() if n != name}, D) == "refused", name
        assert outcome(compressor, {**parts, "1 more": torch.zeros(1)}, D) == "refused"


@by_setting
def test_messages_of_nasty_vectors_are_as_described(compressor: Compressor) -> None:
    """Also of infinite and NaN numbers: those are the guard's, not the decoder's."""
    bad = {"nan": torch.full((40,), math.nan), "inf": torch.arange(300.0) * math.inf, "none": torch.zeros(0)}
    for v in [*nasty_vectors().values(), *bad.values()]:
        message = compressor.encode(v, seed=1, step=2)
        compressor.add_decoded(compressor.receive(message.parts, len(v), seed=1, step=2), torch.zeros_like(v))


def layered(d: int, members: int, unary: list[int]) -> Tensor:
    """Levels in one layer: `members` of d are not 0, with these bytes of quotients, remainders of 0 and no sign."""
    width, b = (d + 16).bit_length(), wire.shortest_rice(d, members)
    rest = math.ceil(members * b / 8)
    head = wire.pack(torch.tensor([members, len(unary) + rest]), width).tolist()
    return torch.tensor([1, 1, *head, *unary, *[0] * rest, *[0] * math.ceil(members / 8)], dtype=torch.uint8)


@by_loops
@pytest.mark.parametrize("d", [10**6, pytest.param(10**8, marks=pytest.mark.slow)])
def test_a_layer_without_its_codes_is_refused(d: int, loops: type[contextlib.nullcontext[None]]) -> None:
    """About twenty bytes, whose sizes fit: a search for the ones of three quotients must not leave the message."""
    if loops is torch_only and d > 10**6:
        pytest.skip("the same code, and takes long")
    scales = torch.ones(math.ceil(d / 512))
    with loops():
        for unary in ([0], [1], [128], [255], [0, 0]):
            levels = layered(d, 3, unary)
            assert len(levels) <= 21
            with pytest.raises(MessageError, match=r"levels in a message of QSGD\(levels=7"):
                QSGD().receive({"levels": levels, "scales": scales}, d, seed=0, step=0)
    # Three quotients of 0 and remainders of 0 are the first three coordinates.
    out, parts = torch.zeros(d), {"levels": layered(d, 3, [0b11100000]), "scales": scales}
    QSGD().add_decoded(QSGD().receive(parts, d, seed=0, step=0), out)
    assert out.nonzero().squeeze(1).tolist() == [0, 1, 2]


CRAFTED = {
    "no code": [],
    "an unknown code": [3, 0, 0],
    "a code alone": [1],
    "more layers than levels": [1, 8, *[0] * 40],
    "sizes beyond the end": [1, 7],
    "layers that grow": [1, 2, *wire.pack(torch.tensor([3, 1, 5, 1]), 11).tolist(), 0, 0, 0],
    "a Rice parameter of 255": [2, 255, *[255] * 200],
    "Rice codes that never end": [2, 0, *[0] * 400],
    "Rice codes of a level that there is not": [2, 0, 0, 0, 1, *[255] * 125],
    "too many Rice codes": [2, 0, *[255] * 126],
    "a fixed width cut short": [0, *[119] * 499],
    "a level that there is not": [0, *[255] * 500],
}


@by_loops
@pytest.mark.parametrize("levels", CRAFTED.values(), ids=CRAFTED.keys())
def test_crafted_levels_are_refused(levels: list[int], loops: type[contextlib.nullcontext[None]]) -> None:
    parts = {"levels": torch.tensor(levels, dtype=torch.uint8), "scales": torch.ones(2)}
    with loops():
        assert outcome(QSGD(), parts, 1000) == "refused"


CRAFTED_INDICES = {
    "seven gaps": [0b11111110, 0, 0, 0, 0, 0],
    "nine gaps": [255, 128, 0, 0, 0, 0],
    "a gap after a byte of padding": [255, 0, 128, 0, 0, 0],
    "gaps beyond the end": [0, 0, 255, 0, 0, 0],
    "a last gap beyond the end": [0b11111110, 0, 0b00010000, 0, 0, 255],
    "no gap": [0, 0, 0, 0, 0, 0],
    "a byte too few": [255, 0, 0, 0, 0],
    "a byte too many": [255, 0, 0, 0, 0, 0, 0],
}


@by_loops
@pytest.mark.parametrize("indices", CRAFTED_INDICES.values(), ids=CRAFTED_INDICES.keys())
def test_crafted_indices_are_refused(indices: list[int], loops: type[contextlib.nullcontext[None]]) -> None:
    """Of 8 of 100: three bytes of quotients, and three of remainders below 8."""
    parts = {"indices": torch.tensor(indices, dtype=torch.uint8), "values": torch.ones(8)}
    with loops():
        assert outcome(TopK(k=8), parts, 100) == "refused"
        valid = torch.tensor([255, 0, 0, 0, 0, 0], dtype=torch.uint8)
        assert outcome(TopK(k=8), replaced(parts, "indices", valid), 100) == "valid"


@by_loops
def test_a_gap_that_leads_beyond_its_chunk_is_refused(loops: type[contextlib.nullcontext[None]]) -> None:
    """Of four of each eight: four gaps of 0, then one of 4 that no later gap makes up for."""
    c = TopK(0.5, chunk=8)
    assert wire.gap_parameter(8, 4) == 0
    with loops():
        for bits, expected in ((0b1111_0000_1111_1111 << 8, "valid"), (0b1110_0000_1111_1111 << 8, "refused")):
            indices = wire.pack(torch.tensor([bits]), 24)
            assert outcome(c, {"indices": indices, "values": torch.ones(12)}, 24) == expected


def test_values_above_their_scale_are_refused() -> None:
    parts = TopK(0.5, values="bfloat16").encode(torch.arange(1.0, 9.0), seed=0, step=0).parts
    for value, expected in ((1.0, "valid"), (1.5, "refused"), (-1e30, "refused"), (math.nan, "valid")):
        values = parts["values"].clone()
        values[2] = value
        assert outcome(TopK(0.5, values="bfloat16"), replaced(parts, "values", values), 8) == expected
    parts = TopK(0.5, values="int2").encode(torch.arange(1.0, 9.0), seed=0, step=0).parts
    assert outcome(TopK(0.5, values="int2"), replaced(parts, "scales", parts["scales"] | 0x7F00), 8) == "refused"


def test_errors_name_compressor_part_and_both_lengths() -> None:
    parts = dict(Sign().encode(torch.ones(100), seed=0, step=0).parts)
    parts["signs"] = parts["signs"][:6]
    expected = "signs in a message of Sign(per_tensor=False, sizes=()) must be uint8[13]"
    with pytest.raises(MessageError, match=re.escape(f"{expected} for 100 coordinates, got uint8[6]")) as caught:
        Sign().receive(parts, 100, seed=0, step=0)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
    with pytest.raises(MessageError, match=r"parts in a message of Identity.* must be values, got none"):
        Identity().receive({}, 3, seed=0, step=0)


def test_compiled_loops_refuse_arrays_that_are_too_short() -> None:
    """Without `receive` too."""
    pytest.importorskip("numba")
    short = torch.zeros(3, dtype=torch.uint8)
    calls = {
        "add_signs": (short, [100], torch.ones(1), torch.zeros(100)),
        "add_two_levels": (short, 256, torch.ones(2), torch.zeros(100)),
        "pack_four_bits": (torch.ones(600), torch.ones(2), 256),
        "add_four_bits": (short, 256, torch.ones(1), torch.zeros(100), 1.0),
        "add_levels": (short, 7, 512, torch.ones(1), torch.zeros(100), 1.0),
        "unpack_numbers": (short, 5, 100, torch.int64),
    }
    for name, arguments in calls.items():
        with pytest.raises(ValueError, match="must have at least"):
            kernel(name)(*arguments)  # type: ignore[misc]
