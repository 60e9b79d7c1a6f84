"""Training with compressed gradients and error feedback: an optimizer, a DDP hook, an FSDP hook, local steps.

Read `sgd` first: `CompressedSGD.step` is Algorithm 1. `layout` lays parameters out as one vector, `memory` has the
error memories and `gradient` what is fed to them (momentum, STORM). `ddp` and `fsdp` are the hooks, over
`error_feedback`. What may be added to a step (noise, guards, the escape check) is in `stages`.
"""
