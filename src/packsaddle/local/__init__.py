"""Local training with any optimizer: workers' parameter changes are averaged every H steps. Start with `round`, the
algorithm, or with `updates`, the class `LocalUpdates`.

- `options`: the classes of options: overlap, workers, the outer optimizer
- `schedule`: the steps at which rounds begin and end, and the paces of workers with unequal speeds
- `fragment`: the parameters that are exchanged together, and their error memory
- `anchor`: the parameters on which all workers last agreed, and the outer optimizer
- `round`: one exchange of a fragment, as four functions in order; agreement of workers and clipping
- `workers`: what is needed of a set of workers, and the set that does not change
- `elastic`: workers that join and leave during training
- `after` and `moments`: the reactions to the end of a round, such as a reset after a rejected one
- `watch`: checks of the inner optimizers, and of the first step
- `saved`: what a saved state contains and requires
"""
