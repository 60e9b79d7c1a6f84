"""What every framework's callback does with a hook: attach it, read its measures, keep it with a checkpoint."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.comm.communicator import check_agreement
from packsaddle.comm.group import resolve
from packsaddle.compressors import Compressor
from packsaddle.optim.compression import Compression, Schedule
from packsaddle.optim.ddp import DDPHook, attach


def attach_among_workers(
    model: nn.Module,
    compressor: Compressor | Schedule | Compression,
    optimizers: list[Optimizer],
    **options: Any,
) -> DDPHook | None:
    """`packsaddle.attach`; or a warning and None where there is one worker, in DistributedDataParallel or not.

    The hook is given the optimizer; where there are several, it only keeps each from stepping with gradients that are
    not finite. Raises ValueError for an escape check then, and what `register_ddp_hook` raises.
    """
    if resolve(None).size == 1:
        warnings.warn("packsaddle has nothing to do: there is one worker, and so no exchange", stacklevel=3)
        return None
    if len(optimizers) == 1:
        return attach(model, compressor, optimizer=optimizers[0], **options)
    if options.get("escape") is not None:
        raise ValueError(f"escape needs one optimizer, and the framework has {len(optimizers)}")
    hook = attach(model, compressor, **options)
    if hook is not None:
        for optimizer in optimizers:
            hook.protect(optimizer)
    return hook


def monitored(compressor: Compressor | Schedule | Compression, every: int) -> Compression:
    """Return how to compress, the contraction measured every so many steps; a `Compression` as it is."""
    return compressor if isinstance(compressor, Compression) else Compression(compressor, monitor_every=every)


def measures(hook: DDPHook) -> dict[str, float]:
    """Return a hook's numbers so far, for a logger: bytes on this worker's wire, steps, contraction (docs/metrics.md).

    `mu` is there once `monitor_every` has measured it.
    """
    steps, sent, alone = hook.steps, hook.ledger.total.sent, hook.uncompressed.sent
    found = {
        "steps": float(steps),
        "skipped": float(hook.skipped),
        "resets": float(len(hook.resets)),
        "sent": float(sent),
        "received": float(hook.ledger.total.received),
        "sent_in_step": float(sum(b.sent for b in hook.ledger.at(steps - 1).values())),
        "reduction": alone / sent if sent else 1.0,
    }
    return found if hook.contraction is None else found | {"mu": hook.contraction}


def save_state(hook: DDPHook, folder: str | Path) -> None:
    """Write this worker's `hook.state_dict()` to its own file in a folder, atomically.

    Every worker calls it, and nothing travels: error memories differ, are as large as the model, and are where they
    are needed when the run goes on.
    """
    write_whole(Path(folder) / _name(hook), partial(torch.save, hook.state_dict()))


def load_state(hook: DDPHook, folder: str | Path) -> bool:
    """Restore what `save_state` wrote; collective. Without any file, warn, leave the hook as it is and return False.

    Raises ValueError, with no hook changed, if only some workers have a file, if these are of different steps, or if
    they do not fit (another number of workers, another seed, ...).
    """
    path = Path(folder) / _name(hook)
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    found = {"steps of the saved state": "no file" if state is None else state["steps"]}
    check_agreement(hook.channel, found, hook.device)
    if state is None:
        warnings.warn(f"{folder} has no state of packsaddle's hook: its error memory starts at zero", stacklevel=2)
        return False
    hook.load_state_dict(state)
    return True


def _name(hook: DDPHook) -> str:
    return f"packsaddle-{hook.channel.group.rank}.pt"


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers among some values, those of mappings inside by name/name."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found
