"""Local updates of any optimizer, exchanged every H steps. Read `updates` first, which has `LocalUpdates`.

- `fragment`: parameters exchanged together; `anchor`: the parameters last agreed on; `escape`: its escape check
- `options`: overlap, workers, the outer optimizer; `participation`: weights and samples of workers
- `rounds`: the rounds of a fixed set of workers; `outcomes`: rejected ones; `clipping`: long updates
- `inner`, `start`, `lockstep`, `unsent`: the inner optimizers, and checks; `state`: values that must be equal
- `elastic`: workers that join and leave during training
"""
