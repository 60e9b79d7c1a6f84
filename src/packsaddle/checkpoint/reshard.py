"""States of several workers: deduplication of equal tensors, and conversion to another number of workers.

A tensor that is equal to worker 0's tensor at the same path, by a sha256 of dtype, shape and bytes, is stored in worker
0's file alone. Examples are the weights of a DistributedDataParallel model. The files of all other workers list the
paths of such tensors, and their manifests contain a joint fingerprint of the tensors. If worker 0's file is from a
different save, its tensors do not match the fingerprint.

When the number of workers changes, values equal on all workers are kept. Error memories, packsaddle's momenta, and
floating-point buffers that differ are averaged over the saving workers. This preserves the parameters, the mean error
memory (the total unapplied update), and mean momenta, which are linear in the gradients of each worker. Parameters and
optimizer states may differ only if the workers train separately between exchanges, i.e. if one of the saved objects is
a `LocalUpdates`. They are then averaged with the workers' weights in that object (`Exchanging.weight_in`), and
different integers in buffers, such as numbers of batches, are worker 0's. If the scales of the workers' GradScalers
differ, the smallest is used. Other differences between models or between optimizer states raise CheckpointError.
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from packsaddle.checkpoint.files import CheckpointError
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.feedback.exchanging import Exchanging, exchange_of
from packsaddle.numerics.devices import device_of_doubles

Path = tuple[Any, ...]  # keys and indices in nested containers, outermost first


def fingerprint(value: Any) -> bytes:
    """Return the sha256 digest of a tensor's dtype, shape and bytes. If `value` is not a tensor, return its repr as
    bytes."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(raw.data)
        return digest.digest()
    return repr(value).encode()


def paths_in_common(content: Mapping[str, Any], collectives: ObjectCollectives) -> tuple[list[Path], str]:
    """Return the paths (sequences of keys) of those tensors in `content`, this worker's state, that equal worker 0's
    tensors at the same paths. Also return the joint fingerprint (sha256) of these tensors. Collective. On worker 0 both
    are empty."""
    if collectives.group.size == 1:
        return [], ""
    # Compare only non-empty plain tensors, not DTensors, sparse or quantized tensors. Worker 0 stores all its tensors,
    # so its list of paths is empty.
    mine = {
        path: fingerprint(value)
        for path, value in _leaves(content).items()
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized
        if value.numel()
    }
    theirs = collectives.send(mine if collectives.group.rank == 0 else None, 0)
    paths = [] if collectives.group.rank == 0 else [path for path, found in mine.items() if theirs.get(path) == found]
    return paths, _joint_fingerprint(mine[path] for path in paths) if paths else ""


def without(content: Any, paths: list[Path]) -> Any:
    return _replaced(content, dict.fromkeys(paths))


def filled(content: Any, paths: list[Path], whole: Any) -> tuple[Any, str]:
    """Return a copy of `content`, a worker's nested state, in which the values at `paths` (sequences of keys) are
    copies of the tensors at these paths in `whole`, worker 0's state. Also return the joint fingerprint (sha256) of
    these tensors. Raises LookupError or TypeError if `whole` has no tensor at one of the paths."""
    found = {path: _at(whole, path) for path in paths}
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise TypeError("not a tensor")
    checksum = _joint_fingerprint(fingerprint(tensor) for tensor in found.values()) if paths else ""
    return _replaced(content, {path: tensor.clone() for path, tensor in found.items()}), checksum


def _joint_fingerprint(fingerprints: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(fingerprints)).hexdigest()


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _replaced(value: Any, by: Mapping[Path, Any], path: Path = ()) -> Any:
    if path in by:
        return by[path]
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)  # keeps `_metadata` of a module's state_dict
        # Assign the values one by one, since the method `update` of a collections.Counter would add them to its counts.
        for key, inner in value.items():
            copied[key] = _replaced(inner, by, (*path, key))
        return copied
    if type(value) in (list, tuple):
        return type(value)(_replaced(inner, by, (*path, i)) for i, inner in enumerate(value))
    return value


