"""Error feedback as a transaction, shared by the optimizer, the DDP and FSDP hooks, and local updates.

- `round`: one exchange, v = e + u sent as C(v), then committed or rolled back (Algorithm 1, lines 10-12)
- `memory`: the error memory e, of several kinds
- `slices`: parameters as one flat vector, or parts of it
- `guard`, `checks`, `escape`, `noise`: validation of a step, measurements, the escape check, artificial noise
- `compression`: the common settings; `state`: saved states; `background`: exchanges that overlap with training
"""
