"""Data and networks of the experiments: images, text, their split over workers, models, batch normalisation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packsaddle.experiments.tasks.images import load_data
    from packsaddle.experiments.tasks.models import Task, make_task, mnist_autoencoder, task_loss
    from packsaddle.experiments.tasks.sharding import Batches, shard

__all__ = [
    "Batches",
    "Task",
    "load_data",
    "make_task",
    "mnist_autoencoder",
    "shard",
    "task_loss",
]
_FILES = {
    "images": "load_data",
    "models": "Task make_task mnist_autoencoder task_loss",
    "sharding": "Batches shard",
}
_HOMES = {name: file for file, names in _FILES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name's file when the name is first asked for: the command line needs few of them at its start."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
