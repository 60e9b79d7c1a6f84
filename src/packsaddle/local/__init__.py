"""Local training with any optimizer: workers' parameter changes are averaged every H steps. Start with `updates`.

- `fragment`: parameters exchanged together; `anchor`: the parameters last agreed on; `clipping`: limits updates
- `options`: overlap, workers, the outer optimizer; `participation`: the workers' weights, and samples of the workers
- `schedule`: when fragments are exchanged; `pace`: the steps of workers of unequal speeds
- `outcomes`: rejected exchanges; `inner`, `start`, `lockstep`: the inner optimizers, and checks
- `elastic`: workers that join and leave during training
"""
