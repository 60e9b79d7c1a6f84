"""A save: the files that all workers write together. It is loaded whole or not at all.

    DIR/step-00001200/worker-3.pt      a file of the first save of step 1200
    DIR/step-00001200-2/worker-3.pt    a file of the second save of step 1200

A save never overwrites the files of an earlier one: if the same step is saved again, the new save gets the next number.
Worker 0 draws an identity for each save at random, which the manifests of all workers contain. A save is whole if there
are manifests of all its workers with one identity. It becomes whole when the last worker renames its manifest, and only
then are earlier saves of the same name removed. So there is a whole save at every moment, with one shared disk as well
as with a disk for each worker.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from packsaddle.checkpoint.atomic_files import set_aside
from packsaddle.checkpoint.files import (
    CheckpointError,
    DamagedError,
    Manifest,
    ranks_in,
    read_content,
    read_manifest,
    write_files,
)
from packsaddle.checkpoint.parts import T, run_on_all
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.version import __version__

Content = dict[str, Any]  # content of one worker's tensor file
_OURS = re.compile(r"worker-\d+\.(pt|json)(\.partial)?")


@dataclass(frozen=True)
class Save:
    """A save in a folder: its name, and its number among the saves of the same name."""

    folder: Path = field(repr=False)
    name: str
    number: int
    aside: str = ""  # suffix of a save that was set aside (renamed) as incomplete or damaged

    @property
    def path(self) -> Path:
        """The folder that contains the files of this save."""
        number = "" if self.number == 1 else f"-{self.number}"
        return self.folder / f"{self.name}{number}{self.aside}"

    @property
    def age(self) -> tuple[int, str, int]:
        """A key that sorts saves from the oldest to the newest. Names end with numbers of at least eight digits."""
        return len(self.name), self.name, self.number


def saves_in(folder: Path, names: str) -> list[Save]:
    """Return the saves in a folder whose names match the regular expression `names`, from the oldest to the newest.
    Saves that were set aside are included."""
    return _saves(folder, names, (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ())


def _saves(folder: Path, names: str, of_folders: Iterable[str]) -> list[Save]:
    form = re.compile(rf"({names})(?:-(\d{{1,7}}))?(\.unusable(?:-\d+)?)?")
    found = map(form.fullmatch, of_folders)
    saves = [Save(folder, match[1], int(match[2] or 1), match[3] or "") for match in found if match]
    return sorted(saves, key=lambda save: save.age)


# Writing.


def proposed(folder: Path, name: str) -> tuple[int, str]:
    """Return what this worker proposes for a new save: its number among the saves of this name in the worker's folder,
    and a random identity. Raises CheckpointError if the folder cannot be read."""
    saves = writing(folder / name, lambda: saves_in(folder, re.escape(name)))
    return 1 + max((save.number for save in saves if not save.aside), default=0), secrets.token_hex(8)


def agreed(folder: Path, name: str, proposals: Sequence[tuple[int, str]]) -> tuple[Save, str]:
    """Return a new save, and its identity, from what each worker has `proposed`, by rank: the largest number, so that
    the save is the newest in each worker's folder, and the identity that worker 0 has drawn."""
    return Save(folder, name, max(number for number, _ in proposals)), proposals[0][1]


def write_save(
    save: Save,
    identity: str,
    content: Content,
    collectives: ObjectCollectives,
    *,
    step: int,
    shapes: Mapping[str, Mapping[str, str]],
) -> None:
    """Write this worker's files of a new save, and then remove earlier saves of the same name; collective.

    Args:
        save, identity: the new save and its identity, as returned by `agreed`.
        content: this worker's state.
        collectives: the collectives of the workers.
        step: the step after which the state was collected.
        shapes: dtype and shape of each tensor that must be equal when the state is loaded, by part and name.

    Raises CheckpointError on every worker if a worker cannot write its files. Earlier saves are then unchanged, and the
    new one is removed.
    """
    group = collectives.group
    said = {"identity": identity, "step": step, "rank": group.rank, "workers": group.size, "packsaddle": __version__}
    write = partial(write_files, save.path, content, **said, shapes=shapes)
    try:
        run_on_all(collectives, partial(writing, save.path, write))
    except CheckpointError:
        remove(save)
        raise
    with suppress(OSError):
        for other in saves_in(save.folder, re.escape(save.name)):
            if other.number < save.number and not other.aside:
                remove(other)


def writing(target: Path, work: Callable[[], T]) -> T:
    """Call `work`, a part of writing a save to the folder `target`, and return its result. Raises CheckpointError in
    place of an OSError."""
    try:
        return work()
    except OSError as error:
        raise CheckpointError(f"checkpoint {target} cannot be written: {error.strerror}") from None


def remove(save: Save) -> None:
    """Remove the files of a save, manifests first, so that a partly removed save is never loaded."""
    try:
        for file in sorted(save.path.iterdir(), key=lambda p: p.suffix != ".json"):
            if _OURS.fullmatch(file.name):
                file.unlink(missing_ok=True)
        save.path.rmdir()
    except OSError:  # another worker has removed the folder, or it also contains files of the user
        pass


# Reading.


