"""Checkpoints: files that are whole or not there, saved by each worker and restored on any number of workers.

Read `save_load` first (`save_checkpoint`, `load_checkpoint`); `files` has the format of one worker's files, `parts`
what may be saved, `reshard` how states of W workers become those of another number. `atomic_files` is used by all that
writes files.
"""

from packsaddle.checkpoint.files import CheckpointError
from packsaddle.checkpoint.save_load import Checkpoint, load_checkpoint, save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load_checkpoint",
    "save_checkpoint",
]
