"""The same with packsaddle: about five bits a coordinate from the first step on, at the learning rate of DDP.

torchrun --nproc-per-node 2 examples/migrations/torch_powersgd_after.py
"""

import torch
from task import batch, loss_of, network, report
from torch.nn.parallel import DistributedDataParallel

import packsaddle

STEPS = 240
torch.distributed.init_process_group("gloo")
worker = torch.distributed.get_rank()
model = DistributedDataParallel(network())
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
hook = packsaddle.register_ddp_hook(model, packsaddle.QSGD(127), optimizer=optimizer)
for step in range(STEPS):
    optimizer.zero_grad()
    loss_of(model, batch(worker, step)).backward()
    optimizer.step()

report(worker, model, hook.ledger.total.sent)
torch.distributed.destroy_process_group()
