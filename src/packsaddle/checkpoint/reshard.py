"""Conversion of the states of a checkpoint to another number of workers.

Values that are equal on all workers are kept. Error memories, packsaddle's momenta, and floating-point buffers that
differ are averaged over the saving workers. This preserves the parameters, the mean error memory (the total unapplied
update), and mean momenta, which are linear in the gradients of each worker. Parameters and optimizer states may differ
only if the workers train separately between exchanges, i.e. if one of the saved objects is a `LocalUpdates`. They are
then averaged with the workers' weights in that object (`Exchanging.weight_in`), and different integers in buffers, such
as numbers of batches, are worker 0's. Other differences raise CheckpointError.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from packsaddle.checkpoint.files import CheckpointError
from packsaddle.checkpoint.parts import Parts, run_on_all
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.feedback.exchanging import Exchanging
from packsaddle.numerics.devices import device_of_doubles

Path = tuple[Any, ...]  # keys and indices in nested containers, outermost first
# The saved state of one part from one worker, as two dictionaries by path: the tensors to average over the workers, and
# the values that must be equal on all workers.
Split = tuple[dict[Path, Tensor], dict[Path, Any]]


def resharded(
    parts: Parts,
    first: dict[str, Any],
    mine: Sequence[Mapping[str, Any]],
    workers: int,
    collectives: ObjectCollectives,
) -> dict[str, Any]:
    """Convert the states of a checkpoint of `workers` workers to the current number of workers, and return them by name
    of the part; collective.

    Args:
        parts: the objects into which the states will be loaded, by name.
        first: the states that worker 0 has saved, by name. Every worker has them; they are changed in place.
        mine: the states from each file that this worker has read; exactly one worker reads each file.
        workers: the number of workers that saved the checkpoint.
        collectives: the collectives of the current workers.

    Raises CheckpointError, on every worker, if a state cannot be converted.
    """
    apart = any(isinstance(part, Exchanging) and part.optimizers for part in parts.values())
    shares = run_on_all(collectives, partial(_shares, parts, mine))
    for name, part in parts.items():
        # Find the tensors to average: error memories and so on, and values that may differ between workers.
        (means, equal), splits = run_on_all(collectives, partial(_splits, name, part, first, mine, workers))
        different = _different(equal, splits, collectives)
        means |= _averaged(name, part, equal, different, workers, apart=apart)

        # Replace them by their means over the workers that saved the checkpoint.
        tensors = [{**of_worker, **others} for of_worker, others in splits]
        new: dict[Path, Any] = dict(_mean(means, tensors, shares, workers, collectives))
        if isinstance(part, Exchanging):
            new |= part.saved_state.merge(_leaves(first[name]))
        for path, value in new.items():
            _replace(first[name], path, value)
    return first


def _shares(parts: Parts, mine: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the weight of each of the states `mine` in the mean over workers: the worker's weight in the
    `LocalUpdates` among the parts, or 1 if there is none. The mean of the weights over workers is 1. Raises
    CheckpointError if a worker has different weights in several `LocalUpdates`."""
    local = {name: part for name, part in parts.items() if isinstance(part, Exchanging) and part.optimizers}
    weights = [[part.weight_in(states[name]) for name, part in local.items()] or [1.0] for states in mine]
    if any(len(set(of_worker)) > 1 for of_worker in weights):
        raise CheckpointError(
            f"{' and '.join(local)} have different weights of a worker, so they cannot be loaded by another number of "
            f"workers"
        )
    return [of_worker[0] for of_worker in weights]


def _splits(
    name: str, part: Any, first: Mapping[str, Any], mine: Sequence[Mapping[str, Any]], workers: int
) -> tuple[Split, list[Split]]:
    """Split worker 0's state of a part, and the states of the part that this worker has read. Raises CheckpointError if
    a state cannot be converted to another number of workers, or if a value is missing, or has another shape, in one of
    two states."""
    try:
        expected, *splits = [_split(part, states[name]) for states in (first, *mine)]
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    layout = _layout(expected)
    for found in map(_layout, splits):
        for path in (*layout, *found):
            if path not in layout or path not in found or found[path] != layout[path]:
                raise CheckpointError(
                    f"{name}: {_shown(path)} is missing, or has another shape, in the state of one of the {workers} "
                    f"workers that saved it, so it cannot be loaded by another number of workers"
                )
    return expected, splits


