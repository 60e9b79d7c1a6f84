"""Saved states of local updates: whether one fits, and carrying one over to another number of workers.

A state is tensors and plain types. Anchors and the outer optimizer's state are identical on all workers; error
memories and running exchanges are each worker's own, so another number of workers gets their means.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packsaddle.feedback.state import check_identity, check_shape
from packsaddle.local.fragment import Fragment

FORMAT = 1  # of saved states
Path = tuple[Any, ...]  # where something is in a state: keys from the outermost


def check_fits(
    state: Mapping[str, Any],
    fragments: Sequence[Fragment],
    identity: Mapping[str, Any],
    optional: Mapping[str, object],
) -> None:
    """Raise ValueError, naming the first difference, unless a state fits these fragments and values.

    `optional` are the parts, by name, that the state has where they are not None here, and must not have else.
    """
    if state.get("format") != FORMAT:
        raise ValueError(f"the state must have format {FORMAT} of LocalUpdates, found {state.get('format')!r}")
    check_identity(state["identity"], identity)
    for part, saved in zip(fragments, state["fragments"], strict=True):
        for place in part.places:
            for key in ("anchor", "pending"):
                check_shape(f"{key} of {place.name}", saved[key].get(place.name), place.parameter.shape)
    for name, here in optional.items():
        if (state[name] is None) != (here is None):
            have = ["none", "one"]
            raise ValueError(f"{name}: there is {have[here is not None]} here, and {have[here is None]} in the state")


def split_state(
    state: Mapping[str, Any], fragments: Sequence[Fragment], workers: int
) -> tuple[dict[Path, Tensor], dict[str, Any]]:
    """Return the tensors that another number of workers gets the mean of, by place, and the identical rest.

    An owner error of a two-way exchange is an error of the mean, so it counts once for every worker. With `keep_unsent`
    it moves the start point without x, so it is owed as well, unless a running exchange will move x to its start point.
    """
    means: dict[Path, Tensor] = {}
    rest = {k: v for k, v in state.items() if k not in ("fragments", "ledger", "skips")}
    rest["identity"] = {k: v for k, v in state["identity"].items() if k != "rank"}
    rest["fragments"] = []
    for i, (part, saved) in enumerate(zip(fragments, state["fragments"], strict=True)):
        pending = {name: error.double() for name, error in saved["pending"].items()}
        lands = saved["flight"] is not None and saved["flight"]["taken"]
        owed = {} if lands else {name: saved["owed"].get(name, 0 * error).double() for name, error in pending.items()}
        # e <- e + W owner error
        for vector in saved["held"].get("vectors", {}).values():
            padded = torch.nn.functional.pad(vector.double(), (0, part.d - part.compressed_d))
            for place, view in part.named(padded):
                pending[place.name] = pending[place.name] + workers * view
                if part.anchor.keeps and not lands:
                    owed[place.name] = owed[place.name] + workers * view
        # Each worker's own are averaged: e, what x is owed, and x at the start of a running exchange.
        means |= {("fragments", i, "pending", name): error for name, error in pending.items()}
        means |= {("fragments", i, "owed", name): value for name, value in owed.items()}
        flight = saved["flight"]
        if flight is not None:
            means |= {("fragments", i, "flight", "before", name): x for name, x in flight["before"].items()}
            flight = {k: v for k, v in flight.items() if k not in ("before", "bad")}
        equal = {k: v for k, v in saved.items() if k not in ("pending", "owed", "held", "monitor")}
        rest["fragments"].append(equal | {"flight": flight})
    return means, rest


def put_means(state: dict[str, Any], means: Mapping[Path, Tensor], identity: Mapping[str, Any]) -> None:
    """Write means into a state, in place, and set the worker's identity."""
    for (*path, name), mean in means.items():
        place: Any = state
        for key in path:
            place = place[key]
        place[name] = mean.to(place[name].dtype) if name in place else mean
    for saved in state["fragments"]:
        if saved["flight"] is not None:
            saved["flight"]["bad"] = False  # the mean of x is judged in the next round
        for vector in saved["held"].get("vectors", {}).values():  # the means of the memories have it
            vector.zero_()
    state["identity"] |= {name: identity[name] for name in ("rank", "workers")}
