"""Local updates of any optimizer, exchanged every H steps. Read `updates` first, which has `LocalUpdates`.

- `fragment`: parameters exchanged together; `anchor`: the parameters last agreed on; `escape`: its escape check
- `options`: overlap, workers, the outer optimizer; `participation`: weights and samples of workers
- `inner`, `start`, `lockstep`: the inner optimizers, and checks; `outcomes`: rejected rounds; `clipping`: long updates
- `elastic`: workers that join and leave during training
"""
