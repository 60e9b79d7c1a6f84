"""The same with packsaddle: AdamW on each worker, and the mean change of every 8 steps, in 1 bit.

torchrun --nproc-per-node 2 examples/migrations/torch_post_local_sgd_after.py
"""

import torch
from task import batch, loss_of, network, report

import packsaddle

STEPS, EVERY = 240, 8
torch.distributed.init_process_group("gloo")
worker = torch.distributed.get_rank()
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
local = packsaddle.LocalUpdates(optimizer, every=EVERY)
for step in range(STEPS):
    optimizer.zero_grad()
    loss_of(model, batch(worker, step)).backward()
    optimizer.step()
local.flush()

report(worker, model, local.ledger.total.sent)
torch.distributed.destroy_process_group()
