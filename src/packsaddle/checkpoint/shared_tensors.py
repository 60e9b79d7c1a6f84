"""What a checkpoint's workers have in common: tensors that are equal to worker 0's, bit for bit, which writes them.

Equal is what has the same sha256 of dtype, shape and bytes: of a DistributedDataParallel model the weights, of a torch
optimizer its state. Each worker's file leaves out those tensors and says where they go; with the fingerprint of all of
them in its manifest, so that a file of worker 0 that is not of the same moment is found out.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Together

Path = tuple[Any, ...]  # keys from the outermost


def fingerprint(value: Any) -> bytes:
    """Return what equal values have in common, and others have not."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(raw.data)
        return digest.digest()
    return repr(value).encode()


def paths_in_common(content: Mapping[str, Any], together: Together) -> tuple[list[Path], str]:
    """Return where this worker has tensors equal to worker 0's, and their common fingerprint; collective.

    Worker 0 writes all that it has itself, so it leaves out none.
    """
    if together.group.size == 1:
        return [], ""
    mine = {path: fingerprint(tensor) for path, tensor in _tensors(content)}
    theirs = together.send(mine if together.group.rank == 0 else None, 0)
    paths = [] if together.group.rank == 0 else [path for path, found in mine.items() if theirs.get(path) == found]
    return paths, _together(mine[path] for path in paths) if paths else ""


def without(content: Any, paths: list[Path]) -> Any:
    """Return a copy of nested dictionaries, lists and tuples with None at these places."""
    return _replaced(content, dict.fromkeys(paths))


def filled(content: Any, paths: list[Path], whole: Any) -> tuple[Any, str]:
    """Return a copy with what `whole` has at these places, and the fingerprint of that. Raises LookupError, TypeError.

    Tensors are copied, so that two workers' contents share no memory.
    """
    found = {path: _at(whole, path) for path in paths}
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise TypeError("not a tensor")
    said = _together(fingerprint(tensor) for tensor in found.values()) if paths else ""
    return _replaced(content, {path: tensor.clone() for path, tensor in found.items()}), said


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The plain tensors with elements, and their places; those that are sharded or compressed stay each worker's."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _tensors(inner, (*path, i))
    elif _is_plain(value) and value.numel():
        yield path, value


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized


def _together(fingerprints: Iterator[bytes]) -> str:
    return hashlib.sha256(b"".join(fingerprints)).hexdigest()


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _replaced(value: Any, by: Mapping[Path, Any], path: Path = ()) -> Any:
    if path in by:
        return by[path]
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)  # a module's state has an attribute with the versions of its parts
        copied.update({key: _replaced(inner, by, (*path, key)) for key, inner in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(_replaced(inner, by, (*path, i)) for i, inner in enumerate(value))
    return value
