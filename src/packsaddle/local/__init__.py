"""Local training with any optimizer: workers' parameter changes are averaged every H steps. Start with `updates`.

- `options`: the classes of options: overlap, workers, the outer optimizer
- `fragment` and `round`: the parameters that are exchanged together, and one exchange of them
- `anchor`: the parameters on which all workers last agreed
- `clipping`: limits the norms of the workers' updates
- `schedule`: the steps after which each fragment is exchanged
- `pace`: the numbers of steps of workers with unequal speeds
- `weights`: the workers' weights in the mean of their updates
- `after` and `outcomes`: the reactions to the end of an exchange, such as a reset after a rejected exchange
- `inner` and `start`: checks of the inner optimizers and of the first step
- `lockstep`: a check before each collective that all workers make the same call
- `elastic`: workers that join and leave during training
"""
