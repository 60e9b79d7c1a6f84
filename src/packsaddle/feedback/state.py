"""Saved states: whether one fits the parameters, filling flat vectors from one, and carrying an optimizer's over to
another number of workers.

A state is tensors and plain types: vectors by parameter in "state", numbers in "param_groups", as torch has it. Its
format is a number, which an optimizer's groups repeat, for torch's checkpoint tools keep nothing else.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packsaddle.feedback.parameters import FlatParameters

FORMAT = 1  # of optimizers' and hooks' states
Path = tuple[Any, ...]  # where something is in a state: keys from the outermost
_AVERAGED = ("pending", "momentum", "storm")  # of an optimizer's vectors; the others are the same everywhere
_ITS_OWN = ("state", "ledger", "monitor", "guard")  # of one worker, apart from the groups: not carried over as they are


def parameter_ids(state_dict: Mapping[str, Any]) -> list[Any]:
    """Return the keys by which a state dict refers to the parameters, in order (integers, or names in torch's DCP)."""
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def check_fits(
    state_dict: Mapping[str, Any],
    flat: FlatParameters,
    vectors: Mapping[str, Tensor],
    identity: Mapping[str, int | str],
) -> None:
    """Raise ValueError unless a state dict fits these parameters, flat vectors and values that every group repeats."""
    for group in state_dict["param_groups"]:
        check_format(group, "CompressedSGD")
        check_identity(group, identity)
        for name in ("step", "anchor_step"):
            if not isinstance(group.get(name), int):
                raise ValueError(f"the state has no {name} in its parameter groups; was it saved by CompressedSGD?")
    ids = parameter_ids(state_dict)
    if len(ids) != len(flat.parameters):
        raise ValueError(f"the state is of {len(ids)} parameters, and there are {len(flat.parameters)}")
    for name in vectors:
        for key, p, label in zip(ids, flat.parameters, flat.names, strict=True):
            check_shape(f'state "{name}" of {label}', state_dict["state"].get(key, {}).get(name), p.shape)


def check_format(saved: Mapping[str, Any], owner: str) -> None:
    """Raise ValueError unless what was saved is of the format that is read here."""
    if "format" not in saved:
        raise ValueError(f"the state has no format; was it saved by {owner}?")
    if saved["format"] != FORMAT:
        raise ValueError(f"the state has format {saved['format']!r}, and this version of packsaddle reads {FORMAT}")


def check_identity(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first that differs, unless what was saved has these values."""
    for name, expected in identity.items():
        if saved.get(name) != expected:
            raise ValueError(f"{name} is {expected} here, but the state was saved with {name} {saved.get(name)}")


def check_shape(what: str, found: Tensor | None, shape: torch.Size) -> None:
    """Raise ValueError unless a tensor is there and has this shape."""
    if found is None or found.shape != shape:
        have = "nothing" if found is None else f"shape {tuple(found.shape)}"
        raise ValueError(f"{what} must have shape {tuple(shape)}, found {have}")


def fill(state_dict: Mapping[str, Any], flat: FlatParameters, vectors: Mapping[str, Tensor]) -> None:
    """Copy a state dict's tensors into the flat vectors, in their own precision."""
    ids = parameter_ids(state_dict)
    for name, vector in vectors.items():
        for key, view in zip(ids, flat.views(vector), strict=True):
            view.copy_(state_dict["state"][key][name])


def split_state(state: Mapping[str, Any], workers: int) -> tuple[dict[Path, Tensor], dict[str, Any]]:
    """Return what another number of workers is to have the mean of, by its place, and what all must have.

    What an owner of a two-way exchange holds back is an error of the mean, so it counts once for every worker.
    """
    means: dict[Path, Tensor] = {}
    same: dict[Any, dict[str, Any]] = {}
    for key, vectors in state["state"].items():
        for name, vector in vectors.items():
            if name in _AVERAGED:
                means[key, name] = vector
            elif name != "residual":
                same.setdefault(key, {})[name] = vector
        if "residual" in vectors:
            means[key, "pending"] = vectors["pending"].double() + workers * vectors["residual"].double()
    rest = {k: v for k, v in state.items() if k not in _ITS_OWN}
    rest["param_groups"] = [{k: v for k, v in g.items() if k != "rank"} for g in state["param_groups"]]
    return means, {"state": same} | rest


def put_means(
    state: dict[str, Any],
    means: Mapping[Path, Tensor],
    flat: FlatParameters,
    vectors: Mapping[str, Tensor],
    identity: Mapping[str, int | str],
) -> None:
    """Put means in a state, in place, and make it that of the worker with these vectors and this identity."""
    for (key, name), mean in means.items():
        state["state"][key][name] = mean
    for p, kept in zip(flat.parameters, state["state"].values(), strict=True):
        kept.pop("residual", None)
        if "residual" in vectors:  # the means of the memories have it
            kept["residual"] = torch.zeros_like(p, dtype=vectors["residual"].dtype, device="cpu")
    for group in state["param_groups"]:
        group.update({name: identity[name] for name in ("rank", "workers", "owners")})
