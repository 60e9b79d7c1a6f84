"""torch's post-local SGD: AdamW on each worker, and the mean of the parameters after every 8 steps.

torchrun --nproc-per-node 2 examples/migrations/torch_post_local_sgd_before.py
"""

import torch
from task import batch, loss_of, network, reduced, report
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

STEPS, EVERY = 240, 8
torch.distributed.init_process_group("gloo")
worker = torch.distributed.get_rank()
model = DistributedDataParallel(network())
alone, _ = torch.distributed.new_subgroups(1)
model.register_comm_hook(PostLocalSGDState(None, alone, start_localSGD_iter=0), post_localSGD_hook)
averager = PeriodicModelAverager(period=EVERY, warmup_steps=EVERY - 1)
optimizer = PostLocalSGDOptimizer(torch.optim.AdamW(model.parameters(), lr=2e-3), averager)
for step in range(STEPS):
    optimizer.zero_grad()
    loss_of(model, batch(worker, step)).backward()
    optimizer.step()

report(worker, model, reduced(model, STEPS // EVERY))
torch.distributed.destroy_process_group()
