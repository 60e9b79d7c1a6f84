"""Frameworks that make the DistributedDataParallel themselves; what they need of the exchange, and a module for each.

`packsaddle.attach` finds the model in what any of them made; `integrations.lightning` and `integrations.huggingface`
have callbacks that also log and save. Those modules import their framework; this one imports none.
"""

from packsaddle.integrations.callbacks import WorkerState, load_state, measures, save_state
from packsaddle.local.joined import JoinedOptimizer

__all__ = ["JoinedOptimizer", "WorkerState", "load_state", "measures", "save_state"]
