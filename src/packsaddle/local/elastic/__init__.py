"""Workers that join and leave during training: `workers` runs the exchanges, which a torchft Manager commits.

- `membership`: the records of all workers, and a worker's own counts and exchanges
- `quorum`: the start of a round, in which workers are found and compared and a newcomer receives its state; the vote
- `sigterm`: leaving the run on SIGTERM
"""