@dataclass
class Split:
    """The saved state of one part of a checkpoint (a model, an optimizer, ...) from one worker, divided into tensors to
    average over workers and values that must be equal on all workers."""

    means: dict[Path, Tensor] = field(default_factory=dict)
    equal: dict[Path, Any] = field(default_factory=dict)


def resharded(
    parts: Mapping[str, Any],
    template: dict[str, Any],
    contents: Sequence[dict[str, Any]],
    workers: int,
    collectives: ObjectCollectives,
) -> dict[str, Any]:
    """Convert a checkpoint of `workers` workers to the current number of workers, and return this worker's content;
    collective.

    `template` is the content of worker 0's file, present on every worker. `contents` has the content of each file that
    this worker has read; exactly one worker reads each file. Raises CheckpointError, on every worker, if a state cannot
    be converted.
    """
    result: dict[str, dict[str, Any]] = {"parts": {}, "extra": _mean_of_extra(template, contents, workers, collectives)}
    apart = any(isinstance(part, Exchanging) and part.optimizers for part in parts.values())
    shares = _shares(parts, contents, collectives)
    for name, part in parts.items():
        if apart and isinstance(part, Optimizer):
            states = [one["parts"][name] for one in (template, *contents)]
            _complete_states(states, shares[name], workers, collectives)
    splits = {}
    for name, part in parts.items():
        try:
            splits[name] = _split(part, template["parts"][name])
        except ValueError as error:  # every worker raises it, since all have worker 0's content
            raise CheckpointError(f"{name}: {error}") from None
    for name, part in parts.items():
        mine = [_split(part, content["parts"][name]) for content in contents]
        if (missing := _missing(splits[name], mine, collectives)) is not None:
            raise CheckpointError(
                f"{name}: {'.'.join(map(str, missing))} is missing, or has another shape, in the state of "
                f"one of the {workers} workers that saved it, so it cannot be loaded by another number of workers"
            )
        different = _different(splits[name], mine, collectives)
        means, least = _reductions(name, part, splits[name], different, workers, apart=apart)

        # Sums and minima are over the workers that saved the checkpoint, since each file was read by exactly one
        # current worker.
        sums = [{p: one.means.get(p, one.equal.get(p)) for p in means} for one in mine]
        found: dict[Path, Any] = _mean(means, sums, shares[name], workers, collectives)
        found |= _least(least, mine, collectives) if least else {}
        state = template["parts"][name]
        replaced = part.saved_state.merge(_leaves(state)) if isinstance(part, Exchanging) else {}
        for path, value in (found | replaced).items():
            *outer, key = path
            # Worker 0 may have saved None where other workers saved a dict of tensors. Then create the dict.
            if outer and _at(state, tuple(outer)) is None:
                _at(state, tuple(outer[:-1]))[outer[-1]] = {}
            _at(state, tuple(outer))[key] = value
        result["parts"][name] = state
    return result


def _reductions(
    name: str, part: Any, split: Split, different: Sequence[Path], workers: int, *, apart: bool
) -> tuple[dict[Path, Tensor], list[Path]]:
    """Return the tensors of worker 0's state that must be averaged over the saving workers. Also return the paths of
    the values that must be replaced by their minimum over these workers; only a GradScaler has such values.

    Tensors in `split.means` are averaged. Values at the paths `different` differ between the saving workers. Of these
    values, floating-point buffers are averaged. If `apart` is True, i.e. workers train separately between exchanges,
    parameters and optimizer states are averaged too, and other buffers keep worker 0's value. Raises CheckpointError if
    any other value differs.
    """
    if isinstance(part, torch.amp.GradScaler):
        return split.means, list(different)
    buffers = dict(part.named_buffers()) if isinstance(part, nn.Module) else {}
    # Parameters and optimizer states can differ between workers if the workers train separately.
    is_own = apart and isinstance(part, nn.Module | Optimizer)
    averaged = list[Path]()
    for path in different:
        value, is_buffer = split.equal[path], path[0] in buffers
        if isinstance(value, Tensor) and value.is_floating_point() and (is_own or is_buffer):
            averaged.append(path)
        elif not (is_own and is_buffer):  # keep worker 0's count, such as batch normalization's num_batches_tracked
            raise CheckpointError(
                f"{name}: {'.'.join(map(str, path))} differs between the {workers} workers that saved it, and its "
                f"mean would have no meaning, so it cannot be loaded by another number of workers"
            )
    return split.means | {path: split.equal[path] for path in averaged}, []


