"""Compressed exchange of gradients in the backward pass, for any optimizer.

- `ddp` registers a `DDPHook` (defined in `ddp_hook`) with DistributedDataParallel
- `fsdp` registers an `FSDPHook` with an FSDP2 model
- `hook` defines the base class of both hooks: the exchanges of a backward pass are all applied, or all rejected
"""

from packsaddle.hooks.ddp_hook import DDPHook as DDPHook
from packsaddle.hooks.fsdp import FSDPHook as FSDPHook
