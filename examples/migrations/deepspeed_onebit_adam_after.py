"""The same with packsaddle: AdamW on each worker, and after every step its change in 1 bit a coordinate.

    torchrun --nproc-per-node 2 examples/migrations/deepspeed_onebit_adam_after.py

On GPUs with NCCL, on CPUs with gloo.
"""

import os

import torch
from task import batch, loss_of, network, report

import packsaddle

STEPS = 240
has_gpu, worker = torch.cuda.is_available(), int(os.environ["RANK"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
torch.distributed.init_process_group("nccl" if has_gpu else "gloo")
model = network().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
local = packsaddle.LocalUpdates(optimizer, every=1)

for step in range(STEPS):
    optimizer.zero_grad()
    loss_of(model, [part.to(device) for part in batch(worker, step)]).backward()
    optimizer.step()
local.flush()

report(worker, model.cpu(), local.ledger.total.sent)
torch.distributed.destroy_process_group()
