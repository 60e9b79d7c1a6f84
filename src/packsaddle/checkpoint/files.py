"""The two files that a worker writes in a save: its tensors, and a manifest to detect damage.

    SAVE/worker-3.pt      tensors and plain types (torch.save)
    SAVE/worker-3.json    the manifest: the save's identity, and the size and sha256 of that file

The manifest is written last, so the tensor file is complete if there is a manifest. Loading never executes code from a
file: the manifest is JSON, and tensors are loaded with weights_only=True after their sha256 was verified.
"""

import copy
import hashlib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packsaddle.checkpoint.atomic_files import sync_folder, write_whole
from packsaddle.errors import ConfigError

FORMAT = 5  # version of the file format
_MANIFEST = re.compile(r"worker-(\d{1,6})\.json")
_NUMBERS = ("step", "rank", "workers", "bytes")
_LARGEST_MANIFEST = 1 << 26  # maximum bytes of a manifest: ten times the size for 100,000 parameter tensors
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class CheckpointError(ConfigError):
    """Raised if a checkpoint cannot be written or read, or does not fit the model, the optimizer or another part; the
    message is one line."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is corrupt or unreadable."""


@dataclass(frozen=True)
class Manifest:
    """Metadata of the tensor file that one worker wrote in a save."""

    identity: str  # identity of the save, which the manifests of all its workers have
    step: int
    rank: int
    workers: int
    bytes: int
    sha256: str
    shapes: Mapping[str, Mapping[str, str]]  # dtype and shape of each tensor, by module name and tensor name
    packsaddle: str
    torch: str
    format: int = FORMAT


def ranks_in(save: Path) -> list[int]:
    """Return the ranks of the workers whose manifests are in a save's folder, in ascending order."""
    found = [_MANIFEST.fullmatch(p.name) for p in save.iterdir()] if save.is_dir() else []
    return sorted(int(m[1]) for m in found if m)


def write_files(save: Path, content: Mapping[str, Any], **said: Any) -> None:
    """Write the tensor file of one worker, and then the manifest of that file.

    Args:
        save: the save's folder, which is created if it does not exist.
        content: the worker's state, written to the tensor file.
        said: fields of the manifest. The field `rank` also determines the names of both files.

    Raises OSError if a file cannot be written.
    """
    base = save / f"worker-{said['rank']}"
    digest = hashlib.sha256()
    size = write_whole(base.with_suffix(".pt"), lambda file: torch.save(content, file), digest)
    manifest = {"format": FORMAT, **said, "bytes": size, "sha256": digest.hexdigest(), "torch": torch.__version__}
    text = json.dumps(manifest, indent=1).encode() + b"\n"
    write_whole(base.with_suffix(".json"), lambda file: file.write(text))
    sync_folder(save.parent)  # makes the save's folder durable, before an earlier save is removed


def read_manifest(save: Path, rank: int) -> Manifest:
    """Read and validate the manifest of worker `rank` in a save's folder. Raises DamagedError if the manifest is
    damaged or unreadable, and CheckpointError if the manifest's format version is not `FORMAT`."""
    path = save / f"worker-{rank}.json"
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_MANIFEST)
        found = dict(json.loads(text))
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise DamagedError(f"{path} is damaged: not a manifest") from None
    if found.get("format") != FORMAT:  # check this before the keys, which depend on the format
        raise CheckpointError(
            f"{path} has format {found.get('format')}, written by packsaddle {found.get('packsaddle')}; "
            f"this one reads format {FORMAT}: use that version, or start again in another folder"
        )
    if found.keys() != {f.name for f in fields(Manifest)} or not all(type(found[n]) is int for n in _NUMBERS):
        raise DamagedError(f"{path} is damaged: not a manifest")
    manifest = Manifest(**found)
    if manifest.rank != rank:
        raise DamagedError(f"{path} is of worker {manifest.rank}")
    return manifest


def read_content(save: Path, manifest: Manifest) -> dict[str, Any]:
    """Load a worker's tensor file in a save's folder to the CPU. Raises DamagedError unless the size and sha256 of the
    file match `manifest`."""
    path = save / f"worker-{manifest.rank}.pt"

    # Only bytes with the manifest's size and sha256 reach torch.load.
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size != manifest.bytes:
                raise DamagedError(f"{path} is damaged: {size} bytes, not {manifest.bytes}")
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.sha256:
                raise DamagedError(f"{path} is damaged: its sha256 is another")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    except DamagedError:
        raise
    except Exception as error:  # the file is intact, but packsaddle did not write it
        raise DamagedError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} was not made by packsaddle")
    return content


def plain(value: Any, where: str) -> Any:
    """Return a copy of `value`, a nested state to save, in which numpy's scalars are Python's, such as a learning rate
    that was computed with numpy. Tensors are not copied. Raises CheckpointError if the state contains another type that
    torch.load(weights_only=True) rejects; the error calls the value `where`."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in (dict, OrderedDict, Counter):
        copied = copy.copy(value)  # keeps `_metadata` of a module's state_dict
        for key, inner in value.items():
            if not _is_plain_key(key):
                raise CheckpointError(f"{where} has a key {key!r} of type {type(key).__name__}, which is not plain")
            copied[key] = plain(inner, f"{where}[{key!r}]")
        return copied
    if type(value) in (list, tuple, set):
        return type(value)(plain(inner, f"{where}[{i}]") for i, inner in enumerate(value))
    if type(value) not in (Tensor, nn.Parameter, *_PLAIN, *torch.serialization.get_safe_globals()):
        hint = ": make it a dict" if isinstance(value, Mapping) else ""
        raise CheckpointError(
            f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, lists and "
            f"dictionaries{hint}"
        )
    return value


def _is_plain_key(key: Any) -> bool:
    return all(map(_is_plain_key, key)) if type(key) is tuple else type(key) in _PLAIN
