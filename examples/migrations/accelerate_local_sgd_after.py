"""The same with packsaddle: AdamW on each worker, and the mean change of every 8 steps, in 1 bit.

torchrun --nproc-per-node 2 examples/migrations/accelerate_local_sgd_after.py
"""

import torch
from accelerate import Accelerator
from task import batch, loss_of, network, report

import packsaddle

STEPS, EVERY = 240, 8
accelerator = Accelerator(cpu=not torch.cuda.is_available())
worker = accelerator.process_index
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer = accelerator.prepare(model, optimizer)

packsaddle.keep_gradients_local(model)
local = packsaddle.LocalUpdates(optimizer, every=EVERY, scaler=accelerator.scaler)
for step in range(STEPS):
    optimizer.zero_grad()
    accelerator.backward(loss_of(model, batch(worker, step)))
    optimizer.step()
local.flush()

report(worker, model, local.ledger.total.sent)
accelerator.end_training()
