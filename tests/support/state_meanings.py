"""What the keys of saved states mean: a state as {name: value}, whatever its format, so that states of two compare.

A state of another format needs another table here, with the same names. What has no name is not of the training: the
number of the format, and what is hashed or tested elsewhere.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_RESETS = {"resets/*/start_loss": "resets {}/anchor", "resets/**": "resets {}"}
_REST = {"format": None, "ledger": None, "uncompressed/**": None, "identity/*": "{}", **_RESETS}
_SKIPS = {"skips/total": "skipped", "skips/consecutive": "skipped in a row"}
_ALLOCATION = {"allocation/*/*": "allocation {} {}"}

# Format 6: the names of what is at a path of a state. "*" is one key, "**" one or more, "{}" what they stand for.
# Several tensors of one name make one vector, and several plain values of one name must be equal.
FORMATS: dict[str, dict[str, str | None]] = {
    "optimizer": {
        "state/*/error": "error of {}",
        "state/*/estimate": "error of {}",
        "state/*/start": "escape anchor of {}",
        "state/*/*": "vector of {}: {}",  # momentum, STORM's direction, EF21's mean
        "param_groups/*/params": None,
        "param_groups/*/lr": "lr of group {}",
        "param_groups/*/weight_decay": "weight decay of group {}",
        "param_groups/*/format": None,
        "param_groups/*/start_step": "escape step",
        "param_groups/*/*": "{1}",  # repeated in all groups
        "aggregator/compressor/**": None,
        "aggregator/state/**": "exchange {}",
        "noise/*": "noise {}",
        "contraction/**": "contraction {}",
        "drifts/**": "drifts {}",
        **_SKIPS,
        **_REST,
    },
    "hook": {
        "steps": "step",
        "error/*": "error of {}",
        "aggregator/compressor/**": "compressor of the last exchange: {}",
        "aggregator/state/**": "exchange {}",
        **_SKIPS,
        **_ALLOCATION,
        **_REST,
    },
    "sharded": {"steps": "step", "error/*": "error of {}", **_SKIPS, **_ALLOCATION, **_REST},
    "local": {
        "identity/outer": None,
        "identity/escape": None,
        "identity/weight_by_steps": None,  # a state of it has what follows
        "pacing/**": None,
        "schedule/**": None,
        "own_steps": None,
        "steps": "step",
        "fragments/*/rounds": "rounds of fragment {}",
        "fragments/*/anchor/*": "anchor of {1}",
        "fragments/*/error/*": "error of {1}",
        "fragments/*/aggregator/compressor/**": "compressor of the last exchange: {1}",
        "fragments/*/shift/*": "shift of {1}",
        "fragments/*/aggregator/state/**": "exchange of fragment {}: {}",
        "fragments/*/owed/*": "owed of {1}",
        "fragments/*/contraction/**": "contraction of fragment {}: {}",
        "fragments/*/clipped": None,
        "fragments/*/rejected": "the last round of fragment {} was rejected",
        "fragments/*/invalid": "the last round of fragment {} was invalid here",
        "fragments/*/trained/*": "trainable state of {1}",
        "fragments/*/exchange/due": "step at which fragment {} is due",
        "fragments/*/exchange/applied": "pending exchange of fragment {} is applied",
        "fragments/*/exchange/invalid": "pending exchange of fragment {} is not finite here",
        "fragments/*/exchange/reports": "not finite in the pending exchange of fragment {}",
        "fragments/*/exchange/start/*": "x before the pending exchange of {1}",
        "fragments/*/exchange/mean/*": "mean of the pending exchange of {1}",
        "fragments/*/exchange/frozen": "frozen in the pending exchange of fragment {}",
        "fragments/*/exchange/times": None,
        "fragments/*/exchange/agrees": "frozen on all workers in the pending exchange of fragment {}",
        "outer/**": "outer {}",
        "escape/start/*": "escape anchor of {}",
        "escape/step": "escape step",
        "drifts/**": "drifts {}",
        "reset/*": "{} since a reset",
        "share": None,
        **_SKIPS,
        **_REST,
    },
}


def meaning(state: Mapping[str, Any], front: str) -> dict[str, Any]:
    """Return a front's saved state by the names of its table. Raises KeyError for a key that the table lacks."""
    found: dict[str, list[Any]] = {}
    for path, value in _leaves(state):
        name = _name(path, front)
        if name is not None:
            found.setdefault(name, []).append(value)
    return {name: _joined(name, values) for name, values in found.items()}


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield tensors and plain values with their paths; None, and what is empty, is as if it were not there."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, (*path, str(key)))
    elif isinstance(value, list | tuple) and any(isinstance(part, Mapping | Tensor) for part in value):
        for i, part in enumerate(value):
            yield from _leaves(part, (*path, str(i)))
    elif value is not None and not (isinstance(value, list | tuple) and not value):
        yield "/".join(path), value


def _name(path: str, front: str) -> str | None:
    for pattern, name in FORMATS[front].items():
        words = re.escape(pattern).replace(r"\*\*", "(.+)").replace(r"\*", "([^/]*)")
        if match := re.fullmatch(words, path):
            return None if name is None else name.format(*match.groups())
    raise KeyError(f"{path} of a state of {front} has no name in the table")


def _joined(name: str, values: list[Any]) -> Any:
    if len(values) > 1 and all(isinstance(value, Tensor) for value in values):
        return torch.cat([value.reshape(-1) for value in values])
    if any(value is not values[0] and value != values[0] for value in values):
        raise ValueError(f"{name} is {values[0]} and {values[1]} in one state")
    return values[0]