@dataclass(frozen=True)
class Found:
    """The newest whole save, and the reasons why newer saves are not whole."""

    save: Save | None  # None: no save is whole
    contents: Mapping[int, Content]  # the files that this worker has read, by rank of the worker that wrote them
    holders: Sequence[int]  # for each worker that wrote the save, the rank of the current worker that has read its file
    problems: Mapping[Save, str]  # for each newer save, from the newest on, why it is not whole
    interrupted: bool  # True if interrupted saves explain all problems

    def of_rank(self, rank: int, collectives: ObjectCollectives) -> Content:
        """Return the content that worker `rank` has saved; collective."""
        content: Content = collectives.send(self.contents.get(rank), self.holders[rank])
        return content

    def own(self, collectives: ObjectCollectives) -> Content:
        """Return the content that the worker of this rank has saved; collective. If only another worker can read the
        file, that worker sends the content."""
        contents = dict(self.contents)
        for rank, holder in enumerate(self.holders):
            if holder != rank:
                contents[rank] = self.of_rank(rank, collectives)
        return contents[collectives.group.rank]


def find(
    folder: Path,
    names: str,
    collectives: ObjectCollectives,
    check: Callable[[Save, Manifest], None] = lambda save, manifest: None,
) -> Found:
    """Read the newest whole save in the workers' folders; collective. Each file is read by one worker.

    Args:
        folder: this worker's folder; workers may share one.
        names: regular expression of the saves' names.
        collectives: the collectives of the current workers. Another number of workers may have written the save.
        check: called with the manifest of each file that this worker reads. If it raises DamagedError, the save is not
            whole.

    Raises CheckpointError on every worker if `check` raises another CheckpointError.
    """
    surveys = collectives.gather(_survey(folder, names))
    problems: dict[Save, str] = {}
    interrupted = True
    for save in reversed(_saves(folder, names, {name for survey in surveys for name in survey})):
        identity, holders, problem, is_interrupted = _judge([survey.get(save.path.name, {}) for survey in surveys])
        if not problem:
            mine = [rank for rank, holder in enumerate(holders) if holder == collectives.group.rank]
            try:
                contents = run_on_all(collectives, partial(_read, save, identity, mine, check))
            except DamagedError as error:
                problem = str(error)
            else:
                return Found(save, contents, holders, problems, interrupted)
        problems[save] = problem
        interrupted = interrupted and is_interrupted
    return Found(None, {}, [], problems, interrupted)


def _survey(folder: Path, names: str) -> dict[str, dict[str, Any]]:
    """Read all manifests in a folder. Returns a dict for each save that was not set aside, by the name of its folder.

    A key of this dict is the identity and the number of workers in a manifest, as IDENTITY/WORKERS, and its value is
    the list of the ranks with such a manifest. The value of the key "" is the list of the errors of manifests that
    cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for save in saves_in(folder, names):
        if save.aside:
            continue
        found[save.path.name] = of_save = {"": list[Any]()}
        for rank in ranks_in(save.path):
            try:
                manifest = read_manifest(save.path, rank)
            except CheckpointError as error:
                of_save[""].append(str(error))
            else:
                of_save.setdefault(f"{manifest.identity}/{manifest.workers}", []).append(rank)
    return found


def _judge(surveys: Sequence[Mapping[str, Any]]) -> tuple[str, list[int], str, bool]:
    """Determine if a save is whole. Returns a tuple (identity, holders, problem, interrupted).

    `surveys` contains, for each current worker, the result of `_survey` for the save. If the save is whole, `problem`
    is "", and holders[i] is the rank of the current worker that reads the files of worker i. This rank is i modulo the
    number of current workers if the worker of that rank has the files. Otherwise it is the lowest rank that has them.
    If the save is not whole, `problem` is the reason, and `interrupted` is True if an interrupted save explains it.
    """
    errors = [error for survey in surveys for error in survey.get("", [])]
    owners: dict[str, dict[int, list[int]]] = {}  # by key of the survey and writer's rank: ranks that have its files
    for here, survey in enumerate(surveys):
        for key, ranks in survey.items():
            for rank in ranks if key else ():
                owners.setdefault(key, {}).setdefault(rank, []).append(here)

    # A save is whole if the manifests of all its workers have one identity.
    for key, of_save in owners.items():
        identity, _, workers = key.partition("/")
        if of_save.keys() == set(range(int(workers))):
            near = {i: [r for r in ranks if (r - i) % len(surveys) == 0] for i, ranks in of_save.items()}
            return identity, [(near[i] or of_save[i])[0] for i in sorted(of_save)], "", False

    # Report damaged files rather than missing files, since an interrupted save explains only missing files.
    if errors:
        return "", [], errors[0], False
    if not owners:
        return "", [], "the files of all workers are missing", True
    key, of_save = max(owners.items(), key=lambda item: len(item[1]))
    workers = key.partition("/")[2]
    missing = min(set(range(int(workers))) - of_save.keys())
    is_other = any(missing in ranks for ranks in owners.values())
    problem = f"the files of worker {missing} of {workers} are {'of another save' if is_other else 'missing'}"
    return "", [], problem, not is_other


def _read(
    save: Save, identity: str, ranks: Sequence[int], check: Callable[[Save, Manifest], None]
) -> dict[int, Content]:
    found = {}
    for rank in ranks:
        manifest = read_manifest(save.path, rank)
        if manifest.identity != identity:
            raise DamagedError(f"{save.path} is being written by another run")
        check(save, manifest)
        found[rank] = read_content(save.path, manifest)
    return found


def set_aside_all(saves: Iterable[Save]) -> None:
    """Rename the folders of saves that were found incomplete or damaged, so that they are not read again. Raises
    CheckpointError if a folder cannot be renamed."""
    for save in saves:
        try:
            set_aside(save.path)
        except FileNotFoundError:  # another worker has renamed the folder, or this worker's folder has no such save
            pass
        except OSError as error:
            raise CheckpointError(f"{save.path} cannot be set aside: {error.strerror}") from None
