"""Checkpoints: written atomically by each worker, and restored on any number of workers.

Read `save_load` first (`save_checkpoint`, `load_checkpoint`); `files` defines the format of one worker's files, `parts`
the objects that can be saved, `reshard` the conversion to another number of workers. `atomic_files` is used by all
modules that write files; `file_lock` is a lock between processes.
"""

from packsaddle.checkpoint.files import CheckpointError
from packsaddle.checkpoint.save_load import Checkpoint, load_checkpoint, save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load_checkpoint",
    "save_checkpoint",
]