def _split(part: Any, state: Mapping[str, Any]) -> Split:
    if not isinstance(part, Exchanging):
        return {}, _leaves(state)
    return part.saved_state.split(_leaves(part.for_resharding(state)))


def _layout(split: Split) -> dict[Path, Any]:
    """Return the shape of each tensor, and True if it is floating-point, by path; None for other values."""
    means, equal = split
    return {
        path: (value.shape, value.is_floating_point()) if isinstance(value, Tensor) else None
        for path, value in (equal | means).items()
    }


def _different(expected: Mapping[Path, Any], splits: Sequence[Split], collectives: ObjectCollectives) -> list[Path]:
    """Return the paths at which a worker's saved value differs from worker 0's, `expected`; collective."""
    paths = list(expected)
    here = {i for i, path in enumerate(paths) for _, equal in splits if _digest(equal[path]) != _digest(expected[path])}
    return [paths[i] for i in sorted({i for found in collectives.gather(sorted(here)) for i in found})]


def _digest(value: Any) -> bytes:
    """Return the sha256 digest of a tensor's dtype and bytes. If `value` is not a tensor, return its repr as bytes."""
    if not isinstance(value, Tensor):
        return repr(value).encode()
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{value.dtype}".encode() + raw.tobytes()).digest()


def _averaged(
    name: str, part: Any, expected: Mapping[Path, Any], different: Sequence[Path], workers: int, *, apart: bool
) -> dict[Path, Tensor]:
    """Return worker 0's tensors, of the values at the paths `different`, that must be averaged over workers.

    These are floating-point buffers and, if `apart` is True, i.e. if workers train separately between exchanges,
    parameters and optimizer states. Other buffers then keep worker 0's value. Raises CheckpointError if any other value
    differs.
    """
    buffers = dict(part.named_buffers()) if isinstance(part, nn.Module) else {}
    is_own = apart and isinstance(part, nn.Module | Optimizer)
    found = {}
    for path in different:
        value, is_buffer = expected[path], path[0] in buffers
        if isinstance(value, Tensor) and value.is_floating_point() and (is_own or is_buffer):
            found[path] = value
        elif not (is_own and is_buffer):  # keep worker 0's count, such as batch normalization's num_batches_tracked
            raise CheckpointError(
                f"{name}: {_shown(path)} differs between the {workers} workers that saved it, and its mean would have "
                f"no meaning, so it cannot be loaded by another number of workers"
            )
    return found


def _mean(
    like: Mapping[Path, Tensor],
    mine: Sequence[Mapping[Path, Tensor]],
    shares: Sequence[float],
    workers: int,
    collectives: ObjectCollectives,
) -> dict[Path, Tensor]:
    """Return, for each path in `like`, the weighted mean of the tensors at this path in all saved states; collective.

    A mean has the dtype of the tensor in `like`, and is accumulated in float64. `mine` contains the tensors of the
    states that this worker has read, and `shares` the weights of these states. The mean of the weights of all `workers`
    states is 1.
    """
    found, device = {}, device_of_doubles(collectives.device)
    for path, tensor in like.items():
        total = torch.zeros(tensor.shape, dtype=torch.float64, device=device)
        for tensors, share in zip(mine, shares, strict=True):
            total.add_(tensors[path].to(device, torch.float64), alpha=share)
        collectives.group.all_reduce(total)
        found[path] = total.div_(workers).to(tensor.dtype).cpu()
    return found


def _replace(state: Any, path: Path, value: Any) -> None:
    """Replace the value at a path of a nested state. A container of the value that is None, since worker 0 has saved no
    such tensors, becomes a dictionary."""
    *outer, key = path
    for each in outer:
        if state[each] is None:
            state[each] = {}
        state = state[each]
    state[key] = value


def _leaves(value: Any, path: Path = ()) -> dict[Path, Any]:
    if isinstance(value, Mapping):
        return {p: leaf for key, inner in value.items() for p, leaf in _leaves(inner, (*path, key)).items()}
    if isinstance(value, list | tuple):
        return {p: leaf for i, inner in enumerate(value) for p, leaf in _leaves(inner, (*path, i)).items()}
    return {path: value}


def _shown(path: Path) -> str:
    return ".".join(map(str, path))
