"""Workers whose parameters are no longer equal are found out, named and stopped."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ddp_runs import SEVERAL, batches, network, train, wrapped
from hypothesis import given
from hypothesis import strategies as st
from specs import folded
from torch import nn

from packsaddle import (
    CompressedSGD,
    Compression,
    DriftError,
    TopK,
    register_ddp_hook,
    simulate,
)
from packsaddle.comm.group import resolve
from packsaddle.feedback.checks import fingerprint

Gloo = Callable[..., list[Any]]


@given(
    st.integers(1, 67),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 10**6),
)
def test_any_single_bit_changes_a_fingerprint_and_a_place_in_memory_does_not(
    n: int, start: int, dtype: torch.dtype, seed: int
) -> None:
    tensor = torch.randn(n + start, generator=torch.Generator().manual_seed(seed)).to(dtype)[start:]
    before = fingerprint(tensor)
    assert torch.equal(before, fingerprint(tensor.clone()))
    raw = bytes(tensor.clone().view(torch.uint8).tolist())
    by_hand = sum(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))
    assert (int(before) - by_hand) % 2**64 == 0
    data = tensor.clone().view(torch.uint8)
    data[seed % len(data)] ^= 1 << (seed % 8)
    assert not torch.equal(before, fingerprint(data.view(dtype)))


def test_memory_formats_are_of_one_tensor() -> None:
    t = torch.randn(2, 3, 4, 5)
    assert torch.equal(fingerprint(t), fingerprint(t.to(memory_format=torch.channels_last)))


# ---- what is said, and what a comparison costs


class Compared:
    """This worker's CompressedSGD on two tensors, compared at intervals."""

    def __init__(self, rank: int, compare_every: int = 4) -> None:
        start = torch.Generator().manual_seed(0)
        first, self.second = nn.Parameter(torch.randn(6, 5, generator=start)), nn.Parameter(torch.ones(4, 5))
        self.rank, self.tensors = rank, [("first", first), ("second", self.second)]
        spec = Compression(TopK(k=3), dense_below=0, compare_every=compare_every)
        self.opt = CompressedSGD(self.tensors, 0.1, spec)

    def train(self, first: int, last: int) -> None:
        for t in range(first, last):
            rng = torch.Generator().manual_seed(10 * t + self.rank)
            for _, w in self.tensors:
                w.grad = w.detach() - torch.randn(w.shape, generator=rng)
            self.opt.step()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({2: 10}, "after step 11: worker 2 differs from worker 0 in second. Find the cause before resuming"),
        ({1: 2, 3: 3}, "after step 3: workers 1, 3 differ from worker 0 in second"),
    ],
)
def test_workers_with_one_flipped_bit_are_named(changed: dict[int, int], message: str) -> None:
    """After these steps, by worker."""

    def work(rank: int) -> str:
        one, at = Compared(rank), changed.get(rank, 0)
        one.train(0, at)
        if at:
            one.second.data.view(-1).view(torch.int32)[7] ^= 1
        with pytest.raises(DriftError) as caught:
            one.train(at, 21)
        return str(caught.value)

    for found in simulate(work, 4):
        assert found.startswith(message)


def test_a_comparison_sends_two_numbers() -> None:
    def work(rank: int) -> int:
        one = Compared(rank)
        one.train(0, 21)
        return one.opt.ledger.by_purpose["guard"].sent

    assert simulate(work, 3) == [5 * 16 * 2] * 3  # five comparisons with two other workers


def test_a_state_loaded_back_is_compared_as_soon() -> None:
    def work(rank: int) -> None:
        one = Compared(rank, compare_every=5)
        one.train(0, 3)
        state, tensors = copy.deepcopy(one.opt.state_dict()), [w.detach().clone() for _, w in one.tensors]
        one.train(3, 18)
        one.opt.load_state_dict(state)
        for (_, w), old in zip(one.tensors, tensors, strict=True):
            w.data.copy_(old + rank)
        with pytest.raises(DriftError, match="after step 4: worker 1 differs"):
            one.train(3, 18)

    simulate(work, 2)