def _mean_of_extra(
    template: dict[str, Any], contents: Sequence[dict[str, Any]], workers: int, collectives: ObjectCollectives
) -> dict[str, Any]:
    """Return worker 0's `extra`, i.e. the state of the run that the user saved in addition to the parts; collective.
    A floating-point tensor in it is averaged over the saving workers if its shape is the same on all of them.
    """
    extra: dict[str, Any] = template["extra"]
    candidates = [k for k, t in extra.items() if isinstance(t, Tensor) and t.is_floating_point()]
    here = [[_layout(content["extra"].get(k)) == _layout(extra[k]) for content in contents] for k in candidates]
    everywhere = map(all, zip(*collectives.gather(list(map(all, here))), strict=True))
    like = {(k,): extra[k] for k, found in zip(candidates, everywhere, strict=True) if found}
    mine = [{path: content["extra"][path[0]] for path in like} for content in contents]
    return extra | {path[0]: t for path, t in _mean(like, mine, [1.0] * len(mine), workers, collectives).items()}


def _mean(
    like: Mapping[Path, Tensor],
    mine: Sequence[Mapping[Path, Tensor | None]],
    shares: Sequence[float],
    total_share: float,
    collectives: ObjectCollectives,
) -> dict[Path, Tensor]:
    """Return, for each path in `like`, the weighted mean of the tensors at this path in all saved states; collective.

    A mean has the shape and dtype of the tensor in `like`, and is accumulated in float64. `mine` contains the tensors
    of the states that this worker has read, and `shares` the weights of these states. `total_share` is the sum of the
    weights of all states.
    """
    found, device = {}, device_of_doubles(collectives.device)
    for path, tensor in like.items():
        total = torch.zeros(tensor.shape, dtype=torch.float64, device=device)
        for one, share in zip(mine, shares, strict=True):
            value = one[path]
            assert value is not None
            total.add_(value.to(device, torch.float64), alpha=share)
        collectives.group.all_reduce(total)
        found[path] = total.div_(total_share).to(tensor.dtype).cpu()
    return found


def _least(paths: Sequence[Path], mine: Sequence[Split], collectives: ObjectCollectives) -> dict[Path, Any]:
    found = collectives.gather([[one.equal[path] for path in paths] for one in mine])
    return dict(zip(paths, map(min, zip(*(values for part in found for values in part), strict=True)), strict=True))


def _shares(
    parts: Mapping[str, Any], contents: Sequence[dict[str, Any]], collectives: ObjectCollectives
) -> dict[str, list[float]]:
    """Return, for each part of a checkpoint, the weights of the states in `contents` in the mean of the part's states
    over workers; collective. The result is a dict by name of the part.

    The weights are those of the `LocalUpdates` that trains the part; their mean over workers is 1. If no part is a
    `LocalUpdates`, all weights are 1. Raises CheckpointError, on every worker, if several `LocalUpdates` train one
    module and have different weights.
    """
    local = {name: part for name, part in parts.items() if isinstance(part, Exchanging) and part.optimizers}
    if not local:
        return {name: [1.0] * len(contents) for name in parts}
    found, unlike = {}, []
    for name, part in parts.items():
        chosen = {key: one for key, one in local.items() if one is exchange_of(part)} or local
        each = [[one.weight_in(content["parts"][key]) for content in contents] for key, one in chosen.items()]
        unlike += [name] if any(shares != each[0] for shares in each) else []
        found[name] = each[0]
    if refused := [name for names in collectives.gather(unlike) for name in names]:
        raise CheckpointError(
            f"{refused[0]}: {' and '.join(local)} have unlike weights of the workers, so it has no mean, and cannot be "
            f"loaded by another number of workers"
        )
    return found


