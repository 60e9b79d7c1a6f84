"""Training with compressed gradients and error feedback: an optimizer, hooks, local updates.

Read `sgd` first: `CompressedSGD.step` is Algorithm 1, with its line numbers. Then `error_feedback`, the round that the
optimizer and the hooks share: v = e + u is made, exchanged and absorbed, and the step is taken or forgotten as a whole.
`compression` has the settings of compression and exchange for all. `memory` has the kinds of e, `gradient` those
of u (momentum, STORM), `layout` how parameters make one vector, or slices of it. `hook` is error feedback on slices of
a backward pass, `ddp_hook` has DistributedDataParallel's buckets for slices, and `ddp` and `fsdp` register hooks with
torch's wrappers. `local_updates` exchanges what any optimizer has moved, `fragment` by fragment, in `local_rounds`, and
`membership` has the rounds of workers that come and go. What may be added to a step (noise, guards, drift, the escape
check) is in `stages`.
"""

from packsaddle.optim.compression import Compression, Schedule
from packsaddle.optim.ddp import attach, keep_gradients_local, register_ddp_hook
from packsaddle.optim.ddp_hook import DDPHook
from packsaddle.optim.fsdp import FSDPHook, register_fsdp_hook
from packsaddle.optim.local_options import Elastic, OuterSGD, Overlap, Workers
from packsaddle.optim.local_updates import LocalUpdates
from packsaddle.optim.membership import Membership
from packsaddle.optim.sgd import CompressedSGD
from packsaddle.optim.stages.drift import Drift, DriftError, fingerprint
from packsaddle.optim.stages.escape import Escape, Reset
from packsaddle.optim.stages.noise import Noise, Ramp
from packsaddle.optim.stages.nonfinite import NonFiniteError, Skip

__all__ = [
    "CompressedSGD",
    "Compression",
    "DDPHook",
    "Drift",
    "DriftError",
    "Elastic",
    "Escape",
    "FSDPHook",
    "LocalUpdates",
    "Membership",
    "Noise",
    "NonFiniteError",
    "OuterSGD",
    "Overlap",
    "Ramp",
    "Reset",
    "Schedule",
    "Skip",
    "Workers",
    "attach",
    "fingerprint",
    "keep_gradients_local",
    "register_ddp_hook",
    "register_fsdp_hook",
]
