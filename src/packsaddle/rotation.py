"""Which steps' files stay in a folder of checkpoints."""

import re
from pathlib import Path

from packsaddle.checkpointfiles import CheckpointError, step_folder, steps_in

_ASIDE = re.compile(r"step-(\d{8,18})\.unusable")
_OURS = re.compile(r"worker-\d+\.(pt|json)(\.partial)?")


def rotate(folder: Path, keep: int) -> None:
    """Remove the files of all but the newest steps.

    The others', too: that this worker saves the newest says that all have saved the one before.
    """
    oldest = steps_in(folder)[-keep:][0]
    aside = [(int(m[1]), p) for p in folder.iterdir() if (m := _ASIDE.fullmatch(p.name))]
    for step, path in [(s, step_folder(folder, s)) for s in steps_in(folder)] + aside:
        if step < oldest:
            remove(path)


def remove(step: Path) -> None:
    """Remove a step's folder, manifests first; other workers may be at it as well."""
    try:
        for file in sorted(step.iterdir(), key=lambda p: p.suffix != ".json"):
            if _OURS.fullmatch(file.name):
                file.unlink(missing_ok=True)
        step.rmdir()
    except OSError:  # another worker was faster, or something else lies in it
        pass


def set_aside(folder: Path, step: int) -> None:
    """Rename what is newer than a step and could not be used, so that it is never taken for this run's."""
    for later in [s for s in steps_in(folder) if s > step]:
        path = step_folder(folder, later)
        aside = path.with_name(path.name + ".unusable")
        try:
            if path.exists() and aside.exists():
                remove(aside)
            path.rename(aside)
        except FileNotFoundError:  # another worker was faster
            pass
        except OSError as error:
            raise CheckpointError(f"{path} cannot be set aside: {error.strerror}") from None


def remove_all(folder: Path) -> None:
    """Remove the files of all steps, when they are not needed any more."""
    for path in [*(step_folder(folder, s) for s in steps_in(folder)), *folder.glob("step-*.unusable")]:
        if path.suffix != ".unusable" or _ASIDE.fullmatch(path.name):
            remove(path)
