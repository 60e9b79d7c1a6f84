"""torch's PowerSGD hook: DistributedDataParallel with AdamW, gradients of rank 4 from step 24 on.

torchrun --nproc-per-node 2 examples/migrations/torch_powersgd_before.py
"""

import torch
from task import batch, loss_of, network, reduced, report
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

STEPS, START = 240, 24
torch.distributed.init_process_group("gloo")
worker = torch.distributed.get_rank()
model = DistributedDataParallel(network())
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=START)
model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
for step in range(STEPS):
    optimizer.zero_grad()
    loss_of(model, batch(worker, step)).backward()
    optimizer.step()

report(worker, model, reduced(model, START) + 4 * int(state.compression_stats()[2]))
torch.distributed.destroy_process_group()
