"""Workers that join and leave during training: `workers` runs the exchanges, which a torchft Manager commits.

- `roster`: records of all workers; `memory_file`: an absent worker's error memory; `sigterm`: leaving on SIGTERM
"""

from packsaddle.local.elastic.workers import ElasticWorkers as ElasticWorkers
