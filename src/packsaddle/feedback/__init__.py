"""Error feedback as a transaction, shared by the optimizer, the DDP and FSDP hooks, and local updates.

- `round`: one exchange. It sends the sum of error memory and update, compressed, and is then committed or rolled back
  (lines 10-12 of Algorithm 1).
- `memory`: the error memory, in several variants
- `slices`: all or some parameters as one flat vector
- `guard`: validation of the vector to send; skipped steps
- `checks`: measurements of the contraction, and comparisons of the workers' parameters
- `escape`: the escape check (lines 4-8 of Algorithm 1)
- `noise`: the artificial noise (line 9 of Algorithm 1)
- `compression`: the settings of compressed averaging
- `state`: saved states
- `background`: exchanges that overlap with training
"""
