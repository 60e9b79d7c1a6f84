"""Elastic workers, which join and leave during training: `membership` has the rounds that a torchft Manager commits.

- `roster`: records of the workers; `memory_file`: an absent worker's error memory; `sigterm`: leaving on SIGTERM
"""

from packsaddle.local.elastic.membership import Membership as Membership
