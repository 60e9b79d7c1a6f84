"""Callbacks and functions for training frameworks that wrap the model in DistributedDataParallel themselves, such as
Lightning and Hugging Face's Trainer.

`packsaddle.attach` attaches a DDP hook to the wrapped model of any framework. The callbacks in `integrations.lightning`
and `integrations.huggingface` also log metrics and save state. Only these two modules import a framework.
"""

from packsaddle.integrations.callbacks import WorkerState, load_state, measures, save_state
from packsaddle.integrations.joined import JoinedOptimizer

__all__ = ["JoinedOptimizer", "WorkerState", "load_state", "measures", "save_state"]
