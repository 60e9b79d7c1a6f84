"""A script for several workers, of which the last one dies or stops during a run; the rest name the lost worker."""

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
if how == "stop":  # set the timeout only now that all workers have started, so that a slow start causes no error
    _set_pg_timeout(timedelta(seconds=3))
if rank == (0 if how == "held" else size - 1):
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
try:
    while True:
        group.all_reduce(tensor)
except PeerLostError as error:
    print(error, flush=True)
    os._exit(3)
