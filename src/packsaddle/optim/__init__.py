"""Training with compressed gradients and error feedback: an optimizer, a DDP hook, an FSDP hook, local steps.

Read `sgd` first: `CompressedSGD.step` is Algorithm 1, with its line numbers. Then `error_feedback`, the round that the
optimizer and the hooks share: v = e + u is made, exchanged and absorbed, and the step is taken or forgotten as a whole.
`memory` has the kinds of e, `gradient` and `local` those of u (momentum, STORM, local steps), `layout` how parameters
make one vector, or slices of it. `hook` is error feedback on slices of a backward pass, and `ddp` and `fsdp` bring it
to torch's wrappers. What may be added to a step (noise, guards, drift, the escape check) is in `stages`.
"""
