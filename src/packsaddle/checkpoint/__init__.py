"""Checkpoints: written atomically by each worker, and restored on the same or another number of workers.

Start with `save_load`. `files` defines the files of one worker, `parts` the objects that can be saved, `reshard` the
conversion to another number of workers. Run folders also use `atomic_files` and the lock of `file_lock`.
"""
