"""Local training with any optimizer; the workers' changes are averaged every H steps. Read `updates` first.

- `fragment`: parameters exchanged together; `anchor`: the parameters last agreed on; `escape`: its saddle check
- `options`: overlap, workers, the outer optimizer; `participation`: the workers' weights, and samples of the workers
- `rounds`: exchanges of a fixed set of workers; `outcomes`: rejected exchanges; `clipping`: limits the norm of updates
- `inner`, `start`, `lockstep`, `unsent`: the inner optimizers, and checks; `state`: values that must match
- `elastic`: workers that join and leave during training
"""
