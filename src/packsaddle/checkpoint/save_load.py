"""The functions `save_checkpoint` and `load_checkpoint`. The latter loads the newest step for which the files of all
workers are intact."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from packsaddle.checkpoint.files import CheckpointError, DamagedError, Manifest, plain
from packsaddle.checkpoint.own_state import own_state
from packsaddle.checkpoint.parts import (
    Parts,
    check_fit,
    check_names,
    check_parts,
    check_shapes,
    device_of,
    load_all,
    modules,
    run_on_all,
    shapes,
)
from packsaddle.checkpoint.reshard import resharded
from packsaddle.checkpoint.saves import (
    Content,
    Found,
    Save,
    agreed,
    find,
    proposed,
    remove,
    saves_in,
    set_aside_all,
    write_save,
    writing,
)
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.comm.failures import names_call
from packsaddle.comm.group import Group, ProcessGroup, resolve

_STEPS = r"step-\d{8,18}"  # names of saves in a checkpoint folder


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was loaded: its step, the user's `extra` state, and the number of workers that saved it."""

    step: int  # number of the step after which the checkpoint was saved
    extra: dict[str, Any]  # further state of the run, as passed to `save_checkpoint`
    workers: int  # number of workers that saved the checkpoint
    notes: tuple[str, ...] = field(default=(), repr=False)  # warnings for the user, one line each


@names_call("save_checkpoint")
@own_state()
def save_checkpoint(
    folder: str | Path,
    parts: Parts,
    *,
    step: int,
    keep: int = 2,
    extra: Mapping[str, Any] | None = None,
    process_group: Group | ProcessGroup | None = None,
) -> Path:
    """Write this worker's files of a step to FOLDER/step-STEP/, and remove all but the `keep` newest steps.

    Collective: every worker calls it between the same two steps. Workers may use one shared folder or a folder each.
    If the folder has the step already, its files are not overwritten: the new folder is step-STEP-2, and so on. Earlier
    steps, and earlier saves of this step, are removed only after all workers have written this one, so whenever
    processes are killed, `load_checkpoint` finds a save whose files are all of one call. Returns the step's folder.

    `parts` maps names to objects with a state_dict and a load_state_dict; `extra` is further state of the run, which
    consists of tensors and plain types. `process_group` is the group of the workers; by default it is torch's default
    group if there is one, else this process alone.

    Raises CheckpointError on every worker, with earlier saves unchanged, if a worker cannot write its files; the
    message names the worker and the reason. Also raises CheckpointError if `keep` is below 2 or `step` below 0, if
    `step` differs between workers, if a state has values other than tensors and plain types, or if the folder has
    checkpoints of later steps, since `load_checkpoint` would load one of these instead.

    >>> import tempfile
    >>> import torch
    >>> import packsaddle
    >>> model = torch.nn.Linear(64, 64)
    >>> opt = packsaddle.CompressedSGD(model.parameters(), 0.1)
    >>> folder = tempfile.mkdtemp()
    >>> packsaddle.save_checkpoint(folder, {"model": model, "optimizer": opt}, step=10).name
    'step-00000010'
    >>> packsaddle.load_checkpoint(folder, {"model": model, "optimizer": opt}).step
    10
    """
    folder, group = Path(folder), resolve(process_group)
    check_parts(parts, "saves a checkpoint")
    collectives = ObjectCollectives(group, device_of(parts))

    # Agree on the step, and on the folder and the identity of the new save.
    proposal = run_on_all(collectives, partial(_proposed, folder, step, keep))
    steps, proposals = zip(*collectives.gather((step, proposal)), strict=True)
    _check_same_step(steps)
    save, identity = agreed(folder, _name(step), proposals)
    content = run_on_all(collectives, partial(_content, folder, parts, dict(extra or {}), step))

    # Write the save on all workers or on none. Then remove the oldest steps.
    module_shapes = {name: shapes(parts[name].state_dict()) for name in modules(parts)}
    write_save(save, identity, content, collectives, step=step, shapes=module_shapes)
    run_on_all(collectives, partial(writing, save.path, partial(_rotate, folder, keep)))
    return save.path


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(save: Save) -> int:
    return int(save.name.removeprefix("step-"))


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a save in a checkpoint folder, in ascending order, except saves that were set aside
    (renamed) as unusable."""
    return sorted({_step(save) for save in saves_in(folder, _STEPS) if not save.aside})


def _rotate(folder: Path, keep: int) -> None:
    """Remove from a checkpoint folder the saves of all steps that are older than the `keep` newest steps."""
    oldest = steps_in(folder)[-keep:][0]
    for save in saves_in(folder, _STEPS):
        if _step(save) < oldest:
            remove(save)


def _proposed(folder: Path, step: int, keep: int) -> tuple[int, str]:
    """Check the numbers that were passed to `save_checkpoint`, and return this worker's proposal for the new save."""
    _check_numbers(step, keep)
    return proposed(folder, _name(step))


def _check_numbers(step: int, keep: int) -> None:
    if keep < 2:  # while one step is being written, the previous step must remain
        raise CheckpointError(f"keep must be at least 2 checkpoints, got {keep}")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step must be an integer of 0 or more, got {step!r}")


def _check_same_step(steps: Sequence[int]) -> None:
    """Raise CheckpointError if the workers' steps, given by rank, differ. Files of different steps are not one
    checkpoint."""
    for worker, other in enumerate(steps):
        if other != steps[0]:
            raise CheckpointError(
                f"step must be equal on all workers, got {steps[0]} on worker 0 and {other} on worker {worker}: if "
                f"workers make different numbers of steps, save after a step for which local.exchanging is true, with "
                f"step=local.position"
            )


