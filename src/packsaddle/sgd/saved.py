"""The saved state of CompressedSGD: which of its entries are each worker's own, and what torch's tools leave out of it.

The vectors are in the entries of the parameters, and the numbers in those of the parameter groups, where torch's
checkpoint tools keep them. These tools omit all other entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from packsaddle.feedback.state import ANY, Rule, check_format

# Entries that the optimizer adds to each parameter group.
NUMBERS = ("step", "start_step")
RULES = [
    *(Rule(("state", ANY, name), "error") for name in ("error", "momentum")),
    Rule(("state", ANY, "start"), "shared"),
    *(Rule(("param_groups", ANY, name), "constant") for name in ("rank", "workers")),
    *(Rule((name,), "own") for name in ("skips", "contraction", "ledger")),
    *(Rule((name,), "shared") for name in ("param_groups", "aggregator", "noise", "resets")),
]
# Entries that torch's checkpoint tools omit, with the values that are loaded instead.
_DROPPED: dict[str, Any] = {
    "aggregator": {"compressor": {}, "state": {}},
    "noise": None,
    "skips": {"total": 0, "consecutive": 0},
    "contraction": {"whole": None, "by_tensor": {}, "steps": 0},
    "ledger": [],
    "resets": [],
}


def by_index(state_dict: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
    """Return a saved state in which the keys of parameters are their indices, and no entry is missing.

    torch's checkpoint tools save only groups and tensors, with names of parameters as keys. The entries that they omit
    get defaults. Raises ValueError if the numbers of parameters in the groups are not `sizes`.
    """
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not isinstance(state_dict.get("state"), Mapping):
        raise ValueError("the state has no param_groups; was it saved by CompressedSGD?")
    for group in groups:
        if "format" in group:  # validation of the state reports a missing format
            check_format(group["format"], "the state")
    saved = [len(group.get("params", ())) for group in groups]
    if saved != list(sizes):
        raise ValueError(f"the state is of {sum(saved)} parameters, and there are {sum(sizes)}")
    # The keys are indices, or in a state from torch's distributed checkpoints names.
    keys = [key for group in groups for key in group["params"]]
    vectors = {i: state_dict["state"].get(key, {}) for i, key in enumerate(keys)}
    rest = state_dict if state_dict.keys() & _DROPPED.keys() else _DROPPED
    return {**rest, "param_groups": groups, "state": vectors}
