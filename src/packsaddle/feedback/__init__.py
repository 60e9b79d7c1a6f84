"""Error feedback as a transaction, shared by the optimizer, the DDP and FSDP hooks, and local updates.

- `round`: one exchange, which sends the sum of error memory and update, compressed, and is then committed or rolled
  back (lines 10-12 of Algorithm 1)
- `memory`: the error memory, of several kinds
- `slices`: all or some parameters as one flat vector
- `guard`, `checks`, `escape`, `noise`: validation of a step, measurements, the escape check, artificial noise
- `compression`: the common settings; `state`: saved states; `background`: exchanges that overlap with training
"""
