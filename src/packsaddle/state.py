"""Flat vectors as per-parameter optimizer state: what a checkpoint holds, and whether a saved state fits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packsaddle.flat import FlatParameters


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
