"""The engine: error feedback as a transaction, which the optimizer, hooks and local updates share.

- `round`: one exchange, v = e + u sent as C(v), then committed or rolled back (Algorithm 1, lines 10-12)
- `memory`: the error memory e, of several kinds
- `slices`: parameters as one flat vector, or parts of it
- `guard`, `checks`, `escape`, `noise`: validation, measurements and checks of a step
- `compression`: the settings that all fronts share; `state`: saved states; `background`: exchanges during training
"""
