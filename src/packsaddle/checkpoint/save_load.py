"""The functions `save_checkpoint` and `load_checkpoint`. The latter loads the newest step for which the files of all
workers are intact."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from packsaddle.checkpoint.files import (
    CheckpointError,
    DamagedError,
    plain,
    ranks_in,
    read_content,
    read_manifest,
    remove,
    rotate,
    set_aside_after,
    step_folder,
    steps_in,
    write_files,
)
from packsaddle.checkpoint.own_state import own_state
from packsaddle.checkpoint.parts import (
    Parts,
    T,
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
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.comm.failures import names_call
from packsaddle.comm.group import Group, ProcessGroup, resolve
from packsaddle.version import __version__

Content = dict[str, Any]  # content of one worker's tensor file


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
    Earlier steps are removed only after all workers have written this one. Returns the step's folder.

    `parts` maps names to objects with a state_dict and a load_state_dict; `extra` is further state of the run, which
    consists of tensors and plain types. `process_group` is the group of the workers; by default it is torch's default
    group if there is one, else this process alone.

    Raises CheckpointError on every worker, with earlier steps unchanged, if a worker cannot write its files; the
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
    run_on_all(collectives, partial(_check_numbers, step, keep))
    _check_same_step(step, collectives)
    # Check if the step's folder exists before the next collective: after it, another worker may create the folder.
    target = step_folder(folder, step)
    is_new = not target.exists()
    content = run_on_all(collectives, partial(_content, folder, parts, dict(extra or {}), step))

    # Remove the step if a worker could not write it. If all workers could, remove earlier steps.
    identity = {"step": step, "rank": group.rank, "workers": group.size, "packsaddle": __version__}
    module_shapes = {name: shapes(parts[name].state_dict()) for name in modules(parts)}
    write = partial(write_files, folder, content, **identity, shapes=module_shapes)
    try:
        run_on_all(collectives, partial(_write, target, write))
    except CheckpointError:
        if is_new:  # otherwise the folder may contain a complete earlier save of this step, so keep it
            remove(target)
        raise
    run_on_all(collectives, partial(_write, target, partial(rotate, folder, keep)))
    return target


def _check_numbers(step: int, keep: int) -> None:
    if keep < 2:  # while one step is being written, the previous step must remain
        raise CheckpointError(f"keep must be at least 2 checkpoints, got {keep}")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step must be an integer of 0 or more, got {step!r}")


def _check_same_step(step: int, collectives: ObjectCollectives) -> None:
    """Raise CheckpointError on all workers if their values of `step` differ; collective. Files of different steps are
    not one checkpoint."""
    steps = collectives.gather(step)
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
    later = [s for s in _write(step_folder(folder, step), partial(steps_in, folder)) if s > step]
    if later:
        raise CheckpointError(
            f"{folder} has a checkpoint of step {later[-1]}, after this one of step {step}: load it, or save to "
            f"another folder"
        )
    return {"parts": states, "extra": extra}


def _write(target: Path, work: Callable[[], T]) -> T:
    """Call `work`, a part of writing the step's folder `target`, and return its result. Raises CheckpointError in place
    of an OSError."""
    try:
        return work()
    except OSError as error:
        raise CheckpointError(f"checkpoint {target} cannot be written: {error.strerror}") from None


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
    return _Restoring(folder, parts, ObjectCollectives(group, device_of(parts))).run()


class _Restoring:
    """One call of `restore`: finds the newest intact step and loads it. Every method is collective."""

    def __init__(self, folder: Path, parts: Parts, collectives: ObjectCollectives) -> None:
        self._folder, self._parts, self._collectives = folder, parts, collectives
        self._rank, self._size = collectives.group.rank, collectives.group.size

    def run(self) -> Checkpoint | None:
        surveys_here = self._collectives.gather(_survey(self._folder))
        seen = [{int(step): found for step, found in survey.items()} for survey in surveys_here]
        problems: dict[int, str] = {}  # error message for each unusable step
        damaged = False

        # Find the newest intact step. For each newer step, collect the error that makes it unusable.
        for step in sorted({step for survey in seen for step in survey}, reverse=True):
            surveys = [survey.get(step, {}) for survey in seen]
            workers, problem, unfinished = saved_by(surveys)
            if not problem:
                holders = holders_of(workers, surveys)
                mine = [i for i, holder in enumerate(holders) if holder == self._rank]
                read = partial(_read_files, self._folder, step, mine, self._parts)
                try:
                    contents = run_on_all(self._collectives, read)
                except DamagedError as error:
                    problem = str(error)
                else:
                    return self._load(step, contents, holders, problems)
            problems[step] = problem
            damaged = damaged or not unfinished

        # A single, unfinished step is set aside: the run ended during its first save.
        if not problems:
            return None
        if damaged or len(problems) > 1:
            reasons = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(f"{self._folder} has no intact checkpoint: {reasons}")
        run_on_all(self._collectives, lambda: set_aside_after(self._folder, -1))
        return Checkpoint(-1, {}, self._size, _notes(problems))

    def _load(
        self, step: int, contents: dict[int, Content], holders: list[int], problems: Mapping[int, str]
    ) -> Checkpoint:
        workers, notes = len(holders), _notes(problems)
        if workers == self._size:
            # Load this worker's own file. If only another worker can read the file, receive the content from that
            # worker.
            for i, holder in enumerate(holders):
                if holder != i:
                    sent = self._collectives.send(contents.get(i), holder)
                    if self._rank == i:
                        contents[i] = sent
            content = contents[self._rank]
        else:
            content = self._collectives.send(contents.get(0), holders[0])
            run_on_all(self._collectives, lambda: check_names(self._parts, content["parts"]))
            mine = [of_worker["parts"] for of_worker in contents.values()]
            content["parts"] = resharded(self._parts, content["parts"], mine, workers, self._collectives)
            notes += (
                f"the checkpoint of step {step} was saved by {workers} worker{'s' * (workers > 1)} and is loaded by "
                f"{self._size}: each loads the mean of parameters, optimizer states and error memories",
            )
        run_on_all(self._collectives, lambda: check_fit(self._parts, content["parts"]))
        run_on_all(self._collectives, lambda: set_aside_after(self._folder, step))
        load_all(self._parts, content["parts"], self._collectives)
        return Checkpoint(step, content["extra"], workers, notes)


def _notes(problems: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(
        f"the checkpoint of step {step} is incomplete or damaged, and is set aside: {problem}"
        for step, problem in problems.items()
    )


def _survey(folder: Path) -> dict[int, dict[int, int | str]]:
    """Read all manifests in a checkpoint folder. Returns, by step and rank, the number of workers according to the
    manifest, or the error message if the manifest cannot be read."""
    found: dict[int, dict[int, int | str]] = {}
    for step in steps_in(folder):
        found[step] = {}
        for rank in ranks_in(step_folder(folder, step)):
            try:
                found[step][rank] = read_manifest(folder, step, rank).workers
            except CheckpointError as error:
                found[step][rank] = str(error)
    return found


def saved_by(surveys: list[dict[str, Any]]) -> tuple[int, str, bool]:
    """Determine if a checkpoint of a step is intact. Returns a tuple (workers, error, interrupted).

    `surveys` contains, for each current worker, the result of `_survey` for the step. If the manifests of all workers
    that saved the step are present, the tuple is (the number of these workers, "", False). Otherwise `workers` is 0,
    `error` is the reason, and `interrupted` is True if an interrupted save explains this reason.
    """
    ranks: dict[int, set[int]] = {}
    for survey in surveys:
        for rank, found in survey.items():
            if isinstance(found, int):
                ranks.setdefault(found, set()).add(int(rank))

    # A checkpoint is intact if the manifests of all workers that saved it are present.
    for workers, present in ranks.items():
        if present == set(range(workers)):
            return workers, "", False

    # Report damaged files rather than missing files, since an interrupted save explains only missing files.
    errors = [found for survey in surveys for found in survey.values() if isinstance(found, str)]
    if errors:
        return 0, errors[0], False
    if not ranks:
        return 0, "the files of all workers are missing", True
    workers = min(ranks)
    missing = sorted(set(range(workers)) - ranks[workers])
    return 0, f"the files of worker {missing[0]} of {workers} are missing", True


def holders_of(workers: int, surveys: list[dict[str, Any]]) -> list[int]:
    """Return, for each worker i that saved a step, the rank of the current worker that reads the files of worker i.
    This rank is i modulo the number of current workers if the worker of that rank has the files. Otherwise it is the
    lowest rank that has them."""
    found = []
    for i in range(workers):
        owners = [r for r, survey in enumerate(surveys) if survey.get(str(i)) == workers]
        found.append(next((r for r in owners if r % len(surveys) == i % len(surveys)), owners[0]))
    return found


def _read_files(folder: Path, step: int, ranks: list[int], parts: Parts) -> dict[int, Content]:
    found = {}
    for rank in ranks:
        manifest = read_manifest(folder, step, rank)
        for name in modules(parts):
            if name in manifest.shapes:
                check_shapes(name, manifest.shapes[name], shapes(parts[name].state_dict()))
        content = read_content(folder, manifest)
        if content.keys() != {"parts", "extra"}:
            raise DamagedError(f"{step_folder(folder, step)}/worker-{rank}.pt was not made by save_checkpoint")
        found[rank] = content
    return found
