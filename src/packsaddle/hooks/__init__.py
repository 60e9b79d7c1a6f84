"""Compressed exchange of gradients in the backward pass, for any optimizer.

- `ddp` registers a `DDPHook` (`ddp_hook`) with DistributedDataParallel; `fsdp` one between replicas of an FSDP2 model
- `hook`: the base class of both, a backward pass as one transaction
- `budget`: coordinates per bucket; `rates`: learning rates of plain SGD; `escape`: the escape check after its steps
"""

from packsaddle.hooks.ddp_hook import DDPHook as DDPHook
from packsaddle.hooks.fsdp import FSDPHook as FSDPHook
