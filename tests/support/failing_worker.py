"""A script for two workers, of which rank 0 fails in its backward pass.

Before that, rank 0 has passed a bucket to DDP's hook, and rank 1 never joins the bucket's collective.
"""

import sys
import time

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = DistributedDataParallel(nn.Sequential(nn.Linear(90, 90), nn.Linear(90, 90)), bucket_cap_mb=0.02)
packsaddle.register_ddp_hook(model, packsaddle.TopK(0.1))
for _ in range(2):
    model(torch.randn(4, 90)).sum().backward()
if rank == 1:
    time.sleep(600)


def fail(gradient: Tensor) -> None:
    time.sleep(1)  # the exchange of the first bucket is waiting for rank 1
    raise ValueError("this batch is bad")


model.module[0].weight.register_hook(fail)
model(torch.randn(4, 90)).sum().backward()
