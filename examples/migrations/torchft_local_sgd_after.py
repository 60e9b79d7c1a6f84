"""The same with packsaddle: AdamW on each worker, and the mean change of every 20 steps, in 1 bit.

    torchrun --nproc-per-node 2 examples/migrations/torchft_local_sgd_after.py

With TORCHFT_LIGHTHOUSE set, and started as before, workers may join and leave.
"""

import os

import torch
from task import batch, loss_of, network, report

import packsaddle

STEPS, EVERY = 240, 20
worker = int(os.environ.get("REPLICA_GROUP_ID", os.environ["RANK"]))
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

manager = None
if "TORCHFT_LIGHTHOUSE" in os.environ:
    manager = packsaddle.comm.connect(min_workers=2)
else:
    torch.distributed.init_process_group("gloo")
local = packsaddle.LocalUpdates(optimizer, every=EVERY, workers=manager)
if manager:
    local.join()
for step in range(STEPS):
    optimizer.zero_grad()
    loss_of(model, batch(worker, step)).backward()
    optimizer.step()
local.flush()

report(worker, model, local.ledger.total.sent)
if manager:
    manager.shutdown(wait=False)
else:
    torch.distributed.destroy_process_group()
