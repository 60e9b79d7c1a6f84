"""Workers that join and leave during training: `membership` runs the exchanges, which a torchft Manager commits.

- `roster`: records of all workers; `memory_file`: an absent worker's error memory; `sigterm`: leaving on SIGTERM
"""

from packsaddle.local.elastic.membership import Membership as Membership
