"""Checkpoints: written atomically by each worker, and restored on the same or another number of workers.

Start with `save_load`. `files` defines the files of one worker, `parts` the objects that can be saved, `reshard` the
conversion to another number of workers. `atomic_files` also writes other files of the package.
"""
