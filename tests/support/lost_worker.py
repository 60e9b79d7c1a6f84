"""One of several workers, the last of which dies or stops in mid-run; the others say whom they lost."""

import os
import signal
import sys
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from packsaddle.comm.failures import PeerLostError
from packsaddle.comm.group import TorchGroup

rank, size, how, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.distributed.init_process_group(
    "gloo",
    init_method=f"file://{store}" if how != "held" else store,
    rank=rank,
    world_size=size,
    timeout=timedelta(seconds=60),
)
group = TorchGroup()
tensor = torch.ones(1000)
group.all_reduce(tensor)
if how == "stop":  # all workers are there now: the time in which one starts cannot end the others
    _set_pg_timeout(timedelta(seconds=3))
if rank == (0 if how == "held" else size - 1):
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
try:
    while True:
        group.all_reduce(tensor)
except PeerLostError as error:
    print(error, flush=True)
    os._exit(3)
