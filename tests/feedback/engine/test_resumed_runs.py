"""A run that is saved and loaded into new objects is bit for bit the run that never stopped, on every front."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fronts import FRONTS, differences, made, parameters_of

from packsaddle import (
    QSGD,
    Identity,
    LowRank,
    Noise,
    Ramp,
    RandomK,
    TopK,
)

END = 13
ESCAPE = (4, 0.5)
RAMP = Ramp(0.1, 5, 20)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.03)


def muon(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=0.05, adjust_lr_fn="match_rms_adamw")


def nesterov(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


# What one front has in its state and no other way has.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "CompressedSGD": {
        "TopK, escape": {"noise": RAMP, "escape": ESCAPE, "monitor_every": 4},
        "Identity, escape": {"compressor": Identity(), "noise": RAMP, "escape": ESCAPE},
        "lazy noise": {"compressor": RandomK(0.1), "noise": Noise(0.1, lazy=True)},
        "warm start": {"compressor": LowRank(1)},
        "momentum": {"momentum": 0.9, "compare_every": 5},
        "nesterov, two-way": {"momentum": 0.9, "nesterov": True, "exchange": "two-way"},
        "coordinator": {"exchange": "coordinator", "back": RandomK(0.5)},
        "momentum, escape": {"momentum": 0.5, "escape": ESCAPE},
    },
    "DDP by model": {
        "RandomK": {"compressor": RandomK(0.05), "noise": 0.01, "start_step": 3, "compare_every": 3, "inner": momentum},
        "TopK": {"compare_every": 2, "monitor_every": 3},
        "warm start": {"compressor": LowRank(1)},
        "coordinator": {"exchange": "coordinator", "back": RandomK(0.5)},
        "ramp, two-way": {"compressor": lambda t: TopK(0.2 / (1 + t)), "exchange": "two-way", "start_step": 3},
    },
    "FSDP": {"noise": {"noise": 0.01, "start_step": 2, "inner": adamw}},
    "local": {
        "compared": {"inner": adamw, "compare_every": 2},
        "outer": {"outer": nesterov, "noise": 0.01, "decay": 0.9},
        "warm start": {"compressor": LowRank(1)},
        "weighted": {"every": 2, "weight": 1.5},
        "16 bits": {"every": 2, "delay": 1, "dtype": torch.bfloat16},
        "escape": {"every": 2, "escape": ESCAPE},
    },
    "local, two optimizers": {
        "Muon and AdamW": {"muon": muon, "inner": adamw},
        "outer": {"muon": muon, "inner": adamw, "outer": nesterov, "exchange": "two-way"},
    },
    "local overlapped": {
        "three fragments": {"fragments": 3, "delay": 3, "inner": adamw},
        "outer": {"every": 5, "delay": 4, "outer": adam},
        "two-way": {"every": 3, "fragments": 1, "exchange": "two-way"},
        "random": {"every": 2, "fragments": 1, "delay": 1, "compressor": RandomK(0.2)},
        "schedule": {
            "every": 3,
            "fragments": 1,
            "delay": 2,
            "exchange": "two-way",
            "compressor": lambda t: TopK(0.2) if t < 1 else TopK(0.4),
        },
        "private": {"every": 2, "fragments": 1, "delay": 1, "compressor": QSGD(), "offload": True},
        "from the anchor": {"delay": 3, "keep_unsent": False, "inner": adamw, "mean_momentum": 0.5},
        "senders": {"every": 3, "fragments": 1, "delay": 1, "exchange": "senders"},
    },
    "elastic": {"outer": {"inner": adamw, "outer": nesterov}, "two-way": {"exchange": "two-way"}},
}
STOPS = {"CompressedSGD": (1, 7), "DDP by model": (8,), "FSDP": (5,), "elastic": (8,)}
LOCAL = (0, 5, 6, 7)  # before all, between rounds, and during exchanges


def resumed(front: str, way: str) -> list[str]:
    """Return what differs between a straight run, one that is saved, and those that are loaded at each stop."""
    options, stops = WAYS[front][way], STOPS.get(front, LOCAL)
    straight, saved, states = made(front, **options), made(front, **options), {}
    for t in range(END):
        straight.step(t)
    for t in range(END):
        if t in stops:
            states[t] = saved.everything()
        saved.step(t)
    expected = straight.outcome()
    found = [f"saved{d}" for d in differences(expected, saved.outcome())]
    for stop, state in states.items():
        again = FRONTS[front].make(**options)
        if front != "elastic":  # which joins once
            again.step(0)  # to be forgotten
        again.load(state)
        again.begin()
        for t in range(stop, END):
            again.step(t)
        found += [f"from {stop}{d}" for d in differences(expected, again.outcome())]
    return found


@parameters_of(WAYS, 2)
def test_resumed_is_never_stopped(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    assert on_workers(resumed, front, way) == [[], []]


def overlapped() -> dict[str, list[str]]:
    ways = ("three fragments", "outer", "two-way", "private")
    return {way: resumed("local overlapped", way) for way in ways}


@pytest.mark.nightly
def test_an_exchange_in_a_thread_is_saved_too(gloo: Callable[..., list[Any]]) -> None:
    """In processes an exchange with a delay continues beside the steps; simulated, it is done at once."""
    for found in gloo(overlapped, 2):
        assert {way: d for way, d in found.items() if d} == {}


def kept(front: str, exchange: str) -> tuple[bool, bool]:
    """True if y is that of before in new objects, and if something was unsent."""
    one = made(front, exchange=exchange)
    for t in range(6):
        one.step(t)
    y, x = one.y(), one.x()
    again = FRONTS[front].make(exchange=exchange)
    again.load(one.everything())
    again.begin()
    return torch.allclose(again.y(), y, rtol=1e-12, atol=1e-15), bool((x - y).any())


@parameters_of(dict.fromkeys(("DDP by buckets", "FSDP"), ("direct", "two-way")))
def test_by_buckets_and_modules_a_state_keeps_all_of_the_error(
    front: str, way: str, on_workers: Callable[..., list[Any]]
) -> None:
    """DDP makes buckets anew after the first step: other bits, but the same y."""
    assert on_workers(kept, front, way) == [(True, True)] * 2


def refused(front: str, way: str) -> str:
    one = made(front)
    state = one.engine.state_dict()
    with pytest.raises(ValueError, match="format") as raised:
        one.engine.load_state_dict(state | {"format": 1})
    return str(raised.value)


# The optimizer's is in its parameter groups: tests/sgd/test_sgd.py.
@parameters_of({front: ["format 1"] for front in FRONTS if front != "CompressedSGD"})
def test_states_of_another_format_are_refused(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    for message in on_workers(refused, front, way):
        assert way in message
