"""Callbacks and functions for frameworks that construct the DistributedDataParallel model themselves.

`packsaddle.attach` works on the wrapped model of any framework. The callbacks in `integrations.lightning` and
`integrations.huggingface` also log metrics and save state. Only these two modules import the framework that they are
for.
"""

from packsaddle.integrations.callbacks import WorkerState, load_state, measures, save_state
from packsaddle.integrations.joined import JoinedOptimizer

__all__ = ["JoinedOptimizer", "WorkerState", "load_state", "measures", "save_state"]