def _content(folder: Path, parts: Parts, extra: dict[str, Any], step: int) -> Content:
    """Return the content of this worker's file: the states of `parts`, and `extra`. Raises CheckpointError if they
    cannot be saved in `folder` as step `step`."""
    states = {name: plain(part.state_dict(), name) for name, part in parts.items()}
    extra = plain(extra, "extra")

    # Later steps in the folder belong to another run, and would be loaded in place of this step.
    later = [s for s in steps_in(folder) if s > step]
    if later:
        raise CheckpointError(
            f"{folder} has a checkpoint of step {later[-1]}, after this one of step {step}: load it, or save to "
            f"another folder"
        )
    return {"parts": states, "extra": extra}


def load_checkpoint(
    folder: str | Path, parts: Parts, *, process_group: Group | ProcessGroup | None = None
) -> Checkpoint | None:
    """Restore the newest step in `folder` with intact files of every worker; collective.

    On the same number of workers, training continues bitwise identically. If the number of workers has changed, each
    worker loads the mean of the saved error memories, with a warning. If parameters and optimizer states differ between
    workers, as with `LocalUpdates`, each worker also loads their means. Newer, damaged steps are renamed to
    step-STEP.unusable, with a warning. Returns None if the folder has no step, or has only one step, whose save was
    interrupted. See `save_checkpoint` for `parts` and `process_group`.

    Raises CheckpointError, on every worker and with all parts unchanged, if no step is intact, or if the saved state of
    a part cannot be loaded. For example, the state may be of a different model or seed, or may not be convertible to
    this number of workers.

    >>> import tempfile
    >>> import torch
    >>> import packsaddle
    >>> model = torch.nn.Linear(64, 64)
    >>> folder = tempfile.mkdtemp()
    >>> packsaddle.load_checkpoint(folder, {"model": model}) is None
    True
    >>> _ = packsaddle.save_checkpoint(folder, {"model": model}, step=10, extra={"epoch": 2})
    >>> packsaddle.load_checkpoint(folder, {"model": model}).extra
    {'epoch': 2}
    """
    found = restore(folder, parts, process_group=process_group)
    if found is None:
        return None
    if resolve(process_group).rank == 0:
        for note in found.notes:
            warnings.warn(note, stacklevel=2)
    return found if found.step >= 0 else None


@names_call("load_checkpoint")
@own_state()
def restore(
    folder: str | Path, parts: Parts, *, process_group: Group | ProcessGroup | None = None
) -> Checkpoint | None:
    """Load a checkpoint as `load_checkpoint` does, but return the warnings in `Checkpoint.notes` instead of issuing
    them. If the folder has only one step, whose save was interrupted, return a `Checkpoint` whose step is -1."""
    folder, group = Path(folder), resolve(process_group)
    check_parts(parts, "loads a checkpoint")
    collectives = ObjectCollectives(group, device_of(parts))
    found = find(folder, _STEPS, collectives, partial(_check_manifest, parts))
    if found.save is not None:
        return _load(found, parts, collectives)

    # A single step whose save was interrupted is set aside: the run ended during its first save.
    if not found.problems:
        return None
    if not found.interrupted or len({save.name for save in found.problems}) > 1:
        reasons = "; ".join(f"{_shown(save)}: {problem}" for save, problem in found.problems.items())
        raise CheckpointError(f"{folder} has no intact checkpoint: {reasons}")
    run_on_all(collectives, partial(set_aside_all, found.problems))
    return Checkpoint(-1, {}, group.size, _notes(found))


def _check_manifest(parts: Parts, save: Save, manifest: Manifest) -> None:
    """Raise DamagedError if a manifest is of another step than its folder, and CheckpointError if the modules among
    `parts` have other shapes."""
    if manifest.step != _step(save):
        raise DamagedError(f"{save.path}/worker-{manifest.rank}.json is of step {manifest.step}")
    for name in modules(parts):
        if name in manifest.shapes:
            check_shapes(name, manifest.shapes[name], shapes(parts[name].state_dict()))


def _load(found: Found, parts: Parts, collectives: ObjectCollectives) -> Checkpoint:
    """Load the save that was found into `parts`, converted to this number of workers; collective. Newer saves, which
    are not whole, are set aside."""
    assert found.save is not None
    workers, size, step, notes = len(found.holders), collectives.group.size, _step(found.save), _notes(found)
    if workers == size:
        content = found.own(collectives)
    else:
        content = found.of_rank(0, collectives)
        run_on_all(collectives, lambda: check_names(parts, content["parts"]))
        mine = [of_worker["parts"] for of_worker in found.contents.values()]
        content["parts"] = resharded(parts, content["parts"], mine, workers, collectives)
        notes += (
            f"the checkpoint of step {step} was saved by {workers} worker{'s' * (workers > 1)} and is loaded by "
            f"{size}: each loads the mean of parameters, optimizer states and error memories",
        )
    run_on_all(collectives, lambda: check_fit(parts, content["parts"]))
    run_on_all(collectives, partial(set_aside_all, found.problems))
    load_all(parts, content["parts"], collectives)
    return Checkpoint(step, content["extra"], workers, notes)


def _notes(found: Found) -> tuple[str, ...]:
    return tuple(
        f"the checkpoint of {_shown(save)} is incomplete or damaged, and is set aside: {problem}"
        for save, problem in found.problems.items()
    )


def _shown(save: Save) -> str:
    return f"step {_step(save)}" + f" in {save.path.name}" * (save.number > 1)
