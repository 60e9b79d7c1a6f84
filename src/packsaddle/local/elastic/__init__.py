"""Workers that come and go: `membership` has the rounds that a torchft Manager commits.

- `roster`: who was in them; `memory_file`: an absent worker's error memory; `sigterm`: leaving in time
"""

from packsaddle.local.elastic.membership import Membership as Membership