# ---- rates and noise


def unlike(what: str, from_step: int, until: int, **options: Any) -> tuple[str, int]:
    """Worker 1 has another rate or noise at some steps."""
    rank = resolve(None).rank

    def is_other(t: int) -> bool:
        return rank == 1 and from_step <= t < until

    def noise(t: int) -> float:
        return 0.1 if what == "noise" and is_other(t) else 0.2

    start = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(20, 5, generator=start))
    groups = [{"params": [w]}, {"params": [nn.Parameter(torch.ones(4, 5))]}]
    options = {"compressor": TopK(k=3), "dense_below": 0, "compare_every": 4} | options
    opt = CompressedSGD(groups, 0.1, **folded(options), noise=noise)
    try:
        for t in range(20):
            for group in opt.param_groups:
                for p in group["params"]:
                    p.grad = p.detach().clone()
            if what != "noise":
                opt.param_groups[1][what] = 0.05 if is_other(t) else 0.1
            opt.step()
    except DriftError as error:
        return str(error), opt.steps
    return "", opt.steps


@pytest.mark.parametrize("options", [{}, {"exchange": "two-way"}, {"momentum": 0.9}], ids=str)
@pytest.mark.parametrize("what", ["noise", "lr", "weight_decay"])
def test_rates_that_come_to_differ_are_named_within_compare_every_steps(what: str, options: dict[str, Any]) -> None:
    named = "noise is 0.1, not 0.2" if what == "noise" else f"{what} of parameter group 1 is 0.05, not 0.1"
    expected = (
        "worker 1 differs from worker 0 in learning rates, weight decay or noise, which must be the same on all "
        f"workers at every step: {named}"
    )
    for message, steps in simulate(lambda rank: unlike(what, 5, 99, **options), 2):
        assert message.endswith(expected)
        assert 6 <= steps <= 5 + 4


def test_rates_that_differed_between_two_comparisons() -> None:
    for message, steps in simulate(lambda rank: unlike("lr", 5, 6), 2):
        assert message.endswith("not in this step, but in one since the last comparison")
        assert steps == 8
    assert simulate(lambda rank: unlike("lr", 99, 99), 2) == [("", 20)] * 2


def hooked_with_unlike_noise() -> tuple[str, int]:
    model = wrapped(network(torch.float32), SEVERAL)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    rank = resolve(None).rank
    spec = Compression(TopK(0.05), dense_below=100, compare_every=4)
    hook = register_ddp_hook(model, spec, noise=lambda t: 0.1 + 0.1 * (t >= 5) * rank)
    message = ""
    try:
        train(model, optimizer, batches(12, torch.float32))
    except RuntimeError as error:
        message = str(error)
    for thread in hook._background._threads:
        thread.join()
    return message, hook.steps


def test_noise_that_differs_behind_ddp_is_named(gloo: Gloo) -> None:
    for message, steps in gloo(hooked_with_unlike_noise, 2):
        assert "after step 7: worker 1 differs from worker 0 in learning rates, weight decay or noise" in message
        assert "noise is 0.2, not 0.1" in message
        assert steps == 8


def test_settings() -> None:
    with pytest.raises(ValueError, match="compare_every must be an integer of at least 0, got -1"):
        Compression(TopK(0.01), compare_every=-1)


# ---- what is compared at the start


def of_another_version() -> str:
    from packsaddle.comm import communicator

    communicator.__version__ = f"0.{resolve(None).rank}.0"
    with pytest.raises(ValueError, match="packsaddle=") as raised:
        CompressedSGD([nn.Parameter(torch.ones(20, 20))], 0.1)
    return str(raised.value)


def test_another_version_is_refused(gloo: Gloo) -> None:
    for message in gloo(of_another_version, 2):
        assert "packsaddle='0.0.0' and worker 1 has packsaddle='0.1.0'" in message
