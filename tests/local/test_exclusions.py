"""Which arguments of LocalUpdates exclude each other: each pair of settings is tried, and the pairs refused are listed.

A new pair is either made impossible by its type, or replaces another one here.
"""

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from elastic_fakes import FakeGroup, FakeManager
from torch import nn

from packsaddle import (
    Compression,
    Elastic,
    Escape,
    LocalUpdates,
    LowRank,
    OuterSGD,
    Overlap,
    SharedTopK,
    TopK,
    Workers,
    simulate,
)
from packsaddle.comm.group import resolve

# By argument of LocalUpdates: its settings, which are valid alone.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "compressor": {
        "shared coordinates": {"compressor": SharedTopK(0.5)},
        "low rank": {"compressor": LowRank(2)},
        "function of the round": {"compressor": lambda t: TopK(0.5)},
        "two-way": {"exchange": "two-way"},
        "coordinator": {"exchange": "coordinator"},
        "senders": {"exchange": "senders"},
        "decay": {"decay": 0.9},
    },
    "workers": {
        "weight": {"weight": 2.0},
        "paces": {"weight": "steps"},
        "clip": {"clip": 1.0},
        "elastic": {},
    },
    "overlap": {"delay": {"delay": 1}, "fragments": {"fragments": 2}},
    "escape": {"escape": {"escape": Escape(1, 0.1, lambda: 0.0)}},
    "outer": {"outer": {"outer": OuterSGD(momentum=0.0)}},
    "mean_momentum": {"mean_momentum": {"mean_momentum": 0.5}},
    "optimizer": {"SGD": {"optimizer": partial(torch.optim.SGD, lr=0.1)}},
    "noise": {"noise": {"noise": 0.1}},
    "keep_unsent": {"keep_unsent": {"keep_unsent": False}},
    "offload": {"offload": {"offload": True}},
}
EXCLUDED = {
    ("compressor", "workers"): {
        ("shared coordinates", "elastic"),
        ("low rank", "elastic"),
        ("coordinator", "elastic"),
        *(("senders", workers) for workers in ("weight", "paces", "elastic")),
    },
    ("workers", "overlap"): {("elastic", "delay")},
    ("workers", "escape"): {(workers, "escape") for workers in ("weight", "paces", "elastic")},
    ("overlap", "escape"): {("delay", "escape"), ("fragments", "escape")},
    ("mean_momentum", "optimizer"): {("mean_momentum", "SGD")},
}


def made(given: Mapping[str, str]) -> str:
    """Return the error of a LocalUpdates with one setting of each of these arguments; empty: it is accepted."""
    settings = {argument: SETTINGS[argument][name] for argument, name in given.items()}
    compression, workers = settings.pop("compressor", {}), settings.pop("workers", {})
    overlap = Overlap(**settings.pop("overlap", {}))
    optimizer = settings.pop("optimizer", {"optimizer": torch.optim.AdamW})["optimizer"]
    others = {name: value for each in settings.values() for name, value in each.items()}

    def worker(rank: int) -> str:
        net, group = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), resolve(None)
        manager = FakeManager(group)
        elastic = Elastic(manager, group=FakeGroup(manager), leave_on_sigterm=False)
        LocalUpdates(
            optimizer(net.parameters()),
            Compression(**{"compressor": TopK(0.5), "dense_below": 0} | compression),
            every=4,
            workers=elastic if given.get("workers") == "elastic" else Workers(group, **workers),
            overlap=overlap,
            **others,
        )
        return ""

    try:
        return simulate(worker, 2)[0]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("argument", SETTINGS)
def test_each_setting_alone(argument: str) -> None:
    assert {name: made({argument: name}) for name in SETTINGS[argument]} == dict.fromkeys(SETTINGS[argument], "")


@pytest.mark.parametrize("pair", list(combinations(SETTINGS, 2)), ids=" and ".join)
def test_pairs_of_arguments(pair: tuple[str, str]) -> None:
    first, second = pair
    refused = {(a, b) for a in SETTINGS[first] for b in SETTINGS[second] if made({first: a, second: b})}
    assert refused == EXCLUDED.get(pair, set())


def test_fewer_than_six_pairs_of_arguments_exclude_each_other() -> None:
    assert len(EXCLUDED) < 6