def _complete_states(
    states: Sequence[dict[str, Any]], shares: Sequence[float], workers: int, collectives: ObjectCollectives
) -> None:
    """Insert missing optimizer states into the saved states of an optimizer; collective. If a worker has saved no state
    for some parameter, it is given the mean of the states that the other workers have saved for this parameter.

    A worker has no state for a parameter before its first gradient, or after the state was reset because of a NaN.
    `states` has the optimizer's state dict from worker 0's file, and then the state dicts that this worker has read.
    `shares` has the weights of the state dicts that this worker has read.
    """
    first, *mine = [state.get("state", {}) for state in states]
    # Gather the keys (indices of parameters) of every saved state, each with the weight of the state.
    held = collectives.gather([(key, share) for one, share in zip(mine, shares, strict=True) for key in one])
    for key in dict.fromkeys(key for pairs in held for key, _ in pairs):
        found = [share for pairs in held for other, share in pairs if other == key]
        if len(found) == workers:
            continue
        here = [(_leaves(one[key]), share) for one, share in zip(mine, shares, strict=True) if key in one]
        holder = next(i for i, pairs in enumerate(held) if any(other == key for other, _ in pairs))
        example = collectives.send(next((one[key] for one in mine if key in one), None), holder)
        like = {path: t for path, t in _leaves(example).items() if isinstance(t, Tensor) and t.is_floating_point()}
        # If the shapes of a parameter's state tensors differ between workers, insert no mean. The caller then reports
        # the missing state as an error (see `_missing`).
        fits = all(_layout(leaves.get(path)) == _layout(t) for leaves, _ in here for path, t in like.items())
        if all(collectives.gather(fits)):
            leaves, factors = [one for one, _ in here], [share for _, share in here]
            entry = _replaced(example, _mean(like, leaves, factors, sum(found), collectives))
            for entries in (first, *mine):
                entries.setdefault(key, copy.deepcopy(entry))


def _layout(value: Any) -> Any:
    return (value.shape, value.is_floating_point()) if isinstance(value, Tensor) else None


def _missing(template: Split, mine: Sequence[Split], collectives: ObjectCollectives) -> Path | None:
    """Return a path (a sequence of keys) at which some worker's saved state does not match `template`, worker 0's
    state: only one of the two has a value there, or the shapes of their tensors differ. Returns None if all states
    match. Collective."""

    def layouts(split: Split) -> dict[Path, Any]:
        return {path: _layout(value) for path, value in {**split.equal, **split.means}.items()}

    expected = layouts(template)
    here = [
        path
        for found in map(layouts, mine)
        for path in (*expected, *found)
        if path not in expected or path not in found or found[path] != expected[path]
    ]
    return next((first for first in collectives.gather(here[0] if here else None) if first is not None), None)


def _different(template: Split, mine: Sequence[Split], collectives: ObjectCollectives) -> list[Path]:
    """Return the paths (sequences of keys) in `template.equal` at which some worker's saved value differs from that of
    `template`, worker 0's state; collective."""
    paths = list(template.equal)
    here = {
        i
        for i, path in enumerate(paths)
        for one in mine
        if path not in one.equal or fingerprint(one.equal[path]) != fingerprint(template.equal[path])
    }
    return [paths[i] for i in sorted({i for found in collectives.gather(sorted(here)) for i in found})]


def _split(part: Any, state: Mapping[str, Any]) -> Split:
    if isinstance(part, Exchanging):
        return Split(*part.saved_state.split(_leaves(state)))
    return Split(equal=_leaves(state))


def _leaves(value: Any, path: Path = ()) -> dict[Path, Any]:
    if isinstance(value, Mapping):
        return {p: leaf for key, inner in value.items() for p, leaf in _leaves(inner, (*path, key)).items()}
    if isinstance(value, list | tuple):
        return {p: leaf for i, inner in enumerate(value) for p, leaf in _leaves(inner, (*path, i)).items()}
    return {path: value}
