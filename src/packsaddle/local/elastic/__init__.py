"""Workers that join and leave during training: `workers` runs the exchanges, which a torchft Manager commits.

- `quorum` and `greeting`: the start of a round, in which workers are found and compared
- `roster` and `membership`: the records of all workers, and a worker's own counts and exchanges
- `recovery`: the state that is sent to a worker that misses committed rounds
- `site`: the processes that together are one worker
- `sigterm`: leaving the run on SIGTERM
"""

from packsaddle.local.elastic.workers import ElasticWorkers as ElasticWorkers
